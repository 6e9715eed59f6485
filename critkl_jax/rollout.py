"""Sampling: a prompt is read once, then a loop on the device writes the responses of all episodes at their own pace."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.decoding import Decoder, Episodes, Policy, Rewind, advance, any_of_all, finish, go_on, start
from critkl_jax.drafts import Draft, prompt_lookup
from critkl_jax.gpt2 import GPT2, init_cache, stacked
from critkl_jax.records import Rollout, Solution, Tokens
from critkl_jax.tasks.task import Task

_LOGITS_IN_WINDOW = 2**26  # 256 MiB


def generate(policy: Policy, policy_state: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
             max_new_tokens: int, stop: chex.Array, temperature: chex.Numeric = 1.0, top_p: float = 1.0,
             greedy: bool = False, pad_id: int = 0, window: int = 1, draft: Draft | None = None,
             rewind: Rewind | None = None) -> Rollout:
  """Samples a response to each prompt, in one loop that ends when all episodes have ended.

  The noise of a token is a function of the key, the episode's index and the token's position in the response alone, so
  the same key gives the same tokens however many other episodes there are to wait for, and with any draft.

  Args:
    policy: called with the prompt but for its last column, then with the K tokens of a window an episode: `(tokens
      [B, K], mask [B, K], state) -> (logits [B, K, V], values [B, K], state)`; what it must remember it keeps in its
      state, a PyTree of arrays whose shapes do not change. Of the first call only the state is used.
    policy_state: the state before the prompt, for example an empty `KVCache`.
    prompt: int32 `[B, Q]` prompts, padded on the left.
    prompt_mask: bool `[B, Q]` true at the tokens of the prompts; the last column is.
    key: PRNG key, consumed.
    max_new_tokens: T, at which an episode is cut.
    stop: int32 `[S, C]` automaton that ends an episode, see `tasks.task.stop_after`.
    temperature: logits are divided by it; may be traced.
    top_p: tokens outside the smallest set of at least this probability are not drawn; 1 draws from all.
    greedy: whether the most probable token is taken instead of a draw.
    pad_id: what stands in `actions` after the end of an episode.
    window: K, tokens that the policy reads at a time; above 1 decoding is speculative.
    draft: `(rows [B], actions [B, T + K], number of actions [B], K - 1) -> int32 [B, K - 1]`: guesses, token ids or -1
      for none, of what follows the first so many actions of the answer to prompt `rows[b]`. It decides how fast the
      loop is, and nothing else but the rounding of the logits.
    rewind: `(state, n [B]) -> state` without the last n tokens of each episode, K of one that has ended. The state
      needs room for K - 1 tokens more than prompt and response.

  Returns:
    A `Rollout`. Its log-probabilities are those of the policy at this temperature, before `top_p` cuts it.

  Raises:
    ValueError: if max_new_tokens or window is less than 1, top_p is not in (0, 1], or a window above 1 comes without
      draft and rewind.
    AssertionError: if the shapes of prompt and mask differ.
  """
  decoder = Decoder(
      policy=policy, stop=jnp.asarray(stop), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
      greedy=greedy, pad_id=pad_id, window=window, draft=draft, rewind=rewind)
  episodes = start(decoder, policy_state, prompt, prompt_mask, key)
  episodes = jax.lax.while_loop(lambda e: any_of_all(e.active), lambda e: advance(decoder, e), episodes)
  return finish(decoder, episodes, prompt, prompt_mask)


def gpt2_policy(model: GPT2, params: Any) -> Policy:
  """Returns a GPT-2 as a policy for `generate`.

  Args:
    model: the network.
    params: its parameters.

  Returns:
    A `Policy` whose state is a `KVCache` with a slot for each token of prompt and response, and K - 1 more.
  """

  params = stacked(model.config, params)

  def policy(tokens, mask, cache):
    tokens = jnp.minimum(tokens, model.config.vocab_size - 1)  # a guess may be anything, but must not become NaN
    output = model.apply({'params': params}, tokens, mask, cache)
    return output.logits, output.values, output.cache

  return policy


def gpt2_generate(model: GPT2, params: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
                  max_new_tokens: int, stop: chex.Array, usual_length: int = 0, method: str = 'auto', window: int = 0,
                  draft: Draft | None = None, **options: Any) -> Rollout:
  """Samples responses from a GPT-2 with a key-value cache that grows with the longest episode.

  Args:
    model: the network.
    params: its parameters.
    prompt: as in `generate`.
    prompt_mask: as in `generate`.
    key: PRNG key, consumed.
    max_new_tokens: T, at which an episode is cut.
    stop: as in `generate`.
    usual_length: length that few responses exceed; the cache becomes longer only if one does. 0 if not known.
    method: `cached` reads one token at a time, `speculative` a window; `auto` picks, see `pick_method`.
    window: K of `speculative`; 0 for 16 on CPUs, which pay for every token, and 32 elsewhere, where a call has its
      price, or less where the logits of a window would take more than 256 MiB.
    draft: as in `generate`; None repeats what followed the last few tokens earlier in the episode.
    **options: `temperature`, `top_p`, `greedy` and `pad_id`, as in `generate`.

  Returns:
    A `Rollout`.

  Raises:
    ValueError: if prompt and response do not fit into the model's context, the method is unknown, usual_length is
      negative, or as `generate`.
    AssertionError: if the shapes of prompt and mask differ.
  """
  num_slots = prompt.shape[1] + max_new_tokens
  if num_slots > model.config.context_length:
    raise ValueError(
        f'max_new_tokens: {num_slots} positions do not fit into a context of {model.config.context_length}.')
  method = pick_method(draft is not None) if method == 'auto' else method
  if method not in ('cached', 'speculative'):
    raise ValueError(f"method: expected 'auto', 'cached' or 'speculative', got {method!r}.")
  on_cpu = jax.default_backend() == 'cpu'
  if usual_length < 0:
    raise ValueError(f'usual_length: expected 0 or more, got {usual_length}.')
  window = 1 if method == 'cached' else min(window or _usual_window(model, prompt.shape[0]), max(max_new_tokens, 1))
  decoder = Decoder(
      policy=gpt2_policy(model, params), max_new_tokens=max_new_tokens, window=window, rewind=_rewind,
      draft=draft or prompt_lookup(prompt, prompt_mask), stop=jnp.asarray(stop), **options)

  num_prompt, num_slots = prompt.shape[1], num_slots + window - 1
  lengths, full = _cache_lengths(num_prompt, usual_length, window, num_slots)
  if not on_cpu:  # a loop of no rounds costs nothing there, and the branch below copies of all parameters
    lengths = sorted({*lengths, full})
  cache = init_cache(model.config, prompt.shape[0], lengths[0], in_step=window == 1)
  episodes = start(decoder, cache, prompt, prompt_mask, key)
  few = prompt.shape[0] // 8 if on_cpu and sharding.axis_size('data') == 1 else 0
  for length in lengths:
    episodes = _advance_while(decoder, _grow(episodes, length), num_prompt, few)
  if full > lengths[-1]:
    many_left = any_of_all(jnp.sum(episodes.active, dtype=jnp.int32) > few)
    episodes = jax.lax.cond(many_left, lambda e: _end_all(decoder, e, num_prompt, full), lambda e: e, episodes)
  if few:
    episodes = _end_few(decoder, episodes, num_prompt, full, few)
  return finish(decoder, episodes, prompt, prompt_mask)


def respond(model: GPT2, params: Any, task: Task, problems: Any, key: chex.PRNGKey, **options: Any) -> Rollout:
  """Samples a response to each of B problems of a task, its draft at hand.

  Args:
    model: the network.
    params: its parameters.
    task: gives prompts, lengths, the end of a response and the draft.
    problems: with a leading axis B.
    key: PRNG key, consumed.
    **options: what else `gpt2_generate` takes.

  Returns:
    A `Rollout`.

  Raises:
    ValueError: as `gpt2_generate`.
  """
  prompt = jax.vmap(task.prompt)(problems)
  draft = _task_draft(task, problems) if task.draft else None
  return gpt2_generate(
      model, params, prompt.tokens, prompt.mask, key, max_new_tokens=task.response_length, stop=task.stop,
      usual_length=task.solution_length, pad_id=task.tokenizer.pad_id, draft=draft, **options)


def respond_from(model: GPT2, params: Any, task: Task, problems: Any, rollout: Rollout, position: chex.Array,
                 token: chex.Array, key: chex.PRNGKey, window: int = 0, **options: Any) -> Rollout:
  """Samples the rest of each response anew, after its first tokens and another one.

  Args:
    model: the network.
    params: its parameters.
    task: gives lengths, the end of a response and the draft.
    problems: with a leading axis B.
    rollout: B responses of T tokens to these problems.
    position: int32 `[B]` number of tokens that are kept, less than T.
    token: int32 `[B]` the token after them.
    key: PRNG key, consumed.
    window: as in `gpt2_generate`; without a draft of the task it is 1.
    **options: `temperature`, `top_p` and `greedy`, as in `generate`.

  Returns:
    A `Rollout` of B episodes. Log-probabilities and values of what was kept are those of the given one, 0 at `token`.

  Raises:
    ValueError: if prompt and response do not fit into the model's context.
  """
  num_prompt, num_tokens = rollout.prompt.shape[1], rollout.actions.shape[1]
  if num_prompt + num_tokens > model.config.context_length:
    raise ValueError(f'rollout: {num_prompt + num_tokens} positions do not fit into a context of '
                     f'{model.config.context_length}.')
  window = min(window or _usual_window(model, rollout.prompt.shape[0]), num_tokens) if task.draft else 1
  decoder = Decoder(
      policy=gpt2_policy(model, params), stop=jnp.asarray(task.stop), max_new_tokens=num_tokens, window=window,
      draft=_task_draft(task, problems) if task.draft else None, rewind=_rewind, pad_id=task.tokenizer.pad_id,
      **options)
  cache = init_cache(model.config, rollout.prompt.shape[0], num_prompt + num_tokens + window, in_step=False)
  _, _, cache = decoder.policy(jnp.concatenate([rollout.prompt, rollout.actions[:, :-1]], 1),
                               jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], 1), cache)
  cache = cache.replace(index=num_prompt + position.astype(jnp.int32))  # what stands beyond does not count
  episodes = go_on(decoder, cache, rollout, position, token, key)
  episodes = jax.lax.while_loop(lambda e: any_of_all(e.active), lambda e: advance(decoder, e), episodes)
  return finish(decoder, episodes, rollout.prompt, rollout.prompt_mask)


def as_rollout(prompt: Tokens, solution: Solution) -> Rollout:
  """Returns solutions `[B, T]` to prompts `[B, Q]` as if they had been sampled; log-probabilities and values are 0."""
  blank = jnp.zeros(solution.mask.shape, jnp.float32)
  return Rollout(prompt=prompt.tokens, prompt_mask=prompt.mask, actions=solution.tokens, mask=solution.mask,
                 log_probs=blank, values=blank)


def pick_method(has_draft: bool) -> str:
  """Returns the method where none is named: `speculative` with a draft; without one `cached`, because on a CPU the many
  wrong tokens of a prompt lookup cost more than they save, and elsewhere nobody has measured it."""
  return 'speculative' if has_draft else 'cached'


def score(model: GPT2, params: Any, rollout: Rollout) -> tuple[chex.Array, chex.Array]:
  """Returns what a model says at each action of a rollout, in one teacher-forced pass.

  Args:
    model: the network.
    params: its parameters.
    rollout: prompts `[B, Q]` and actions `[B, T]`.

  Returns:
    `(logits, values)`, float32 `[B, T, V]` and `[B, T]`: `logits[b, t]` is the distribution of `actions[b, t]`, before
    any temperature, and `values[b, t]` the value of the state in which it was taken.
  """
  output, first = _read(model, params, rollout)
  return output.logits[:, first:], output.values[:, first:]


def score_hidden(model: GPT2, params: Any, rollout: Rollout) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Returns what `score` does before the product with the output embedding: `(hidden, embedding, values)`, of shapes
  `[B, T, D]`, `[V, D]` and `[B, T]`; the first two in the type of the model's activations."""
  output, first = _read(model, params, rollout)
  return output.hidden[:, first:], params['wte']['embedding'].astype(output.hidden.dtype), output.values[:, first:]


