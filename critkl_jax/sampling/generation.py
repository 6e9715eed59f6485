"""Generation: reads each prompt once, then samples all responses in one loop on the device, each at its own pace."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, as_language_model, logits_of
from critkl_jax.records import Rollout
from critkl_jax.sampling.decoding import (
  Decoder,
  Episodes,
  Policy,
  Rewind,
  any_across_vmap,
  finish,
  go_on,
  sample_window,
  start,
)
from critkl_jax.tasks.drafts import Draft, prompt_lookup
from critkl_jax.tasks.task import Task

_LOGITS_IN_WINDOW = 2**26  # 256 MiB


def generate(policy: Policy, policy_state: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
             max_new_tokens: int, stop: chex.Array, temperature: chex.Numeric = 1.0, top_p: float = 1.0,
             greedy: bool = False, pad_id: int = 0, window: int = 1, draft: Draft | None = None,
             rewind: Rewind | None = None) -> Rollout:
  """Samples a response to each prompt in one loop, until all episodes have ended.

  The noise of a token is a function of the key, the episode's index and the token's position in the response alone, so
  the same key gives the same tokens with any draft and any number of other episodes.

  Args:
    policy: `(tokens [B, W], mask [B, W], state) -> (logits [B, W, V], values [B, W], state)`. The first call reads the
      prompt without its last column, and only the new state is used; each further call reads a window. The state is a
      PyTree of arrays of constant shapes and holds all that the policy must remember.
    policy_state: the state before the prompt, for example an empty cache.
    prompt: int32 `[B, Q]` prompts, padded on the left.
    prompt_mask: bool `[B, Q]` true at the tokens of the prompts; the last column is all true.
    key: PRNG key, consumed.
    max_new_tokens: T, at which an episode is cut.
    stop: int32 `[num_states, num_columns]` automaton that ends an episode, see `tasks.task.stop_after`.
    temperature: logits are divided by it; may be traced.
    top_p: tokens outside the smallest set of at least this probability are not drawn; 1 draws from all.
    greedy: whether the most probable token is taken instead of a sample.
    pad_id: fills `actions` after the end of an episode.
    window: W, tokens that the policy reads at a time; above 1 decoding is speculative.
    draft: `(rows [B], actions [B, T + W], num_actions [B], W - 1) -> int32 [B, W - 1]`: guesses of the tokens after the
      first `num_actions` of the response to prompt `rows[b]`; -1 for no guess. A draft changes the speed of the loop
      and the rounding of the logits, nothing else.
    rewind: `(state, n [B]) -> state` without the last n tokens of each episode; n = W for an ended episode. The state
      needs room for W - 1 tokens beyond prompt and response.

  Returns:
    A `Rollout`. Log-probabilities are the policy's at this temperature, before the cut by `top_p`. Under `jax.jit`,
    log-probabilities and values of a prompt that is not padded on the left are NaN.

  Raises:
    ValueError: if a prompt is not padded on the left (outside `jax.jit`), max_new_tokens or window is less than 1,
      top_p is not in (0, 1], or a window above 1 comes without draft and rewind.
    AssertionError: if the shapes of prompt and mask differ or do not have rank 2.
  """
  decoder = Decoder(
      policy=policy, stop=jnp.asarray(stop), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
      greedy=greedy, pad_id=pad_id, window=window, draft=draft, rewind=rewind)
  episodes = start(decoder, policy_state, prompt, prompt_mask, key)
  episodes = jax.lax.while_loop(lambda e: any_across_vmap(e.active), lambda e: sample_window(decoder, e), episodes)
  return finish(decoder, episodes, prompt, prompt_mask)


def cached_policy(model: LanguageModel, params: Any) -> Policy:
  """Makes a policy for `generate` from a model; the policy's state is the model's cache.

  Args:
    model: the model.
    params: its parameters.
  """
  params = model.prepare(params)

  def policy(tokens, mask, cache):
    tokens = jnp.minimum(tokens, model.vocab_size - 1)  # an id outside the vocabulary would give NaN
    output = model.apply(params, tokens, mask, cache)
    return logits_of(output.hidden, model.output_head(params)), output.values, output.cache

  return policy


def model_generate(model: LanguageModel, params: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
                   max_new_tokens: int, stop: chex.Array, usual_length: int = 0, method: str = 'auto', window: int = 0,
                   draft: Draft | None = None, **options: Any) -> Rollout:
  """Samples responses from a model, in a cache that grows with the longest episode.

  Args:
    model: a `LanguageModel`, or a module that `as_language_model` converts.
    params: its parameters.
    prompt: as in `generate`.
    prompt_mask: as in `generate`.
    key: PRNG key, consumed.
    max_new_tokens: T, at which an episode is cut.
    stop: as in `generate`.
    usual_length: length that few responses exceed; the cache is longer only if a response is. 0 if not known.
    method: `cached` reads one token at a time, `speculative` a window; `auto` picks, see `pick_method`.
    window: W of `speculative`. 0 picks 16 on a CPU, where the time grows with the number of tokens, and 32 elsewhere,
      where it grows with the number of calls; fewer if the logits of a window would take more than 256 MiB.
    draft: as in `generate`; None for `prompt_lookup`.
    **options: `temperature`, `top_p`, `greedy` and `pad_id`, as in `generate`.

  Returns:
    A `Rollout`.

  Raises:
    ValueError: if the model has no cache to sample with, prompt and response do not fit into its context, the method is
      unknown, usual_length is negative, or as `generate`.
    AssertionError: as `generate`.
  """
  model, num_slots = _check_caches(model), prompt.shape[1] + max_new_tokens
  if num_slots > model.context_length:
    raise ValueError(f'max_new_tokens: {num_slots} positions do not fit into a context of {model.context_length}.')
  method = pick_method(draft is not None) if method == 'auto' else method
  if method not in ('cached', 'speculative'):
    raise ValueError(f"method: expected 'auto', 'cached' or 'speculative', got {method!r}.")
  on_cpu = jax.default_backend() == 'cpu'
  if usual_length < 0:
    raise ValueError(f'usual_length: expected 0 or more, got {usual_length}.')
  window = 1 if method == 'cached' else min(window or _usual_window(model, prompt.shape[0]), max(max_new_tokens, 1))
  decoder = Decoder(
      policy=cached_policy(model, params), max_new_tokens=max_new_tokens, window=window, rewind=model.rewind,
      draft=draft or prompt_lookup(prompt, prompt_mask), stop=jnp.asarray(stop), **options)

  num_prompt, num_slots = prompt.shape[1], num_slots + window - 1
  lengths, full = _cache_lengths(num_prompt, usual_length, window, num_slots)
  if not on_cpu:  # on accelerators an empty loop is free, but the branch below copies all parameters
    lengths = sorted({*lengths, full})
  cache = model.init_cache(prompt.shape[0], lengths[0], window == 1)
  episodes = start(decoder, cache, prompt, prompt_mask, key)
  few = prompt.shape[0] // 8 if on_cpu and sharding.axis_size('data') == 1 else 0
  grow = functools.partial(_grow, model)
  for length in lengths:
    episodes = _advance_while(decoder, grow(episodes, length), num_prompt, few, length)
  if full > lengths[-1]:
    many_left = any_across_vmap(jnp.sum(episodes.active, dtype=jnp.int32) > few)
    episodes = jax.lax.cond(many_left, lambda e: _end_all(decoder, grow, e, num_prompt, full), lambda e: e, episodes)
  if few:
    episodes = _end_few(decoder, grow, episodes, num_prompt, full, few)
  return finish(decoder, episodes, prompt, prompt_mask)


def respond(model: LanguageModel, params: Any, task: Task, problems: Any, key: chex.PRNGKey, **options: Any) -> Rollout:
  """Samples a response to each of B problems of a task, with the task's draft if it has one.

  Args:
    model: the model.
    params: its parameters.
    task: gives prompts, lengths, the stop automaton and the draft.
    problems: PyTree of arrays with a leading axis B.
    key: PRNG key, consumed.
    **options: further arguments of `model_generate`.

  Returns:
    A `Rollout`.

  Raises:
    ValueError: as `model_generate`.
  """
  prompt = jax.vmap(task.prompt)(problems)
  draft = _task_draft(task, problems) if task.draft else None
  return model_generate(
      model, params, prompt.tokens, prompt.mask, key, max_new_tokens=task.response_length, stop=task.stop,
      usual_length=task.solution_length, pad_id=task.tokenizer.pad_id, draft=draft, **options)


def respond_from(model: LanguageModel, params: Any, task: Task, problems: Any, rollout: Rollout, position: chex.Array,
                 token: chex.Array, key: chex.PRNGKey, window: int = 0, **options: Any) -> Rollout:
  """Resamples the rest of each response after `position` kept tokens and the given `token`.

  Args:
    model: the model.
    params: its parameters.
    task: gives lengths, the stop automaton and the draft.
    problems: PyTree of arrays with a leading axis B.
    rollout: B responses of T tokens to these problems.
    position: int32 `[B]` number of kept tokens, less than T.
    token: int32 `[B]` the token at `position`.
    key: PRNG key, consumed.
    window: as in `model_generate`; 1 if the task has no draft.
    **options: `temperature`, `top_p` and `greedy`, as in `generate`.

  Returns:
    A `Rollout` of B episodes. Kept tokens have the log-probabilities and values of `rollout`; at `token` both are 0.

  Raises:
    ValueError: if the model has no cache to sample with, or prompt and response do not fit into its context.
  """
  model, num_prompt, num_tokens = _check_caches(model), rollout.prompt.shape[1], rollout.actions.shape[1]
  if num_prompt + num_tokens > model.context_length:
    raise ValueError(f'rollout: {num_prompt + num_tokens} positions do not fit into a context of '
                     f'{model.context_length}.')
  window = min(window or _usual_window(model, rollout.prompt.shape[0]), num_tokens) if task.draft else 1
  decoder = Decoder(
      policy=cached_policy(model, params), stop=jnp.asarray(task.stop), max_new_tokens=num_tokens, window=window,
      draft=_task_draft(task, problems) if task.draft else None, rewind=model.rewind, pad_id=task.tokenizer.pad_id,
      **options)
  cache = model.init_cache(rollout.prompt.shape[0], num_prompt + num_tokens + window, False)
  _, _, cache = decoder.policy(jnp.concatenate([rollout.prompt, rollout.actions[:, :-1]], 1),
                               jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], 1), cache)
  cache = model.rewind(cache, num_tokens - 1 - position.astype(jnp.int32))
  episodes = go_on(decoder, cache, rollout, position, token, key)
  episodes = jax.lax.while_loop(lambda e: any_across_vmap(e.active), lambda e: sample_window(decoder, e), episodes)
  return finish(decoder, episodes, rollout.prompt, rollout.prompt_mask)


def pick_method(has_draft: bool) -> str:
  """Picks the method for `auto`: `speculative` with a draft, `cached` without.

  Without a draft, the many wrong guesses of a prompt lookup cost a CPU more than they save; accelerators have not been
  measured.
  """
  return 'speculative' if has_draft else 'cached'


def _check_caches(model):
  """Returns the `LanguageModel`; raises ValueError if it has no cache to sample with."""
  model = as_language_model(model)
  if None in (model.init_cache, model.rewind, model.grow):
    raise ValueError(f'model: {model.name!r} needs init_cache, rewind and grow to sample; `generate` takes any policy.')
  return model


def _usual_window(model, batch_size):
  """Returns the default W, as `model_generate` describes it."""
  most = max(_LOGITS_IN_WINDOW // (batch_size * model.vocab_size), 1)
  return min(16 if jax.default_backend() == 'cpu' else 32, most)


def _task_draft(task: Task, problems: Any) -> Draft:
  """Converts the task's draft, of one problem, into a `Draft` of problems with a leading axis B."""

  def draft(rows, actions, num_actions, size):
    own = jax.tree.map(lambda x: x[rows], problems)
    return jax.vmap(lambda problem, a, n: task.draft(problem, a, n, size))(own, actions, num_actions)

  return draft


