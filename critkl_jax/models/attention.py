"""Causal self-attention in plain JAX: over whole texts, and of new tokens over a cache.

Letters: B episodes, T new tokens, S slots of the cache (or keys), H query heads, K key heads, E width of
a head.
"""

import chex
import jax
import jax.numpy as jnp

BLOCK = 128  # queries processed at a time
_HIDDEN = -1e30  # logit of a masked key; finite, so that a query with no visible key gives no NaN


def check_implementation(name: str) -> None:
  """Checks that an attention implementation can run on this machine's devices.

  Raises:
    ValueError: for `cudnn` without a GPU.
  """
  if name == 'cudnn' and jax.default_backend() != 'gpu':
    raise ValueError(f"attention: 'cudnn' needs an NVIDIA GPU, and the devices here are {jax.default_backend()}; "
                     "take 'auto'.")


def causal_attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array, window: int = 0
                     ) -> chex.Array:
  """Computes causal attention, `softmax(q k / sqrt(E)) v`, in blocks of queries.

  A block multiplies only with the keys up to its own end, which halves the work; its scores `[B, H, 128, T]` are the
  largest array in memory.

  Args:
    query: `[B, T, H, E]`.
    key: `[B, T, K, E]`, K a divisor of H: query head h uses key head h K / H.
    value: `[B, T, K, E]`.
    mask: bool `[B, T]` true at visible keys. The output of a query with no visible key is undefined.
    window: number of keys, its own included, that a query sees; 0 for all.

  Returns:
    `[B, T, H, E]` in the dtype of the queries; the softmax is computed in float32.
  """
  query, value, key = jnp.swapaxes(query, 1, 2), jnp.swapaxes(value, 1, 2), jnp.transpose(key, (0, 2, 3, 1))
  length = query.shape[2]
  blocks = []
  for start in range(0, length, BLOCK):
    end = min(start + BLOCK, length)
    first = max(start - window + 1, 0) if window else 0
    keys, queries = (jnp.arange(*ends, dtype=jnp.int32) for ends in ((first, end), (start, end)))
    causal = keys[None] <= queries[:, None]
    if window:
      causal &= keys[None] > queries[:, None] - window
    visible = mask[:, None, None, first:end] & causal[None, None]
    blocks.append(attend(query[:, :, start:end], key[..., first:end], value[:, :, first:end], visible))
  return jnp.swapaxes(jnp.concatenate(blocks, 2), 1, 2)


def attend(query: chex.Array, key: chex.Array, value: chex.Array, visible: chex.Array) -> chex.Array:
  """Computes attention under a mask; the softmax is computed in float32.

  Args:
    query: `[B, H, T, E]`.
    key: `[B, K, E, S]`, K a divisor of H: query head h uses key head h K / H (grouped queries).
    value: `[B, K, S, E]`.
    visible: bool, broadcast to `[B, H, T, S]`: which keys each query sees.

  Returns:
    `[B, H, T, E]`.
  """
  query = query * query.shape[-1] ** -0.5
  if query.shape[1] != key.shape[1]:
    grouped = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])
    scores = jnp.einsum('bkgte,bkes->bkgts', grouped, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, _HIDDEN))
    return jnp.einsum('bkgts,bkse->bkgte', weights.astype(value.dtype), value).reshape(query.shape)
  scores = jnp.einsum('bhte,bhes->bhts', query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(visible, scores, _HIDDEN))
  return jnp.einsum('bhts,bhse->bhte', weights.astype(value.dtype), value)