def value_at_end(model: GPT2, params: Any, rollout: Rollout) -> chex.Array:
  """Returns the value of the state after the last place of each response: float32 `[B]`, of use where the response
  fills all T places."""
  tokens = jnp.concatenate([rollout.prompt, rollout.actions], 1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], 1)
  return model.apply({'params': params}, tokens, mask).values[:, -1]


def _read(model, params, rollout):
  tokens = jnp.concatenate([rollout.prompt, rollout.actions[:, :-1]], 1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], 1)
  return model.apply({'params': params}, tokens, mask), rollout.prompt.shape[1] - 1


def _usual_window(model, batch_size):
  """Returns the window where none is given; see `gpt2_generate`."""
  most = max(_LOGITS_IN_WINDOW // (batch_size * model.config.vocab_size), 1)
  return min(16 if jax.default_backend() == 'cpu' else 32, most)


def _task_draft(task: Task, problems: Any) -> Draft:
  """Returns the draft of a task for the answers to B problems (a leading axis B)."""

  def draft(rows, actions, num_actions, size):
    own = jax.tree.map(lambda x: x[rows], problems)
    return jax.vmap(lambda problem, a, n: task.draft(problem, a, n, size))(own, actions, num_actions)

  return draft


def _rewind(cache, num_tokens):
  return cache.replace(index=cache.index - num_tokens)


def _cache_lengths(num_prompt, usual_length, window, num_slots):
  """Returns the lengths that a cache takes on one after another, half of what is usual and the usual one, and the full
  one."""
  usual = min(num_prompt + usual_length + window, num_slots) if usual_length else num_slots
  half = max((num_prompt + usual) // 2, num_prompt - 1 + window)  # less would not take the first window
  half, usual, full = (-(-n // 32) * 32 for n in (half, usual, num_slots))
  return sorted({half, usual}), full


def _grow(episodes, length):
  cache = episodes.policy_state
  more = length - cache.mask.shape[1]
  keys = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]), cache.keys)
  values = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]), cache.values)
  cache = cache.replace(keys=keys, values=values, mask=jnp.pad(cache.mask, ((0, 0), (0, more))))
  return episodes.replace(policy_state=cache)


