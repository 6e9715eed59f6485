"""Describes accelerators that this machine does not have; their compilers run anywhere and check memory."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from critkl_jax.config import nearest


class Chip(NamedTuple):
  """A kind of accelerator.

  Attributes:
    memory_gib: memory of a device, by its compiler or its data sheet.
    accelerator_type: name of the TPU for libtpu; empty for a GPU.
  """

  memory_gib: float
  accelerator_type: str = ''


CHIPS = {'v4': Chip(30.75, 'v4-8'), 'v5e': Chip(15.75, 'v5litepod-4'), 'v5p': Chip(95.74, 'v5p-8'),
         'v6e': Chip(31.25, 'v6e-4'), 'H100': Chip(79.1)}
GPU = 'H100'
# XLA's description of an H100 SXM, from NVIDIA's data sheet and its tables of compute capability 9.0.
_H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000
  device_memory_size: 84942979072 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
"""


def chip_of(topology: str) -> Chip:
  """Returns the kind of accelerator of a topology such as `v5e:2x4` or `H100:8`.

  Raises:
    ValueError: if the kind is unknown.
  """
  kind = topology.split(':')[0]
  if kind not in CHIPS:
    raise ValueError(f'topology: expected one of {tuple(CHIPS)}, with its shape as in v5e:2x4 or H100:8, got '
                     f'{topology!r}; the nearest is {nearest(kind, CHIPS)!r}.')
  return CHIPS[kind]


def check_topology(topology: str) -> None:
  """Checks the text of a topology before its compiler is loaded.

  Raises:
    ValueError: if its kind or its shape is unknown, or its compiler is not installed.
  """
  chip_of(topology)
  kind, _, shape = topology.partition(':')
  if not re.fullmatch(r'[0-9]{1,4}(x[0-9]{1,4}){0,2}', shape or '1'):
    raise ValueError(f'topology: expected a shape such as 2x4 or 8 after {kind}:, got {topology!r}.')
  missing = missing_compiler(backend_of(topology))
  if missing:
    raise ValueError(f"topology: the compiler for {kind} is not installed: pip install '.[{missing}]'")


def backend_of(topology: str) -> str:
  """Returns the backend of a topology, `tpu` or `gpu`."""
  return 'tpu' if chip_of(topology).accelerator_type else 'gpu'


def environment(topology: str) -> dict[str, str]:
  """Returns the environment variables that libtpu needs without a TPU; set them before it is loaded."""
  kind = chip_of(topology).accelerator_type
  return {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
          'TPU_ACCELERATOR_TYPE': kind} if kind else {}


def devices_of(topology: str) -> Sequence[Any]:
  """Returns the devices of a topology, which support compilation only.

  Raises:
    ValueError: if the topology is unknown, or its compiler is not installed.
  """
  backend, (kind, _, shape) = backend_of(topology), topology.partition(':')
  check_topology(topology)
  os.environ.update(environment(topology))
  try:
    if backend == 'gpu':
      return topologies.get_topology_desc(GPU, 'cuda', topology=f'1x1x{shape or 1}', target_config=_H100).devices
    if re.sub('[1x]', '', shape or '1') == '':
      return topologies.get_topology_desc(f'{kind}:{shape or "1x1"}', 'tpu', chips_per_host_bounds=[1, 1, 1]).devices
    return topologies.get_topology_desc(f'{kind}:{shape}', 'tpu').devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'topology: {topology!r} is refused: {str(error).splitlines()[0]}') from error


def missing_compiler(backend: str) -> str:
  """Returns the package's extra with a backend's compiler, or an empty text if the compiler is installed."""
  if backend == 'tpu':
    return '' if importlib.util.find_spec('libtpu') else 'tpu'
  plugins = importlib.util.find_spec('jax_plugins')
  return '' if plugins and importlib.util.find_spec('jax_plugins.xla_cuda13') else 'h100'
