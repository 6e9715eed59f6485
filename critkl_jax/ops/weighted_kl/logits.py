"""The operation on logits that are there already, its gradient written by hand."""

import functools

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.operands import scaled
from critkl_jax.ops.weighted_kl.reference import row_of_logits
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, logit_gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_row(one_temperature: bool, logits: chex.Array, ref_logits: chex.Array, actions: chex.Array,
              temperature: chex.Array, certainty_temperature: chex.Array) -> Row:
  """Returns what logits `[N, V]` say of each token; the arguments and `[N, 1]` arrays are all that a gradient keeps."""
  z, v, v_sure = scaled(logits, ref_logits, temperature, certainty_temperature, one_temperature)
  return row_of_logits(z, v, v_sure, actions)


def _forward(one_temperature, *arrays):
  row = fused_row(one_temperature, *arrays)
  return row, (arrays, row)


def _backward(one_temperature, saved, gradients):
  del one_temperature
  (logits, ref_logits, actions, temperature, certainty_temperature), row = saved
  z, v, _ = scaled(logits, ref_logits, temperature, certainty_temperature, True)
  is_action = jnp.arange(z.shape[1], dtype=jnp.int32)[None] == actions[:, None]
  gradient = logit_gradients(z, v, is_action, row, Cotangents.of(gradients)) / temperature
  return gradient.astype(logits.dtype), None, None, None, None


fused_row.defvjp(_forward, _backward)
