"""The key-value cache of a transformer: its record, and functions that write, rewind and grow it.

Letters: B episodes, T new tokens, S slots of the cache, H heads, E width of a head, L layers.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax import sharding


@struct.dataclass
class KVCache:
  """Keys and values of the tokens seen so far.

  Attributes:
    keys: L arrays `[B, H, E, S]`, the layout that a decoding step multiplies without a transposition; with
      `scan_layers` one array `[B, L, H, E, S]`.
    values: L arrays `[B, H, S, E]`; with `scan_layers` one array `[B, L, H, S, E]`.
    mask: bool `[B, S]` true at slots that hold a real token; slots from `index` on are free, whatever the mask says.
    index: int32 first free slot: `[]` if all episodes share it, else `[B]`.
  """

  keys: tuple[chex.Array, ...] | chex.Array
  values: tuple[chex.Array, ...] | chex.Array
  mask: chex.Array
  index: chex.Array


def empty_cache(batch_size: int, length: int, num_layers: int, num_heads: int, head_width: int, dtype: str,
                in_step: bool = True, one_array: bool = False) -> KVCache:
  """Makes an empty cache.

  Args:
    batch_size: B.
    length: S.
    num_layers: L.
    num_heads: H.
    head_width: E.
    dtype: dtype of keys and values.
    in_step: whether all episodes share one index.
    one_array: whether all layers share one array, for `scan_layers`.
  """
  shape = (batch_size, num_heads, length, head_width)
  if one_array:
    values = jnp.zeros((batch_size, num_layers, *shape[1:]), dtype)
    keys, values = (sharding.constrain(x, 'data', None, 'model') for x in (jnp.swapaxes(values, 3, 4), values))
  else:
    layers = [jnp.zeros(shape, dtype)] * num_layers
    values = tuple(sharding.constrain(x, 'data', 'model') for x in layers)
    keys = tuple(sharding.constrain(jnp.swapaxes(x, 2, 3), 'data', 'model') for x in layers)
  index = jnp.zeros(() if in_step else batch_size, jnp.int32)
  return KVCache(keys=keys, values=values, mask=jnp.zeros((batch_size, length), bool), index=index)


def rewind(cache: KVCache, num_tokens: chex.Array) -> KVCache:
  """Removes the last `num_tokens` `[B]` tokens of each episode from the cache."""
  return cache.replace(index=cache.index - num_tokens)


def grow(cache: KVCache, length: int) -> KVCache:
  """Extends the cache to `length` slots, no fewer than it has."""
  more = length - cache.mask.shape[1]
  keys = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]), cache.keys)
  values = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]), cache.values)
  return cache.replace(keys=keys, values=values, mask=jnp.pad(cache.mask, ((0, 0), (0, more))))


def place(mask: chex.Array, cache: KVCache | None, window: int = 0) -> tuple[chex.Array, chex.Array, KVCache | None]:
  """Computes attention mask and positions of new tokens, and marks them in the mask of the cache.

  Args:
    mask: bool `[B, T]` true at real new tokens.
    cache: the cache that they will be written to, or None.
    window: number of slots, its own included, that a new token sees in the cache; 0 for all.

  Returns:
    `(attention_mask, positions, cache)`: bool `[B, T]` over keys or, with a cache, `[B, 1, T, S]`; int32 `[B, T]`
    positions, which count real tokens; and the cache with its mask updated.
  """
  if cache is None:
    return mask, jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0), None
  start, slots = jnp.reshape(cache.index, (-1, 1)), jnp.arange(cache.mask.shape[1], dtype=jnp.int32)[None]
  before = jnp.sum(cache.mask & (slots < start), axis=1, keepdims=True, dtype=jnp.int32)
  all_mask = write(cache.mask, mask, cache.index, axis=-1)
  query = (start + jnp.arange(mask.shape[1], dtype=jnp.int32)[None])[:, :, None]
  visible = (slots[None] <= query) & all_mask[:, None, :]
  if window:
    visible &= slots[None] > query - window
  positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
  return visible[:, None], positions, cache.replace(mask=all_mask)


def write(old: chex.Array, new: chex.Array, index: chex.Array, axis: int, layer: chex.Array | None = None
          ) -> chex.Array:
  """Writes new slots into an array of the cache from slot `index` on; in place where XLA can.

  Args:
    old: array `[B, ...]` with an axis of slots.
    new: shaped as `old`, with fewer slots and without an axis of layers.
    index: int32 first slot, `[]` for all episodes or `[B]`.
    axis: the axis of slots, counted from the end.
    layer: index along the axis of layers, the second; None if `old` has no such axis.
  """
  new = new if layer is None else new[:, None]

  def write_one(old, new, index):
    start = [jnp.int32(0)] * old.ndim
    start[axis] = index
    if layer is not None:
      start[-4] = jnp.asarray(layer, jnp.int32)
    return jax.lax.dynamic_update_slice(old, new, start)

  return write_one(old, new, index) if index.ndim == 0 else jax.vmap(write_one)(old, new, index)
