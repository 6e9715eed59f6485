"""Causal self-attention in plain JAX: over a whole text, and of new tokens over a cache.

Letters: B episodes, T new tokens, S cached and new tokens, H heads, K width of a head.
"""

import chex
import jax
import jax.numpy as jnp

BLOCK = 128  # queries that are taken at a time
_HIDDEN = -1e30  # logit of a key that must not be seen; finite, so that a query that sees none gives no NaN


def check_implementation(name: str) -> None:
  """Checks that an implementation of attention runs on this machine's devices.

  Raises:
    ValueError: for `cudnn` without a GPU.
  """
  if name == 'cudnn' and jax.default_backend() != 'gpu':
    raise ValueError(f"attention: 'cudnn' needs an NVIDIA GPU, and the devices here are {jax.default_backend()}; "
                     "take 'auto'.")


def causal_attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns `softmax(q k / sqrt(K)) v` over the keys up to each query, in blocks of queries.

  A block multiplies with the keys up to its own end alone, so that about half of the work is never done, and its
  scores `[B, H, 128, S]` are the largest array there is.

  Args:
    query: `[B, T, H, K]`.
    key: `[B, T, H, K]`.
    value: `[B, T, H, K]`.
    mask: bool `[B, T]` true at keys that may be seen. What is returned for a query that sees none is of no meaning.

  Returns:
    `[B, T, H, K]` in the queries' type; the softmax is taken in float32.
  """
  query, value, key = jnp.swapaxes(query, 1, 2), jnp.swapaxes(value, 1, 2), jnp.transpose(key, (0, 2, 3, 1))
  length = query.shape[2]
  blocks = []
  for start in range(0, length, BLOCK):
    end = min(start + BLOCK, length)
    causal = jnp.arange(end, dtype=jnp.int32)[None] <= jnp.arange(start, end, dtype=jnp.int32)[:, None]
    visible = mask[:, None, None, :end] & causal[None, None]
    blocks.append(attend(query[:, :, start:end], key[..., :end], value[:, :, :end], visible))
  return jnp.swapaxes(jnp.concatenate(blocks, 2), 1, 2)


def attend(query: chex.Array, key: chex.Array, value: chex.Array, visible: chex.Array) -> chex.Array:
  """Returns attention of queries `[B, H, T, K]` over keys `[B, H, K, S]` and values `[B, H, S, K]` as `[B, H, T, K]`.

  `visible`, bool, to be broadcast to `[B, H, T, S]`, says which keys a query sees. The softmax is taken in float32."""
  query = query * query.shape[-1] ** -0.5
  scores = jnp.einsum('bhtk,bhks->bhts', query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(visible, scores, _HIDDEN))
  return jnp.einsum('bhts,bhsk->bhtk', weights.astype(value.dtype), value)
