"""What the linear operation is given, in the form in which implementations take it, and the logits that follow."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax.ops.weighted_kl.statistics import RULED_OUT, finite


class Settings(NamedTuple):
  """What is fixed when a program is traced.

  Attributes:
    soft_cap: logits u become `soft_cap * tanh(u / soft_cap)`; None leaves them.
    one_temperature: whether the certainty is taken at the temperature of the policy, which saves an exponential.
    axis_name: mesh axis over which the vocabulary is spread; None if all of it is here.
  """

  soft_cap: float | None = None
  one_temperature: bool = False
  axis_name: str | None = None


@struct.dataclass
class Side:
  """One model's last layer.

  Attributes:
    hidden: float `[N, D]`.
    embedding: float `[V, D]`.
    bias: float `[V]`, or None.
  """

  hidden: chex.Array
  embedding: chex.Array
  bias: chex.Array | None


@struct.dataclass
class Operands:
  """The arrays of the operation; gradients go to `policy` alone.

  Attributes:
    policy: hidden states and embedding of the policy.
    reference: those of the reference; the width may be another.
    actions: int32 `[N]`, counted from the first entry of the vocabulary that is here.
    temperature: float32 `[]`.
    certainty_temperature: float32 `[]`.
  """

  policy: Side
  reference: Side
  actions: chex.Array
  temperature: chex.Array
  certainty_temperature: chex.Array


def dot(a: chex.Array, b: chex.Array, axes: tuple[int, int]) -> chex.Array:
  """Returns the float32 product of two matrices over `axes`; float32 arrays are not rounded on the way."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def products(operands: Operands) -> tuple[chex.Array, chex.Array]:
  """Returns the products of hidden states and embedding, float32 `[N, V]` for the policy and for the reference."""
  return tuple(dot(side.hidden, side.embedding, (1, 1)) for side in (operands.policy, operands.reference))


def biased_and_capped(logits: chex.Array, bias: chex.Array | None, soft_cap: float | None) -> chex.Array:
  """Returns float32 logits `[N, K]` with their bias `[K]` and under their soft cap."""
  if bias is not None:
    logits += bias.astype(jnp.float32)[None]
  if soft_cap is None:
    return logits
  return jnp.where(logits > -jnp.inf, soft_cap * jnp.tanh(logits / soft_cap), -jnp.inf)


def scaled(logits: chex.Array, ref_logits: chex.Array, temperature: chex.Array, certainty_temperature: chex.Array,
           one_temperature: bool) -> tuple[chex.Array, chex.Array, chex.Array | None]:
  """Returns z, v and v_sure, as `statistics.block_sums` takes them, of logits before any temperature."""
  logits, ref_logits = logits.astype(jnp.float32), ref_logits.astype(jnp.float32)
  v_sure = None if one_temperature else finite(ref_logits / certainty_temperature)
  return finite(logits / temperature), finite(ref_logits / temperature), v_sure


def raw_logits(operands: Operands, settings: Settings, found: tuple[chex.Array, chex.Array] | None = None
               ) -> tuple[chex.Array, chex.Array]:
  """Returns float32 logits `[K, V]` of policy and reference before any temperature, of some rows of `products`, or of
  all if none are given."""
  return tuple(biased_and_capped(x, side.bias, settings.soft_cap) for x, side in zip(
      found or products(operands), (operands.policy, operands.reference)))


def block_logits(operands: Operands, settings: Settings, found: tuple[chex.Array, chex.Array] | None = None
                 ) -> tuple[chex.Array, chex.Array, chex.Array | None]:
  """Returns z, v and v_sure of all of the vocabulary that is in the operands, float32 `[K, V]` each; `found` as in
  `raw_logits`."""
  return scaled(*raw_logits(operands, settings, found), operands.temperature, operands.certainty_temperature,
                settings.one_temperature)


def through_scaling(gradient: chex.Array, z: chex.Array, operands: Operands, settings: Settings) -> chex.Array:
  """Returns the gradient with respect to the logits before soft cap and temperature, of that with respect to z."""
  if settings.soft_cap is not None:
    share = jnp.where(z > RULED_OUT, z * operands.temperature / settings.soft_cap, 0.0)
    gradient = gradient * (1.0 - jnp.square(share))
  return gradient / operands.temperature


def add_rows(x: chex.Array, more: chex.Array, first: chex.Numeric) -> chex.Array:
  """Returns x `[M, ...]` with `more` `[K, ...]` added to its rows from `first` on, summed in float32."""
  old = jax.lax.dynamic_slice_in_dim(x, first, more.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(x, (old.astype(jnp.float32) + more).astype(x.dtype), first, 0)


def varying_axes(x: chex.Array) -> frozenset[str]:
  """Returns the mesh axes over which an array varies inside `shard_map`; none outside."""
  kind = jax.typeof(x)
  return kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying  # before and since jax 0.10


def spread_like(operands: Operands, tree: Any) -> Any:
  """Returns arrays that vary over the mesh axes over which any operand does; the same arrays outside `shard_map`."""
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(operands)))

  def one(x):
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(one, tree)
