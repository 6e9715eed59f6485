"""Advantage estimators.

Letters: B episodes, T response tokens, G group size.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

_EPSILON = 1e-6


def gae(rewards: chex.Array, values: chex.Array, mask: chex.Array, discount: chex.Numeric = 1.0,
        gae_lambda: chex.Numeric = 0.95, final_values: chex.Array | None = None) -> tuple[chex.Array, chex.Array]:
  """Computes generalised advantage estimates and the critic's targets.

  `delta_t = r_t + discount v_{t+1} - v_t`, `advantage_t = delta_t + discount lambda advantage_{t+1}` (Schulman et al.,
  arXiv 1506.02438, equation 16). Tokens where the mask is false are skipped: t + 1 is the next unmasked token of the
  episode, so the results equal those of the episode without the masked tokens.

  Args:
    rewards: float `[..., T]` reward of each action.
    values: float `[..., T]` value of the state in which each action was taken.
    mask: bool `[..., T]` true at the tokens of the episode; it may have holes.
    discount: gamma, 0..1; may be traced.
    gae_lambda: lambda, 0..1; may be traced.
    final_values: float `[...]` value of the state after the last token: 0 if the episode ended, the critic's estimate
      if it was truncated. None: 0 everywhere.

  Returns:
    `(advantages, returns)`, float32 `[..., T]` each, 0 where the mask is false, without gradient;
    `returns = advantages + values`.

  Raises:
    AssertionError: if the shapes differ.
  """
  chex.assert_equal_shape([rewards, values, mask])
  mask = mask.astype(bool)
  rewards, values = (jnp.where(mask, jax.lax.stop_gradient(x), 0.0).astype(jnp.float32) for x in (rewards, values))
  start = jnp.zeros_like(jnp.sum(rewards, -1))
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


def group_relative(returns: chex.Array, group_size: int, *, scale: str = 'group', ddof: int = 0,
                   eps: float = _EPSILON) -> chex.Array:
  """Subtracts from each return the mean of its group, and divides by a standard deviation.

  `advantage = (return - mean) / (deviation + eps)` (Shao et al., arXiv 2402.03300, section 4.1.2, outcome supervision).
  A group of equal returns gets 0. By default the variance of a group has G in its denominator. With `ddof=1` it has
  G - 1, as in TRL and Tunix, and the advantages are smaller: by a factor of 1.155 at G = 4.

  Args:
    returns: float `[B]` return of each episode.
    group_size: G, a divisor of B, 2 or more; a group is G consecutive episodes.
    scale: the standard deviation that divides: of each `group`, of all returns of the `batch`, or `none` for no
      division (Liu et al., arXiv 2503.20783, section 3.2).
    ddof: 0 or 1, subtracted from the number of returns in the denominator of the variance.
    eps: added to the standard deviation.

  Returns:
    float32 `[B]`.

  Raises:
    ValueError: if the group size is less than 2 or does not divide B, or `scale` or `ddof` is unknown.
    AssertionError: if the returns do not have rank 1.
  """
  groups = _groups(returns, group_size)
  if scale not in ('group', 'batch', 'none'):
    raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}.")
  if ddof not in (0, 1):
    raise ValueError(f'ddof: expected 0 or 1, got {ddof}.')
  centred = groups - jnp.mean(groups, -1, keepdims=True)
  if scale == 'none':
    return centred.reshape(-1)
  spread = jnp.std(groups, -1 if scale == 'group' else None, keepdims=True, ddof=ddof)
  return (centred / (spread + eps)).reshape(-1)


def leave_one_out(returns: chex.Array, group_size: int) -> chex.Array:
  """Subtracts from each return the mean of the other returns of its group.

  Ahmadian et al., arXiv 2402.14740, section 3.

  Args:
    returns: float `[B]` return of each episode.
    group_size: G, a divisor of B, 2 or more; a group is G consecutive episodes.

  Returns:
    float32 `[B]`.

  Raises:
    ValueError: if the group size is less than 2 or does not divide B.
    AssertionError: if the returns do not have rank 1.
  """
  groups = _groups(returns, group_size)
  return (group_size / (group_size - 1) * (groups - jnp.mean(groups, -1, keepdims=True))).reshape(-1)


def whiten(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Standardizes `x` to mean 0 and variance 1 over the entries where `mask` is true; the others become 0.

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


def _of_returns(estimate):
  """Converts a function `(returns [B], group_size) -> advantages [B]` into an entry of `ADVANTAGES`."""

  def estimator(rewards, values, mask, *, group_size, discount, gae_lambda, final_values):
    episode = estimate(jnp.sum(rewards, -1), group_size)
    returns = jnp.where(mask, jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1], 0.0)
    return jnp.where(mask, episode[:, None], 0.0), returns

  return estimator


def _of_critic(rewards, values, mask, *, group_size, discount, gae_lambda, final_values):
  return gae(rewards, values, mask, discount, gae_lambda, final_values)


# Name -> (rewards [B, T], values [B, T], mask [B, T], group_size=, discount=, gae_lambda=, final_values=) ->
# (advantages [B, T], returns [B, T]). Without a critic the returns are rewards-to-go.
ADVANTAGES: dict[str, Callable[..., tuple[chex.Array, chex.Array]]] = {
    'group_relative': _of_returns(group_relative),
    'leave_one_out': _of_returns(leave_one_out),
    'gae': _of_critic,
}
WITH_CRITIC = ('gae',)  # estimators that need a critic; the others compare the episodes of a group


def _backward(fn, start, *arrays):
  """Scans arrays `[..., T]` from the last token to the first and stacks the outputs as `[..., T]`."""
  found = jax.lax.scan(fn, start, tuple(jnp.moveaxis(x, -1, 0) for x in arrays), reverse=True)[1]
  return jnp.moveaxis(found, 0, -1)


def _groups(returns, group_size):
  returns = jnp.asarray(returns, jnp.float32)  # rewards of a Python function may be a list
  chex.assert_rank(returns, 1)
  if group_size < 2 or returns.size % group_size:
    raise ValueError(f'group_size: expected a divisor of {returns.size} episodes, 2 or more; got {group_size}.')
  return returns.reshape(-1, group_size)
