"""Advantages: what an action was worth beyond what was expected."""

import chex
import jax
import jax.numpy as jnp

_EPSILON = 1e-6


def gae(rewards: chex.Array, values: chex.Array, mask: chex.Array, discount: chex.Numeric = 1.0,
        gae_lambda: chex.Numeric = 0.95, final_values: chex.Array | None = None) -> tuple[chex.Array, chex.Array]:
  """Returns generalised advantage estimates and the critic's targets.

  `delta_t = r_t + discount v_{t+1} - v_t`, `A_t = delta_t + discount lambda A_{t+1}` (Schulman et al., arXiv
  1506.02438, equation 16). Tokens where the mask is false are skipped, wherever they stand: t + 1 is the next token of
  the episode, so the results are those of the episode without them.

  Args:
    rewards: float `[..., T]` reward of each action.
    values: float `[..., T]` value of the state in which each action was taken.
    mask: bool `[..., T]` true at the tokens of the episode; it may have holes.
    discount: gamma, 0..1; may be traced.
    gae_lambda: lambda, 0..1; may be traced.
    final_values: float `[...]` value of the state after the last token: 0 where the episode ended, the critic's where
      it was cut and might have gone on. None for 0 everywhere.

  Returns:
    `(advantages, returns)`, float32 `[..., T]`, both 0 where the mask is false, without gradient;
    `returns = advantages + values`.

  Raises:
    AssertionError: if the shapes differ.
  """
  chex.assert_equal_shape([rewards, values, mask])
  mask = mask.astype(bool)
  rewards, values = (jnp.where(mask, jax.lax.stop_gradient(x), 0.0).astype(jnp.float32) for x in (rewards, values))
  start = jnp.zeros(rewards.shape[:-1], jnp.float32)
  final_values = start if final_values is None else jax.lax.stop_gradient(final_values).astype(jnp.float32)
  chex.assert_equal_shape([start, final_values])

  def successor(next_value, token):
    value, counts = token
    return jnp.where(counts, value, next_value), next_value

  next_values = _backward(successor, final_values, values, mask)
  deltas = jnp.where(mask, rewards + discount * next_values - values, 0.0)
  decays = jnp.where(mask, jnp.float32(discount * gae_lambda), 1.0)

  def backward(advantage, token):
    delta, decay = token
    advantage = delta + decay * advantage
    return advantage, advantage

  advantages = jnp.where(mask, _backward(backward, start, deltas, decays), 0.0)
  return advantages, advantages + values


def group_relative(returns: chex.Array, group_size: int) -> chex.Array:
  """Returns each return minus its group's mean, over the group's standard deviation.

  Shao et al., arXiv 2402.03300, section 4.1.2 (outcome supervision). A group whose returns are equal gets 0.

  Args:
    returns: float `[B]` return of each episode.
    group_size: G, a divisor of B; a group is G episodes in a row.

  Returns:
    float32 `[B]`.
  """
  groups = _groups(returns, group_size)
  centred = groups - jnp.mean(groups, -1, keepdims=True)
  return (centred / (jnp.std(groups, -1, keepdims=True) + _EPSILON)).reshape(-1)


def leave_one_out(returns: chex.Array, group_size: int) -> chex.Array:
  """Returns each return minus the mean of the others of its group (Ahmadian et al., arXiv 2402.14740, section 3).

  Args:
    returns: float `[B]` return of each episode.
    group_size: G, a divisor of B, 2 or more; a group is G episodes in a row.

  Returns:
    float32 `[B]`.
  """
  groups = _groups(returns, group_size)
  return (group_size / (group_size - 1) * (groups - jnp.mean(groups, -1, keepdims=True))).reshape(-1)


def whiten(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns `x` brought to mean 0 and variance 1 over the entries where `mask` is true; 0 elsewhere.

  Args:
    x: float `[...]`.
    mask: bool `[...]`.

  Returns:
    float32 `[...]`.
  """
  mask = mask.astype(bool)
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  centred = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
  return centred * jax.lax.rsqrt(jnp.sum(jnp.square(centred)) / count + _EPSILON)


def _backward(fn, start, *arrays):
  """Scans arrays `[..., T]` from the last token to the first and stacks the outputs as `[..., T]`."""
  found = jax.lax.scan(fn, start, tuple(jnp.moveaxis(x, -1, 0) for x in arrays), reverse=True)[1]
  return jnp.moveaxis(found, 0, -1)


def _groups(returns, group_size):
  chex.assert_rank(returns, 1)
  if group_size < 2 or returns.size % group_size:
    raise ValueError(f'group_size: expected a divisor of {returns.size} episodes, 2 or more; got {group_size}.')
  return returns.astype(jnp.float32).reshape(-1, group_size)
