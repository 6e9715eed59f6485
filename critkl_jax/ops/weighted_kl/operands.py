"""Operands of the linear operation, and functions that compute logits from them.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width; `block`, entries of a block of the
vocabulary.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.statistics import RULED_OUT, finite
from critkl_jax.pytree import PyTreeNode


class Settings(NamedTuple):
  """Static settings of the operation.

  Attributes:
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None: no cap.
    one_temperature: whether the certainty temperature equals the policy's temperature, which saves an exponential.
    axis_name: mesh axis over which the vocabulary is spread; None if it is not spread.
  """

  soft_cap: float | None = None
  one_temperature: bool = False
  axis_name: str | None = None


class Side(PyTreeNode):
  """Inputs of one model's output layer.

  Attributes:
    hidden: float `[R, D]`.
    embedding: float `[V, D]`.
    bias: float `[V]`, or None.
  """

  hidden: chex.Array
  embedding: chex.Array
  bias: chex.Array | None


class Operands(PyTreeNode):
  """The arrays of the operation; gradients go to `policy` alone.

  Attributes:
    policy: hidden states and embedding of the policy.
    reference: hidden states and embedding of the reference, which may have another width.
    actions: int32 `[R]` ids relative to the first vocabulary entry on this device.
    temperature: float32 `[]`.
    certainty_temperature: float32 `[]`.
  """

  policy: Side
  reference: Side
  actions: chex.Array
  temperature: chex.Array
  certainty_temperature: chex.Array


def dot(a: chex.Array, b: chex.Array, axes: tuple[int, int]) -> chex.Array:
  """Contracts two matrices over `axes` into float32; float32 inputs are multiplied at full precision."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def products(operands: Operands) -> tuple[chex.Array, chex.Array]:
  """Multiplies hidden states and embedding, float32 `[R, V]` for policy and reference."""
  return tuple(dot(side.hidden, side.embedding, (1, 1)) for side in (operands.policy, operands.reference))


def biased_and_capped(logits: chex.Array, bias: chex.Array | None, soft_cap: float | None) -> chex.Array:
  """Adds the bias `[block]` to float32 logits `[R, block]` and applies the soft cap."""
  if bias is not None:
    logits += bias.astype(jnp.float32)[None]
  if soft_cap is None:
    return logits
  return jnp.where(logits > -jnp.inf, soft_cap * jnp.tanh(logits / soft_cap), -jnp.inf)


def scaled(logits: chex.Array, ref_logits: chex.Array, temperature: chex.Array, certainty_temperature: chex.Array,
           one_temperature: bool) -> tuple[chex.Array, chex.Array, chex.Array | None]:
  """Divides logits by the temperatures; returns z, v and v_sure for `statistics.block_sums`."""
  logits, ref_logits = logits.astype(jnp.float32), ref_logits.astype(jnp.float32)
  v_sure = None if one_temperature else finite(ref_logits / certainty_temperature)
  return finite(logits / temperature), finite(ref_logits / temperature), v_sure


def raw_logits(operands: Operands, settings: Settings, found: tuple[chex.Array, chex.Array] | None = None
               ) -> tuple[chex.Array, chex.Array]:
  """Computes float32 logits `[R, V]` of policy and reference, not yet divided by a temperature.

  `found` holds precomputed `products`, or part of their rows; if it is None, all products are computed here.
  """
  return tuple(biased_and_capped(x, side.bias, settings.soft_cap) for x, side in zip(
      found or products(operands), (operands.policy, operands.reference)))


def block_logits(operands: Operands, settings: Settings, found: tuple[chex.Array, chex.Array] | None = None
                 ) -> tuple[chex.Array, chex.Array, chex.Array | None]:
  """Computes z, v and v_sure over the vocabulary of the operands, float32 `[R, V]` each; `found` as in `raw_logits`."""
  return scaled(*raw_logits(operands, settings, found), operands.temperature, operands.certainty_temperature,
                settings.one_temperature)


def through_scaling(gradient: chex.Array, z: chex.Array, operands: Operands, settings: Settings) -> chex.Array:
  """Backpropagates a gradient with respect to z through temperature and soft cap."""
  if settings.soft_cap is not None:
    share = jnp.where(z > RULED_OUT, z * operands.temperature / settings.soft_cap, 0.0)
    gradient = gradient * (1.0 - jnp.square(share))
  return gradient / operands.temperature


def add_rows(x: chex.Array, more: chex.Array, first: chex.Numeric) -> chex.Array:
  """Adds `more` to the rows of x from `first` on, summed in float32."""
  old = jax.lax.dynamic_slice_in_dim(x, first, more.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(x, (old.astype(jnp.float32) + more).astype(x.dtype), first, 0)


def varying_axes(x: chex.Array) -> frozenset[str]:
  """Returns the mesh axes over which an array varies inside `shard_map`; empty outside."""
  kind = jax.typeof(x)
  return kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying  # older and newer than jax 0.10


def spread_like(operands: Operands, tree: Any) -> Any:
  """Casts arrays to vary over all mesh axes of the operands; leaves them unchanged outside `shard_map`."""
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(operands)))

  def one(x):
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(one, tree)
