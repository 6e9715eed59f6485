"""The sampling loop, for plain decoding and exact speculative decoding.

Each call of the policy reads a window of W tokens per episode, the last sampled token and W - 1 drafted tokens, and
the loop samples at each of the W positions. As long as a sample equals the draft, the next position has read the right
tokens, and its sample is accepted too. This is speculative decoding (Leviathan et al. 2023, arXiv 2211.17192), except
that the noise of each position is fixed beforehand and samples are compared instead of probabilities.

The noise of a token is a function of (key, episode, position) alone. So the tokens are the same with any draft, or
none, up to the rounding of the logits. Every episode advances at its own pace. W = 1 is plain decoding.

Letters: B episodes, Q prompt tokens, T response tokens, W tokens of a window, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax.records import Rollout
from critkl_jax.tasks.drafts import Draft

_FEW_TOKENS = 1024  # up to this size of the vocabulary, a token is drawn in one step

# (tokens [B, W], mask [B, W], policy state) -> (logits [B, W, V], values [B, W], policy state)
Policy = Callable[[chex.Array, chex.Array, Any], tuple[chex.Array, chex.Array, Any]]
# (policy state, number of last tokens to forget [B]) -> policy state
Rewind = Callable[[Any, chex.Array], Any]


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The settings of the sampling loop; see `generation.generate`.

  Attributes:
    policy: the policy.
    stop: int32 `[num_states, num_columns]` automaton that ends an episode.
    max_new_tokens: T, at which an episode is cut.
    temperature: logits are divided by it; may be traced.
    top_p: tokens outside the smallest set of at least this probability are not drawn.
    greedy: whether the most probable token is taken instead of a sample.
    pad_id: fills `actions` after the end of an episode.
    window: W.
    draft: guesses the next tokens; unused at W = 1.
    rewind: makes the policy forget its last tokens; unused at W = 1.

  Raises:
    ValueError: if max_new_tokens or window is less than 1, top_p is not in (0, 1], or a window above 1 comes without
      draft and rewind.
  """

  policy: Policy
  stop: chex.Array
  max_new_tokens: int
  temperature: chex.Numeric = 1.0
  top_p: float = 1.0
  greedy: bool = False
  pad_id: int = 0
  window: int = 1
  draft: Draft | None = None
  rewind: Rewind | None = None

  def __post_init__(self):
    for name in ('max_new_tokens', 'window'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}: expected 1 or more, got {getattr(self, name)}.')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p: expected more than 0 and at most 1, got {self.top_p}.')
    if self.window > 1 and (self.draft is None or self.rewind is None):
      raise ValueError(f'window: {self.window} tokens at a time need a draft and a rewind.')


@struct.dataclass
class Episodes:
  """The state of the sampling loop: B unfinished or finished episodes.

  Attributes:
    rows: int32 `[B]` index of the prompt that each episode answers.
    keys: `[B]` PRNG keys of the noise.
    token: int32 `[B]` the last token, which the policy has not read yet.
    length: int32 `[B]` number of sampled tokens.
    active: bool `[B]` false once the episode has ended.
    stop_state: int32 `[B]` state of the automaton.
    num_calls: int32 `[B]` calls of the policy so far, after the pass over the prompt.
    actions: int32 `[B, T + W]` sampled tokens; entries from `length` on are overwritten later.
    log_probs: float32 `[B, T + W]` log-probabilities of the actions.
    values: float32 `[B, T + W]` value estimates before the actions.
    policy_state: the policy's state, for example a cache.
  """

  rows: chex.Array
  keys: chex.PRNGKey
  token: chex.Array
  length: chex.Array
  active: chex.Array
  stop_state: chex.Array
  num_calls: chex.Array
  actions: chex.Array
  log_probs: chex.Array
  values: chex.Array
  policy_state: Any


def start(decoder: Decoder, policy_state: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey
          ) -> Episodes:
  """Starts episodes: the policy reads the prompts `[B, Q]`, padded on the left, up to the token before the last.

  The first window reads the last token. The key is consumed.
  """
  chex.assert_rank([prompt, prompt_mask], 2)
  chex.assert_equal_shape([prompt, prompt_mask])
  padded_left = _padded_left(prompt_mask)
  if not isinstance(padded_left, jax.core.Tracer) and not jnp.all(padded_left):
    raise ValueError(f'prompt_mask: prompts must be padded on the left, and {int(jnp.sum(~padded_left))} of '
                     f'{prompt.shape[0]} are not: generation would go on from their padding.')
  batch_size, num_columns = prompt.shape
  if num_columns > 1:
    _, _, policy_state = decoder.policy(prompt[:, :-1], prompt_mask[:, :-1], policy_state)
  zeros, shape = jnp.zeros(batch_size, jnp.int32), (batch_size, decoder.max_new_tokens + decoder.window)
  return Episodes(
      rows=jnp.arange(batch_size, dtype=jnp.int32),
      keys=_keys(key, batch_size),
      token=prompt[:, -1].astype(jnp.int32), length=zeros, active=jnp.ones(batch_size, bool), stop_state=zeros,
      num_calls=zeros,
      actions=jnp.full(shape, decoder.pad_id, jnp.int32), log_probs=jnp.zeros(shape, jnp.float32),
      values=jnp.zeros(shape, jnp.float32),
      policy_state=policy_state)


