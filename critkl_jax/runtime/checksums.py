"""Computes checksums of arrays, which TensorStore does not store."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def array_checksums(tree: Any) -> dict[str, int]:
  """Returns the checksum of each array of a PyTree, by its path, wherever the array is placed.

  `sum_i (2 i + 1) bits_i mod 2^32` over the elements' bits: a change of any single element changes the checksum.
  """
  return {jax.tree_util.keystr(key, simple=True, separator='/'): _checksum(x)
          for key, x in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(x) -> int:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return int(jax.jit(_spread_checksum, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x))
  bits = np.ascontiguousarray(x).reshape(-1)
  bits = bits.view(f'u{bits.dtype.itemsize}').astype(np.uint32)
  return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


def _spread_checksum(x):
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  index, size = jnp.uint32(0), 1
  for axis in reversed(range(x.ndim)):
    index, size = index + jnp.uint32(size) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis), size * x.shape[axis]
  return jnp.sum(bits * (jnp.uint32(2) * index + jnp.uint32(1)), dtype=jnp.uint32)
