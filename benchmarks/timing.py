"""Parallel compilation, medians of warmed-up calls, and the FLOP/s of a matrix product as a baseline."""

import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def compile_together(programs: dict[str, tuple[Callable, tuple]]) -> tuple[dict[str, Callable], float]:
  """Compiles jitted functions in parallel threads.

  Args:
    programs: name -> (jitted function, its arguments: arrays or shapes).

  Returns:
    The compiled programs by name, and the seconds for all of them, tracing included.
  """
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = {name: pool.submit(compile_one, *program) for name, program in programs.items()}
    return {name: future.result() for name, future in found.items()}, time.perf_counter() - start


def compile_one(function: Callable, arguments: tuple) -> Callable:
  """Compiles a jitted function for its arguments, which may be arrays or shapes."""
  return function.lower(*arguments).compile()


def result_and_seconds(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  """Returns the finished result of a call, and its seconds."""
  start = time.perf_counter()
  result = jax.block_until_ready(call(*arguments))
  return result, time.perf_counter() - start


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
  """Returns the median seconds of a compiled call, after one call to warm up."""
  jax.block_until_ready(call())
  return statistics.median(result_and_seconds(call)[1] for _ in range(repeats))


def matmul_rate(dtype: str = 'float32', precision: str | None = None, size: int | None = None) -> float:
  """Returns the FLOP/s of a large matrix product, the fastest of nine.

  Args:
    dtype: type of the factors. They are random, because zeros and ones draw less power and let a GPU clock higher.
    precision: as in `jax.numpy.matmul`; None is the default, which on GPUs rounds float32 to TF32.
    size: the factors are `[2 size, size]` and `[size, size]`; 2048 on a CPU and 8192 elsewhere if None.
  """
  size = size or (2048 if jax.default_backend() == 'cpu' else 8192)
  draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
  a, b = draw(jax.random.key(0), (2 * size, size), jnp.dtype(dtype)), draw(
      jax.random.key(1), (size, size), jnp.dtype(dtype))
  product = jax.jit(functools.partial(jnp.matmul, precision=precision))
  jax.block_until_ready(product(a, b))
  return 4 * size**3 / min(result_and_seconds(product, a, b)[1] for _ in range(9))