def _advance_while(decoder, episodes: Episodes, num_prompt: int, least: int) -> Episodes:
  """Advances episodes while more than `least` of them are active and the windows of all fit into the cache."""
  length = episodes.policy_state.mask.shape[1]

  def go_on(e):
    end = num_prompt - 1 + e.length + decoder.window
    return any_of_all(jnp.sum(e.active, dtype=jnp.int32) > least) & ~any_of_all(e.active & (end > length))

  return jax.lax.while_loop(go_on, lambda e: advance(decoder, e), episodes)


def _end_all(decoder, episodes: Episodes, num_prompt: int, length: int) -> Episodes:
  """Ends all episodes in a longer cache."""
  ended = _advance_while(decoder, _grow(episodes, length), num_prompt, 0)
  return ended.replace(policy_state=episodes.policy_state)  # no longer needed


def _end_few(decoder, episodes: Episodes, num_prompt: int, length: int, num: int) -> Episodes:
  """Ends the last `num` active episodes in arrays of their own, so that those that have ended cost nothing."""
  active = episodes.active
  before, behind = (jnp.cumsum(some, dtype=jnp.int32) - 1 for some in (active, ~active))
  rank = jnp.where(active, before, before[-1] + 1 + behind)  # the active ones first
  rows = jax.lax.argmax(rank[None] == jnp.arange(num, dtype=jnp.int32)[:, None], 1, jnp.int32)
  few = jax.tree.map(lambda x: x[rows] if x.ndim else x, episodes)
  few = _advance_while(decoder, _grow(few, length), num_prompt, 0)
  whole, few = (e.replace(policy_state=None, keys=None) for e in (episodes, few))
  return jax.tree.map(lambda x, y: x.at[rows].set(y), whole, few)
