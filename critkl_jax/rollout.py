"""Sampling: a prompt is read once, then a loop on the device writes one token for every episode at a time."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax.gpt2 import GPT2, init_cache
from critkl_jax.records import Rollout

# (tokens [B, T], mask [B, T], policy state) -> (logits [B, T, V], values [B, T], policy state)
Policy = Callable[[chex.Array, chex.Array, Any], tuple[chex.Array, chex.Array, Any]]


def generate(policy: Policy, policy_state: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
             max_new_tokens: int, stop: chex.Array, temperature: chex.Numeric = 1.0, top_p: float = 1.0,
             greedy: bool = False, pad_id: int = 0) -> Rollout:
  """Samples a response to each prompt, in one loop that ends when all episodes have ended.

  The noise of a token is a function of the key, the episode's index and the token's position in the response alone, so
  the same key gives the same tokens however many other episodes there are to wait for.

  Args:
    policy: called once with the whole prompt, then with one token an episode: `(tokens [B, T], mask [B, T], state) ->
      (logits [B, T, V], values [B, T], state)`; what it must remember it keeps in its state, a PyTree of arrays whose
      shapes do not change. Of the first call only the outputs at the last column are used.
    policy_state: the state before the prompt, for example an empty `KVCache`.
    prompt: int32 `[B, Q]` prompts, padded on the left.
    prompt_mask: bool `[B, Q]` true at the tokens of the prompts.
    key: PRNG key, consumed.
    max_new_tokens: T, at which an episode is cut.
    stop: int32 `[S, C]` automaton that ends an episode, see `tasks.task.stop_after`.
    temperature: logits are divided by it; may be traced.
    top_p: tokens outside the smallest set of at least this probability are not drawn; 1 draws from all.
    greedy: whether the most probable token is taken instead of a draw.
    pad_id: what stands in `actions` after the end of an episode.

  Returns:
    A `Rollout`. Its log-probabilities are those of the policy at this temperature, before `top_p` cuts it.

  Raises:
    ValueError: if max_new_tokens is less than 1 or top_p is not in (0, 1].
    AssertionError: if the shapes of prompt and mask differ.
  """
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens: expected 1 or more, got {max_new_tokens}.')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p: expected more than 0 and at most 1, got {top_p}.')
  chex.assert_rank([prompt, prompt_mask], 2)
  chex.assert_equal_shape([prompt, prompt_mask])
  batch_size, stop = prompt.shape[0], jnp.asarray(stop)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))

  def choose(t, logits):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    if greedy:
      action = jnp.argmax(log_probs, -1)
    else:
      draw = jax.vmap(lambda k, row: jax.random.categorical(jax.random.fold_in(k, t), row))
      action = draw(keys, _keep_top_p(log_probs, top_p))
    return action.astype(jnp.int32), jnp.take_along_axis(log_probs, action[:, None], -1)[:, 0]

  def write(t, logits, values, active, stop_state, rollout):
    action, log_prob = choose(t, logits)
    log_prob, values = (jnp.where(active, x.astype(jnp.float32), 0.0) for x in (log_prob, values))
    column = {'actions': jnp.where(active, action, pad_id), 'mask': active, 'log_probs': log_prob, 'values': values}
    rollout = rollout.replace(**{
        name: jax.lax.dynamic_update_slice_in_dim(getattr(rollout, name), value[:, None], t, axis=1)
        for name, value in column.items()})
    next_state = stop[jnp.minimum(stop_state, stop.shape[0] - 1), jnp.minimum(action, stop.shape[1] - 1)]
    stop_state = jnp.where(active, next_state, stop_state)
    return column['actions'], active & (stop_state < stop.shape[0]), stop_state, rollout

  def advance(carry):
    t, tokens, active, stop_state, rollout, state = carry
    logits, values, state = policy(tokens[:, None], active[:, None], state)
    written = write(t, logits[:, 0], values[:, 0], active, stop_state, rollout)
    return (t + 1, *written, state)

  shape = (batch_size, max_new_tokens)
  rollout = Rollout(prompt=prompt, prompt_mask=prompt_mask, actions=jnp.full(shape, pad_id, jnp.int32),
                    mask=jnp.zeros(shape, bool), log_probs=jnp.zeros(shape), values=jnp.zeros(shape))
  logits, values, policy_state = policy(prompt, prompt_mask, policy_state)
  first = write(0, logits[:, -1], values[:, -1], jnp.ones(batch_size, bool), jnp.zeros(batch_size, jnp.int32), rollout)
  carry = (jnp.int32(1), *first, policy_state)
  carry = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & jnp.any(c[2]), advance, carry)
  return carry[4]


def gpt2_policy(model: GPT2, params: Any) -> Policy:
  """Returns a GPT-2 as a policy for `generate`.

  Args:
    model: the network.
    params: its parameters.

  Returns:
    A `Policy` whose state is a `KVCache` with a slot for each token of prompt and response.
  """

  def policy(tokens, mask, cache):
    output = model.apply({'params': params}, tokens, mask, cache)
    return output.logits, output.values, output.cache

  return policy


def gpt2_generate(model: GPT2, params: Any, prompt: chex.Array, prompt_mask: chex.Array, key: chex.PRNGKey, *,
                  max_new_tokens: int, **options: Any) -> Rollout:
  """Samples responses from a GPT-2 with a key-value cache; arguments and results are those of `generate`.

  Raises:
    ValueError: if prompt and response do not fit into the model's context.
  """
  cache = init_cache(model.config, prompt.shape[0], prompt.shape[1] + max_new_tokens)
  return generate(
      gpt2_policy(model, params), cache, prompt, prompt_mask, key, max_new_tokens=max_new_tokens, **options)


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


def _read(model, params, rollout):
  tokens = jnp.concatenate([rollout.prompt, rollout.actions[:, :-1]], 1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask[:, :-1]], 1)
  return model.apply({'params': params}, tokens, mask), rollout.prompt.shape[1] - 1


def _keep_top_p(log_probs, top_p):
  """Sets log-probabilities `[B, V]` outside the smallest set of probability `top_p` or more to -inf."""
  if top_p == 1:
    return log_probs
  descending = -jnp.sort(-log_probs, -1)
  before = jnp.cumsum(jnp.exp(descending), -1) - jnp.exp(descending)
  threshold = jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
  return jnp.where(log_probs >= threshold, log_probs, -jnp.inf)
