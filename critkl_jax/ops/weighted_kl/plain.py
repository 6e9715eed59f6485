"""Plain implementation: jnp on whole logits, differentiated by JAX. It defines the operation. V is the vocabulary."""

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.meshes import compiler_partitions, is_spread
from critkl_jax.ops.weighted_kl.statistics import (
    LOG_PROB_FLOOR,
    MINUS_INFINITY,
    RULED_OUT,
    Row,
    anchor_of,
    centred_difference,
    phi,
)


def row_of_logits(z: chex.Array, v: chex.Array, v_sure: chex.Array | None, actions: chex.Array) -> Row:
  """Computes the statistics of each token from logits.

  Args:
    z: float32 `[..., V]` policy logits divided by the temperature, -inf replaced (`statistics.finite`).
    v: float32 `[..., V]` reference logits at the same temperature.
    v_sure: float32 `[..., V]` reference logits at the certainty temperature; None if the temperatures are equal.
    actions: int32 `[...]`.

  Returns:
    A `Row` of float32 `[..., 1]`.
  """
  ruled = v <= RULED_OUT
  peak, ref_peak = (jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)) for x in (z, v))
  above, ref_above = z - peak, v - ref_peak
  log_sum, ref_log_sum = (jax.nn.logsumexp(x, -1, keepdims=True) for x in (above, ref_above))
  ref_at_peak = jax.lax.stop_gradient(jnp.max(jnp.where(above == 0, v, MINUS_INFINITY), -1, keepdims=True))
  centre = peak - ref_peak
  # The anchor is the most probable token only if its probability exceeds 1/2; a less probable token may have a t that
  # is far from the t of the others.
  anchor = jnp.where(log_sum < jnp.log(2.0), anchor_of(peak, ref_at_peak, centre), centre)
  anchor_ratio = (ref_log_sum - log_sum) - centred_difference(peak, ref_peak, anchor)  # a - Delta
  log_p, log_q = above - log_sum, ref_above - ref_log_sum
  p = jnp.exp(log_p)
  t = jnp.where(ruled, log_p - LOG_PROB_FLOOR - anchor_ratio,
                centred_difference(z, jnp.where(ruled, 0.0, v), anchor))
  log_ratio = t + anchor_ratio
  mean_t = jnp.sum(p * t, -1, keepdims=True)
  # sum p d = sum p (exp(-d) - 1 + d), since sum p exp(-d) = 1; the terms of the right side do not cancel.
  near = jnp.all(jnp.where(ruled, p == 0, log_ratio > -10.0), -1, keepdims=True)
  near_kl = jnp.sum(p * phi(jnp.where(near & ~ruled, log_ratio, 0.0)), -1, keepdims=True)
  sure = jax.nn.log_softmax(v if v_sure is None else v_sure)
  log_prob, ref_log_prob = (at_action(x, actions) for x in (log_p, log_q))
  return Row(
      peak=peak, log_sum=log_sum, anchor=anchor, mean_t=mean_t, entropy=-jnp.sum(p * log_p, -1, keepdims=True),
      kl=jnp.where(near, near_kl, mean_t + anchor_ratio), log_prob=log_prob,
      ref_log_prob=jnp.maximum(ref_log_prob, LOG_PROB_FLOOR),
      sure_entropy=-jnp.sum(jnp.exp(sure) * sure, -1, keepdims=True), sure_log_max=jnp.max(sure, -1, keepdims=True))


def at_action(x: chex.Array, actions: chex.Array) -> chex.Array:
  """Returns the entry `[..., 1]` of `x` `[..., V]` at each action `[...]`, without gathering a spread vocabulary."""
  if is_spread(x) or compiler_partitions():
    return jnp.sum(jnp.where(is_action(x, actions), x, 0.0), -1, keepdims=True)
  return jnp.take_along_axis(x, actions[..., None], -1)


def is_action(x: chex.Array, actions: chex.Array) -> chex.Array:
  """Returns bool `[..., V]`, true at each action `[...]`, for `x` `[..., V]`."""
  ids = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape(*(1,) * actions.ndim, -1)
  return ids == actions[..., None].astype(jnp.int32)