def go_on(decoder: Decoder, policy_state: Any, rollout: Rollout, position: chex.Array, token: chex.Array,
          key: chex.PRNGKey) -> Episodes:
  """Resumes decoding after `position` kept tokens, with `token` substituted.

  Args:
    decoder: settings of the loop.
    policy_state: the policy's state after the prompt and the kept tokens.
    rollout: B responses of T tokens; kept tokens have its log-probabilities and values.
    position: int32 `[B]` number of kept tokens, less than T.
    token: int32 `[B]` the new token at `position`; its log-probability and value are 0.
    key: PRNG key, consumed.
  """
  batch_size = position.shape[0]
  kept = jnp.arange(rollout.actions.shape[1], dtype=jnp.int32)[None] < position[:, None]

  def first(x, fill):
    return jnp.pad(jnp.where(kept, x, fill), ((0, 0), (0, decoder.window)), constant_values=fill)

  actions = _write(first(rollout.actions, decoder.pad_id), token.astype(jnp.int32)[:, None], position)
  states = _stop_states(decoder.stop, jnp.zeros(batch_size, jnp.int32), actions)
  stop_state = jnp.take_along_axis(states, position[:, None] + 1, 1)[:, 0]
  length = position.astype(jnp.int32) + 1
  return Episodes(
      rows=jnp.arange(batch_size, dtype=jnp.int32), keys=_keys(key, batch_size), token=token.astype(jnp.int32),
      length=length,
      active=(stop_state < decoder.stop.shape[0]) & (length < decoder.max_new_tokens), stop_state=stop_state,
      num_calls=jnp.zeros(batch_size, jnp.int32), actions=actions, log_probs=first(rollout.log_probs, 0.0),
      values=first(rollout.values, 0.0), policy_state=policy_state)


def sample_window(decoder: Decoder, episodes: Episodes) -> Episodes:
  """Calls the policy once and appends 1 to W tokens to each active episode."""
  e, window = episodes, decoder.window
  tokens = e.token[:, None]
  if window > 1:
    drafted = decoder.draft(e.rows, e.actions, e.length, window - 1).astype(jnp.int32)
    tokens = jnp.concatenate([tokens, jnp.maximum(drafted, 0)], 1)
  read = jnp.broadcast_to(e.active[:, None], tokens.shape)
  logits, values, policy_state = decoder.policy(tokens, read, e.policy_state)
  position = e.length[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
  sampled, log_probs = _sample(decoder, e.keys, position, logits)
  stop_states = _stop_states(decoder.stop, e.stop_state, sampled)  # before each token, and after the last

  final = decoder.stop.shape[0]
  counts = e.active[:, None] & (position < decoder.max_new_tokens) & (stop_states[:, :-1] < final)
  if window > 1:
    counts &= jnp.pad(jnp.cumprod(sampled[:, :-1] == drafted, 1) > 0, ((0, 0), (1, 0)), constant_values=True)
  added = jnp.sum(counts, 1, dtype=jnp.int32)
  length = e.length + added
  stop_state = jnp.take_along_axis(stop_states, added[:, None], 1)[:, 0]
  last = jnp.take_along_axis(sampled, jnp.maximum(added - 1, 0)[:, None], 1)[:, 0]
  if window > 1:
    policy_state = decoder.rewind(policy_state, window - added)
  return e.replace(
      token=jnp.where(added > 0, last, e.token), length=length, stop_state=stop_state,
      active=e.active & (stop_state < final) & (length < decoder.max_new_tokens),
      num_calls=e.num_calls + e.active.astype(jnp.int32),
      actions=_write(e.actions, sampled, e.length), log_probs=_write(e.log_probs, log_probs, e.length),
      values=_write(e.values, values.astype(jnp.float32), e.length), policy_state=policy_state)


def finish(decoder: Decoder, episodes: Episodes, prompt: chex.Array, prompt_mask: chex.Array) -> Rollout:
  """Collects the episodes in a `Rollout`, in the order of the prompts."""
  e = episodes
  mask = jnp.arange(decoder.max_new_tokens, dtype=jnp.int32)[None] < e.length[:, None]
  actions, log_probs, values = (x[:, :decoder.max_new_tokens] for x in (e.actions, e.log_probs, e.values))
  # Under jit a prompt that is padded elsewhere cannot be refused.
  log_probs, values = (jnp.where(_padded_left(prompt_mask)[:, None], x, jnp.nan) for x in (log_probs, values))
  return Rollout(prompt=prompt, prompt_mask=prompt_mask, actions=jnp.where(mask, actions, decoder.pad_id), mask=mask,
                 log_probs=jnp.where(mask, log_probs, 0.0), values=jnp.where(mask, values, 0.0), num_calls=e.num_calls,
                 truncated=e.stop_state < decoder.stop.shape[0])


def _padded_left(prompt_mask):
  """Returns bool `[B]`, whether the tokens of each prompt are its last columns, and at least one."""
  mask = prompt_mask.astype(bool)
  return jnp.all(mask[:, 1:] | ~mask[:, :-1], 1) & mask[:, -1]


@jax.custom_batching.custom_vmap
def any_across_vmap(condition: chex.Array) -> chex.Array:
  """Returns whether a condition, bool of any shape, holds anywhere; under `vmap`, whether it does so in any member.

  Under `vmap`, a loop whose condition differs between members would copy its whole state in every step.
  """
  return jnp.any(condition)


@any_across_vmap.def_vmap
def _any_across_members(axis_size, in_batched, condition):
  del axis_size, in_batched
  return any_across_vmap(condition), False


def _keys(key, batch_size):
  """Makes a threefry key for each episode; under `vmap` the noise of an `rbg` key would depend on other episodes."""
  return jax.vmap(jax.random.fold_in, (None, 0))(_threefry(key), jnp.arange(batch_size, dtype=jnp.int32))


def _threefry(key):
  key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
  if str(jax.random.key_impl(key)) == 'threefry2x32':
    return key
  return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl='threefry2x32')


