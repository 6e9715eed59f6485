"""Fused implementation on given logits, with a hand-written gradient. V is the vocabulary."""

import functools

import chex
import jax

from critkl_jax.ops.weighted_kl.operands import scaled
from critkl_jax.ops.weighted_kl.plain import is_action, row_of_logits
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, logit_gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_row(one_temperature: bool, logits: chex.Array, ref_logits: chex.Array, actions: chex.Array,
              temperature: chex.Array, certainty_temperature: chex.Array) -> Row:
  """Computes the statistics of each token from logits `[..., V]`; residuals are the arguments and `[..., 1]` arrays."""
  z, v, v_sure = scaled(logits, ref_logits, temperature, certainty_temperature, one_temperature)
  return row_of_logits(z, v, v_sure, actions)


def _forward(one_temperature, *arrays):
  row = fused_row(one_temperature, *arrays)
  return row, (arrays, row)


def _backward(one_temperature, saved, gradients):
  del one_temperature
  (logits, ref_logits, actions, temperature, certainty_temperature), row = saved
  z, v, _ = scaled(logits, ref_logits, temperature, certainty_temperature, True)
  gradient = logit_gradients(z, v, is_action(z, actions), row, Cotangents.of(gradients)) / temperature
  return gradient.astype(logits.dtype), None, None, None, None


fused_row.defvjp(_forward, _backward)
