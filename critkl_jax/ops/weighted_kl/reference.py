"""The meaning of the operation in plain jnp on whole logits, differentiated by JAX."""

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.statistics import LOG_PROB_FLOOR, RULED_OUT, Row, phi


def row_of_logits(z: chex.Array, v: chex.Array, v_sure: chex.Array | None, actions: chex.Array) -> Row:
  """Returns what the logits say of each token.

  Args:
    z: float32 `[N, V]` policy logits at its temperature, -inf replaced (`statistics.finite`).
    v: float32 `[N, V]` reference logits at the same temperature.
    v_sure: float32 `[N, V]` reference logits at the temperature of the certainty; None if it is the same.
    actions: int32 `[N]`.
  """
  log_partition = jax.nn.logsumexp(z, -1, keepdims=True)
  ref_log_partition = jax.nn.logsumexp(v, -1, keepdims=True)
  shift = log_partition - ref_log_partition
  log_p, ruled = z - log_partition, v <= RULED_OUT
  p = jnp.exp(log_p)
  log_ratio = jnp.where(ruled, log_p - LOG_PROB_FLOOR, jnp.where(ruled, 0.0, z - v) - shift)
  # sum p d = sum p (exp(-d) - 1 + d), since sum p exp(-d) = 1; the right side has no terms that cancel.
  near = jnp.all(jnp.abs(log_ratio) < 10.0, -1, keepdims=True)
  kl = jnp.sum(p * jnp.where(near, phi(jnp.where(near, log_ratio, 0.0)), log_ratio), -1, keepdims=True)
  sure = jax.nn.log_softmax(v if v_sure is None else v_sure)
  at_action = lambda x: jnp.take_along_axis(x, actions[:, None], -1)
  return Row(
      log_partition=log_partition, shift=shift, entropy=-jnp.sum(p * log_p, -1, keepdims=True), kl=kl,
      log_prob=at_action(log_p), ref_log_prob=jnp.maximum(at_action(v) - ref_log_partition, LOG_PROB_FLOOR),
      sure_entropy=-jnp.sum(jnp.exp(sure) * sure, -1, keepdims=True), sure_log_max=jnp.max(sure, -1, keepdims=True))