def _sample(decoder, keys, position, logits):
  """Samples tokens `[B, W]` and returns them with their log-probabilities."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / decoder.temperature)
  if decoder.greedy:
    sampled = jnp.argmax(log_probs, -1)
  else:
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, position)
    draw = jax.random.categorical if log_probs.shape[-1] <= _FEW_TOKENS else _draw_in_two_steps
    sampled = jax.vmap(jax.vmap(draw))(keys, _keep_top_p(log_probs, decoder.top_p))
  return sampled.astype(jnp.int32), jnp.take_along_axis(log_probs, sampled[..., None], -1)[..., 0]


def _draw_in_two_steps(key, log_probs):
  """Draws a token from log-probabilities `[V]`: first a block of tokens, by its probability, then a token of the block.

  The noise of one step would be V numbers for each token, which cost a CPU more than the logits; this needs some
  2 sqrt(V).
  """
  size = 2 ** (log_probs.shape[0].bit_length() // 2)
  blocks = jnp.pad(log_probs, (0, -log_probs.shape[0] % size), constant_values=-jnp.inf).reshape(-1, size)
  first, second = jax.random.split(key)
  block = jax.random.categorical(first, jnp.log(jnp.sum(jnp.exp(blocks), 1)))
  return block * size + jax.random.categorical(second, blocks[block])


def _stop_states(stop, state, tokens):
  """Returns the automaton's states `[B, W + 1]` before each of the tokens `[B, W]` and after the last."""
  final, columns = stop.shape

  def follow(state, token):
    after = stop[jnp.minimum(state, final - 1), jnp.minimum(token, columns - 1)]
    state = jnp.where(state < final, after, state)
    return state, state

  unroll = jax.default_backend() != 'cpu' and tokens.shape[1] <= 64  # a window, not a whole response
  _, states = jax.lax.scan(follow, state, tokens.T, unroll=unroll)
  return jnp.concatenate([state[None], states]).T


def _write(old, new, start):
  """Writes `[B, W]` into `[B, T + W]` from columns `start` `[B]` on."""
  return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(old, new, start, 0)


def _keep_top_p(log_probs, top_p):
  """Sets log-probabilities `[..., V]` to -inf outside the smallest set of tokens of probability `top_p` or more."""
  if top_p == 1:
    return log_probs
  descending = -jnp.sort(-log_probs, -1)
  before = jnp.cumsum(jnp.exp(descending), -1) - jnp.exp(descending)
  threshold = jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
  return jnp.where(log_probs >= threshold, log_probs, -jnp.inf)
