"""What the transformers share: their blocks as one loop, and ids outside the vocabulary."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def known_or_padding(tokens: chex.Array, mask: chex.Array, vocab_size: int) -> chex.Array:
  """Maps unmasked ids outside the vocabulary to an id whose embedding is NaN, and clips padding into the vocabulary.

  A NaN at padding would reach all other tokens as 0 * NaN; a negative id would index from the end of the embedding.

  Args:
    tokens: int32 `[B, T]`.
    mask: bool `[B, T]` false at padding.
    vocab_size: V.

  Returns:
    int32 `[B, T]`.
  """
  return jnp.where(mask, jnp.where(tokens < 0, vocab_size, tokens), jnp.clip(tokens, 0, vocab_size - 1))


def stack_blocks(params: Any, name: str, num_layers: int) -> Any:
  """Stacks the parameters of the blocks `name_0`, `name_1`, ... under `name`, with a leading axis of layers.

  Parameters that are stacked already are returned unchanged.
  """
  if name in params:
    return params
  rest = {other: x for other, x in params.items() if not other.startswith(f'{name}_')}
  return rest | {name: jax.tree.map(lambda *x: jnp.stack(x), *(params[f'{name}_{i}'] for i in range(num_layers)))}


def loop_over_blocks(block: Callable[..., tuple[chex.Array, Any]], layers: Any, x_BxTxD: chex.Array, cached: Any,
                     num_layers: int, remat: bool) -> tuple[chex.Array, Any]:
  """Runs the blocks with `lax.scan`.

  Args:
    block: (parameters of a block, hidden states, cached, number of the layer int32 `[]`) -> (hidden states, cached).
    layers: the parameters of all blocks, with a leading axis of layers.
    x_BxTxD: hidden states `[B, T, D]`.
    cached: keys and values of all layers, or Nones.
    num_layers: the number of blocks.
    remat: whether the backward pass recomputes the blocks.

  Returns:
    `(hidden states, cached)` after the last block.
  """

  def step(carry, inputs):
    (x_BxTxD, cached), (params, layer) = carry, inputs
    return block(params, x_BxTxD, cached, layer), None

  step = jax.checkpoint(step, prevent_cse=False) if remat else step
  return jax.lax.scan(step, (x_BxTxD, cached), (layers, jnp.arange(num_layers, dtype=jnp.int32)))[0]
