"""Part 1: the device, the versions, and the rates that other results are compared with."""

import functools
import importlib.metadata
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.accelerator.child import Report

PACKAGES = ('jax', 'jaxlib', 'jax-cuda13-plugin', 'jax-cuda12-plugin', 'libtpu', 'flax', 'optax', 'chex',
            'orbax-checkpoint', 'numpy', 'torch', 'transformers')
MATRIX, COPIED_MIB = {'full': None, 'smoke': 256}, {'full': 2048, 'smoke': 16}  # None: as in `matmul_rate`
ROUNDS = 2000


def measure(report: Report) -> None:
  """Reports device, versions, FLOP/s of matrix products, bandwidth of a copy, and latency of a dispatch."""
  device = jax.devices()[0]
  report.add('device', kind=device.device_kind, platform=device.platform, number=jax.device_count(),
             memory_mib=(device.memory_stats() or {}).get('bytes_limit', 0) / 2**20 or None,
             backend=' '.join(device.client.platform_version.split()), driver=driver())
  report.add('versions', python=platform.python_version(), **versions())
  rates = (('bfloat16', 'bfloat16', None), ('float32', 'float32', None), ('float32_highest', 'float32', 'highest'))
  for name, dtype, precision in rates:
    rate = timing.matmul_rate(dtype, precision, MATRIX[report.preset])
    report.add('matrix_product', **{f'{name}_tera_flops': rate / 1e12})
  report.add('copy', giga_bytes_per_second=copy_rate(COPIED_MIB[report.preset]) / 1e9)
  report.add('latency', **{f'{name}_microseconds': 1e6 * seconds for name, seconds in latencies().items()})


def versions() -> dict[str, str]:
  """Returns the versions of the installed packages among `PACKAGES`."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def driver() -> str | None:
  """Returns NVIDIA's description of its driver and GPUs; None without a driver."""
  if not shutil.which('nvidia-smi'):
    return None
  try:
    query = '--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit'
    done = subprocess.run(['nvidia-smi', query, '--format=csv,noheader'], capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired) as error:
    return str(error)
  return (done.stdout or done.stderr).strip()


def copy_rate(mebibytes: int) -> float:
  """Returns the bytes read and written per second when adding 1 to a float32 array, the fastest of nine."""
  x = jnp.zeros(mebibytes * 2**18, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(x))
  return 2 * x.nbytes / min(timing.result_and_seconds(add, x)[1] for _ in range(9))


def latencies() -> dict[str, float]:
  """Returns the seconds of a finished call of a tiny program (`call`) and of a round of a tiny loop on the device
  (`loop_round`), the least that each token of a rollout takes."""
  x = jnp.zeros(128, jnp.float32)
  call = functools.partial(jax.jit(lambda x: x + 1), x)
  loop = functools.partial(jax.jit(lambda x: jax.lax.while_loop(lambda y: y[0] < ROUNDS, lambda y: y + 1, x)), x)
  return {'call': timing.median_seconds(call, 20), 'loop_round': timing.median_seconds(loop, 3) / ROUNDS}
