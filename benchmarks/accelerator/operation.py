"""Part 2: correctness, speed and memory of the weighted KL from hidden states.

Errors are the largest difference from float64, relative to the largest entry. An implementation agrees with float64 if
its errors exceed those of `plain`, plain JAX in the same dtypes, by at most a tenth and the rounding in `SLACK`.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import float64, timing
from benchmarks.accelerator.child import Report
from benchmarks.deviceless import loss_of, product_flops
from benchmarks.losses import EXPONENT, token_loss
from critkl_jax.ops.weighted_kl import linear, linear_weighted_kl_loss, pallas_gpu

RAGGED = {'full': ((252, 123, 507), (1000, 257, 5003), (77, 768, 50257)),  # tokens, width, vocabulary
          'smoke': ((30, 40, 70), (7, 31, 300), (1, 5, 47))}
TIMED = {'full': ((8192, 2048, 151936), (4096, 1024, 50257)), 'smoke': ((256, 64, 2048), (128, 32, 1024))}
SLACK = {'float32': (1e-5, 1e-5), 'bfloat16': (1e-5, 2**-8)}  # of values and gradients; kernels round logits' gradients
SMALL_BUDGET = 2**18  # bytes of logits; makes `chunked` loop over the vocabulary at the ragged sizes
REPEATS = 5


def measure(report: Report) -> None:
  """Reports errors at ragged sizes, then seconds and memory at large ones.

  Raises:
    ArithmeticError: at the end, if an implementation does not agree with float64 or could not run.
  """
  kernel = f'pallas_{jax.default_backend()}' if jax.default_backend() in ('gpu', 'tpu') else 'pallas_gpu'
  with interpreted(jax.default_backend() == 'cpu'):
    wrong = check_errors(report, kernel)
    for size in TIMED[report.preset]:
      wrong += time_size(report, kernel, size)
  if wrong:
    raise ArithmeticError(f'{len(wrong)} do not agree with float64, or did not run: ' + '; '.join(wrong))


def interpreted(on_cpu: bool) -> Any:
  """Returns a context in which the Triton kernels run in JAX's interpreter, if `on_cpu`."""
  tables = linear.FORWARD, linear.BACKWARD

  def table(kernel):
    return {'pallas_gpu': lambda plan: functools.partial(kernel, settings=plan.settings, interpret=on_cpu)}

  return mock.patch.multiple(linear, **{
      name: found | table(kernel) for name, found, kernel in zip(
          ('FORWARD', 'BACKWARD'), tables, (pallas_gpu.forward, pallas_gpu.backward))})


# Errors.


def check_errors(report: Report, kernel: str) -> list[str]:
  """Reports the errors of all implementations at ragged sizes, and returns the names of those too large."""
  ways = {'plain': {}, 'chunked': {}, 'chunked_small': {'memory_budget': SMALL_BUDGET}, kernel: {}}
  cases = {f'{dtype} {size}': make_arrays(size, dtype) for size in RAGGED[report.preset] for dtype in SLACK}
  programs = {(case, way): (value_and_grads(way.split('_small')[0], **options), arrays)
              for case, arrays in cases.items() for way, options in ways.items()}
  compiled, seconds = compile_each(programs)
  report.add('errors', programs=len(programs), compile_seconds=seconds)
  wrong = []
  for case, arrays in cases.items():
    truth, errors = float64.weighted_kl_truth(*map(jax.device_get, arrays)), {}
    for way in ways:
      program = compiled[case, way]
      try:
        if isinstance(program, Exception):
          raise program
        errors[way] = errors_of(program(*arrays), truth)
      except Exception as error:  # reported, and the others still run
        report.add(f'error {case} {way}', failed=first_line(error))
        wrong.append(f'{case} {way}')
        continue
      slack, plain = SLACK[case.split()[0]], errors.get('plain', (0.0, 0.0))
      agrees = all(own <= 1.1 * other + most for own, other, most in zip(errors[way], plain, slack))
      report.add(f'error {case} {way}', values=errors[way][0], gradients=errors[way][1], agrees=agrees)
      wrong += [] if agrees else [f'{case} {way}']
  return wrong


