"""Rotary position embeddings, with the scalings of long-context checkpoints.

Su et al., arXiv 2104.09864. Letters: B episodes, T tokens, H heads, E width of a head.
"""

import chex
import jax.numpy as jnp
import numpy as np

SCALINGS = ('none', 'linear', 'llama3')


def inverse_frequencies(head_width: int, base: float, scaling: str = 'none', factor: float = 1.0,
                        low_frequency_factor: float = 1.0, high_frequency_factor: float = 4.0,
                        original_length: int = 8192) -> np.ndarray:
  """Computes the angle per position of each pair of dimensions.

  `linear` divides all frequencies by the factor. `llama3` divides those whose wavelength exceeds `original_length /
  low_frequency_factor`, keeps those whose wavelength is below `original_length / high_frequency_factor`, and
  interpolates between the two (as released with Llama 3.1).

  Args:
    head_width: E, even.
    base: theta.
    scaling: a name in `SCALINGS`.
    factor: by which the context is longer than the original one.
    low_frequency_factor: of `llama3`.
    high_frequency_factor: of `llama3`, greater than the low one.
    original_length: of `llama3`: the context in which the model was first trained.

  Returns:
    float32 `[E / 2]`, radians.
  """
  frequencies = 1.0 / base ** (np.arange(0, head_width, 2, dtype=np.float64) / head_width)
  if scaling == 'linear':
    frequencies = frequencies / factor
  if scaling == 'llama3':
    turns = original_length * frequencies / (2 * np.pi)  # in the original context
    kept = np.clip((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor), 0.0, 1.0)
    frequencies = (1 - kept) * frequencies / factor + kept * frequencies
  return frequencies.astype(np.float32)


def rotate(x: chex.Array, positions: chex.Array, frequencies: np.ndarray) -> chex.Array:
  """Rotates each pair of dimensions (i, i + E / 2) by position times frequency.

  Args:
    x: `[B, T, H, E]` queries or keys.
    positions: int32 `[B, T]`.
    frequencies: float32 `[E / 2]`.

  Returns:
    `[B, T, H, E]` in the dtype of `x`; computed in float32.
  """
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
