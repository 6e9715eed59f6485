"""Medians of warmed-up calls, and the rate of matrix products to compare with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def result_and_seconds(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  """Returns the result of one call, waited for, and its time."""
  start = time.perf_counter()
  result = jax.block_until_ready(call(*arguments))
  return result, time.perf_counter() - start


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
  """Returns the median time of a call, compiled and warmed up."""
  jax.block_until_ready(call())
  return statistics.median(result_and_seconds(call)[1] for _ in range(repeats))


def matmul_rate(dtype: str = 'float32') -> float:
  """Returns the FLOP/s of a large matrix product, the fastest of nine."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  a, b = jnp.ones((2 * size, size), dtype), jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, b))
  return 4 * size**3 / min(result_and_seconds(product, a, b)[1] for _ in range(9))