def value_and_grads(implementation: str, **options: Any) -> Callable:
  """Makes `(hidden, embedding, ...) -> ((loss, statistics), gradients)` of an implementation, jitted."""

  def loss(*arrays):
    return linear_weighted_kl_loss(
        token_loss, *arrays, exponent=EXPONENT, implementation=implementation, **options)

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def errors_of(found: tuple, truth: dict[str, Any]) -> tuple[float, float]:
  """Returns the largest relative error of the values and of the gradients.

  The KL's error is relative to the largest KL; that of other values to the largest one or 1, whichever is larger.
  """
  (_, record), gradients = jax.device_get(found)
  values = max(float64.relative_error(getattr(record, name), truth[name], 1e-12 if name == 'kl' else 1.0)
               for name in ('log_prob', 'entropy', 'kl', 'certainty'))
  return values, max(float64.relative_error(*pair) for pair in zip(gradients, (truth['hidden'], truth['embedding'])))


# Seconds and memory.


def time_size(report: Report, kernel: str, size: tuple[int, int, int]) -> list[str]:
  """Reports seconds and memory of all programs at a size, and returns the names of those that did not run.

  Programs run in the order of their memory, so that each can raise the peak of the process.
  """
  names, failed = (kernel, 'chunked, vocabulary mode', 'chunked, token mode', 'naive'), []
  arrays, title = make_arrays(size, 'bfloat16'), 'N={} D={} V={}'.format(*size)
  traced = {name: jax.jit(jax.value_and_grad(loss_of(name, size[2]), (0, 1))) for name in names}
  compiled, seconds = compile_each({name: (function, arrays) for name, function in traced.items()})
  report.add(f'{title} compilation', seconds=seconds)
  for name in names:
    try:
      if isinstance(compiled[name], Exception):
        raise compiled[name]
      call = functools.partial(compiled[name], *arrays)
      report.add(f'{title} {name}', temporary_mib=planned_mib(compiled[name]))
      took = timing.median_seconds(call, REPEATS)
      flops = product_flops(traced[name].trace(*arrays).jaxpr)
      report.add(f'{title} {name}', seconds=took, tera_flops_per_second=flops / took / 1e12,
                 process_peak_mib=peak_mib())
    except Exception as error:  # naive may need more memory than there is, and the others still run
      report.add(f'{title} {name}', failed=first_line(error))
      if name != 'naive' or 'RESOURCE_EXHAUSTED' not in str(error):
        failed.append(f'{title} {name}')
  return failed


def compile_each(programs: dict[Any, tuple[Callable, tuple]]) -> tuple[dict[Any, Callable | Exception], float]:
  """Like `timing.compile_together`, but a failed compilation gives its exception instead of a program."""

  def attempt(program):
    try:
      return timing.compile_one(*program)
    except Exception as error:
      return error

  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(programs, pool.map(attempt, programs.values()))), time.perf_counter() - start


def make_arrays(size: tuple[int, int, int], dtype: str) -> tuple[jax.Array, ...]:
  """Draws hidden states and embedding of policy and reference (logits with deviation 3), actions and advantages."""
  num_tokens, width, vocab_size = size

  @jax.jit
  def draw(key):
    keys = jax.random.split(key, 6)
    rows, table = (num_tokens, width), (vocab_size, width)
    scaled = [jax.random.normal(k, shape, jnp.dtype(dtype)) * jnp.asarray(scale, dtype) for k, shape, scale in zip(
        keys, (rows, table, rows, table), (3 / width**0.5, 1, 3 / width**0.5, 1))]
    return (*scaled, jax.random.randint(keys[4], (num_tokens,), 0, vocab_size),
            jax.random.normal(keys[5], (num_tokens,), jnp.float32))

  return draw(jax.random.key(sum(size)))


def planned_mib(program: Any) -> float | None:
  """Returns a compiled program's temporary memory; None if the backend does not report it."""
  stats = program.memory_analysis()
  size = getattr(stats, 'temp_size_in_bytes', None)
  return None if size is None else size / 2**20


def peak_mib() -> float | None:
  """Returns this process's peak memory on the device; None if the backend does not report it."""
  size = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
  return None if size is None else size / 2**20


def first_line(error: Exception) -> str:
  """Returns the type and the first line of an exception."""
  return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:200]}'
