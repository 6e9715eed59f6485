"""Checks of arguments that the functions of this operation share."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.statistics import in_vocabulary


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
  """Raises ValueError, with the argument's name, unless both shapes are equal."""
  if tuple(shape) != tuple(expected):
    raise ValueError(f'{name}: expected shape {tuple(expected)} to agree with the others, got {tuple(shape)}.')


def checked_mask(mask: chex.Array | None, shape: Sequence[int]) -> chex.Array | None:
  """Converts a mask to bool; None stays None. Raises ValueError if it has another shape."""
  if mask is None:
    return None
  check_shape('mask', mask.shape, shape)
  return mask.astype(bool)


def known_actions(actions: chex.Array, vocab_size: int) -> tuple[chex.Array, chex.Array]:
  """Replaces ids outside 0..V-1 by 0; returns the actions `[...]` and bool `[...]`, true where the id was known."""
  known = in_vocabulary(actions, vocab_size)
  return jnp.where(known, actions, 0), known