def _cache_lengths(num_prompt, usual_length, window, num_slots):
  """Returns the lengths to which the cache grows in turn, and its full length, all multiples of 32.

  The first holds half of the usual response, the second all of it.
  """
  usual = min(num_prompt + usual_length + window, num_slots) if usual_length else num_slots
  half = max((num_prompt + usual) // 2, num_prompt - 1 + window)  # room for the first window
  half, usual, full = (-(-n // 32) * 32 for n in (half, usual, num_slots))
  return sorted({half, usual}), full


def _grow(model, episodes, length):
  return episodes.replace(policy_state=model.grow(episodes.policy_state, length))


def _advance_while(decoder, episodes: Episodes, num_prompt: int, least: int, length: int) -> Episodes:
  """Advances episodes while more than `least` are active and all their windows fit into a cache of `length`."""

  def continues(e):
    end = num_prompt - 1 + e.length + decoder.window
    return any_across_vmap(jnp.sum(e.active, dtype=jnp.int32) > least) & ~any_across_vmap(e.active & (end > length))

  return jax.lax.while_loop(continues, lambda e: sample_window(decoder, e), episodes)


def _end_all(decoder, grow, episodes: Episodes, num_prompt: int, length: int) -> Episodes:
  """Advances all episodes to their end, in a longer cache."""
  ended = _advance_while(decoder, grow(episodes, length), num_prompt, 0, length)
  return ended.replace(policy_state=episodes.policy_state)  # not needed again; shapes stay the same


def _end_few(decoder, grow, episodes: Episodes, num_prompt: int, length: int, num: int) -> Episodes:
  """Advances the last `num` active episodes to their end in smaller arrays, so that ended episodes cost nothing."""
  active = episodes.active
  before, behind = (jnp.cumsum(flags, dtype=jnp.int32) - 1 for flags in (active, ~active))
  rank = jnp.where(active, before, before[-1] + 1 + behind)  # active episodes first
  rows = jax.lax.argmax(rank[None] == jnp.arange(num, dtype=jnp.int32)[:, None], 1, jnp.int32)
  few = jax.tree.map(lambda x: x[rows] if x.ndim else x, episodes)
  few = _advance_while(decoder, grow(few, length), num_prompt, 0, length)
  whole, few = (e.replace(policy_state=None, keys=None) for e in (episodes, few))
  return jax.tree.map(lambda x, y: x.at[rows].set(y), whole, few)
