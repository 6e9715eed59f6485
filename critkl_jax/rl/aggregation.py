"""Means over the tokens of a batch: they reduce per-token losses to one number.

Letters: B episodes, T response tokens, L a fixed length.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp


def _nonempty(lengths):
  return (lengths > 0).astype(jnp.float32)


# Name -> (lengths [B, 1], L) -> (factor of each token of an episode in the sum [B, 1], None for 1;
# the episode's part of the denominator [B, 1]).
AGGREGATIONS: dict[str, Callable[..., tuple[chex.Array | None, chex.Array]]] = {
    'tokens': lambda lengths, fixed: (None, lengths),
    'sequences': lambda lengths, fixed: (1.0 / jnp.maximum(lengths, 1.0), _nonempty(lengths)),
    'fixed_length': lambda lengths, fixed: (None, fixed * _nonempty(lengths)),
}


def aggregate(x: chex.Array, mask: chex.Array, aggregation: str = 'tokens', fixed_length: int = 0,
              denominator: chex.Numeric | None = None) -> chex.Array:
  """Computes a mean of per-token numbers over a batch.

  `tokens`: the mean over all tokens (Yu et al., arXiv 2503.14476, section 3.3).
  `sequences`: the mean over episodes of the mean over an episode's tokens (Shao et al., arXiv 2402.03300, section
  4.1.1).
  `fixed_length`: the sum over tokens divided by the number of episodes times a fixed length L, so that the length of an
  episode does not change the weight of its tokens (Liu et al., arXiv 2503.20783, section 3.2).
  Episodes without any token are left out.

  Args:
    x: float `[B, T]`; where the mask is false it may be anything, NaN included.
    mask: bool `[B, T]` true at the tokens that count.
    aggregation: a name in `AGGREGATIONS`.
    fixed_length: L, for the aggregation `fixed_length`; 0 stands for T, the padded length.
    denominator: divides the sum instead of `loss_denominator` of this mask; may be traced.

  Returns:
    float32 `[]`.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if the aggregation is unknown.
  """
  chex.assert_equal_shape([x, mask])
  mask = mask.astype(bool)
  share = token_share(mask, aggregation)
  total = jnp.sum(jnp.where(mask, x if share is None else x * share, 0.0))
  return total / divisor(mask, aggregation, fixed_length, denominator)


def loss_denominator(mask: chex.Array, aggregation: Any = 'tokens', fixed_length: int = 0) -> chex.Array:
  """Computes the denominator of a batch: the number by which `aggregate` divides its sum over tokens.

  If the loss of each part of a batch is divided by the denominator of the whole batch, the losses and gradients of the
  parts add up to those of the batch. The parts may be microbatches or devices, and each holds whole episodes. (Inside
  `shard_map`, JAX itself adds up the gradients of replicated parameters, unless `check_vma=False`.)

  Args:
    mask: bool `[B, T]` true at the tokens that count.
    aggregation: a name in `AGGREGATIONS`, or a `LossConfig`, which has both settings.
    fixed_length: L, for the aggregation `fixed_length`; 0 stands for T, the padded length.

  Returns:
    float32 `[]`: the number of tokens (`tokens`), the number of episodes with a token (`sequences`), or this number
    times L (`fixed_length`). 0 if no token counts.

  Raises:
    ValueError: if the aggregation is unknown.
  """
  if not isinstance(aggregation, str):
    aggregation, fixed_length = aggregation.aggregation, aggregation.aggregation_length
  return jnp.sum(episode_terms(mask, aggregation, fixed_length))


def episode_terms(mask: chex.Array, aggregation: str, fixed_length: int = 0) -> chex.Array:
  """Returns each episode's part of `loss_denominator`, float32 `[B]`; arguments as there."""
  return _entry(aggregation)(_lengths(mask), float(fixed_length or mask.shape[-1]))[1][..., 0]


def token_share(mask: chex.Array, aggregation: str) -> chex.Array | None:
  """Returns the factor of each episode's tokens in the sum, float32 `[B, 1]`; None if it is 1."""
  return _entry(aggregation)(_lengths(mask), 0.0)[0]


def divisor(mask: chex.Array, aggregation: str, fixed_length: int, denominator: chex.Numeric | None) -> chex.Array:
  """Returns the given denominator, 1 in place of 0; for None, the batch's own, at least 1."""
  if denominator is None:
    return jnp.maximum(loss_denominator(mask, aggregation, fixed_length), 1.0)
  denominator = jnp.asarray(denominator, jnp.float32)
  return jnp.where(denominator == 0, 1.0, denominator)  # no token in any part: the sum is 0


def masked_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Computes the mean `[]` of `x` `[...]` over the entries where `mask` `[...]` is true; 0 if there are none."""
  chex.assert_equal_shape([x, mask])
  mask = mask.astype(bool)
  return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def _lengths(mask):
  return jnp.sum(mask.astype(bool), -1, keepdims=True, dtype=jnp.float32)


def _entry(aggregation):
  if aggregation not in AGGREGATIONS:
    raise ValueError(f'aggregation: expected one of {tuple(AGGREGATIONS)}, got {aggregation!r}.')
  return AGGREGATIONS[aggregation]
