"""What TPU compilers make of the weighted KL, forward and backward, on a machine that has no TPU: memory, not time.

    pip install '.[tpu]'
    python -m benchmarks.deviceless --json=deviceless.json

Each program is compiled in a process of its own, one at a time. The naive program, which holds all logits, is compiled
last and at a size of its own (`--naive_size`): at full size the compiler itself may take more than 20 GB. FLOPs are the
compiler's: it counts the body of a loop once, and of a kernel what the kernel declares.
"""

import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from benchmarks.losses import EXPONENT, naive_linear_loss, token_loss
from critkl_jax.ops.weighted_kl import linear_weighted_kl_loss
from experiments.flags import run

SIZE = flags.DEFINE_list('size', ['8192', '2048', '151936'], 'N, D and V, in bfloat16.')
NAIVE_SIZE = flags.DEFINE_list('naive_size', ['1024', '2048', '151936'], 'N, D and V of the naive program.')
ONLY = flags.DEFINE_string('only', None, 'TOPOLOGY/PROGRAM: compiles this one and prints a line of JSON.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')

TOPOLOGIES = {'v5e:2x2': 'v5litepod-4', 'v5p:2x2x1': 'v5p-8', 'v6e:2x2': 'v6e-4'}  # and names of such machines
PROGRAMS = {
    'pallas_tpu': {'implementation': 'pallas_tpu'},
    'chunked, token mode': {'implementation': 'chunked', 'memory_budget': 64 * 2**20},
    'chunked, vocabulary mode': {'implementation': 'chunked', 'memory_budget': 32 * 2**20},
    'naive': None,
}


def loss_of(program: str) -> Callable:
  """Returns the loss as a program takes it."""
  options = PROGRAMS[program]
  if options is None:
    return naive_linear_loss
  return lambda *arrays: linear_weighted_kl_loss(token_loss, *arrays, exponent=EXPONENT, **options)[0]


def compile_one(topology: str, program: str, size: tuple[int, int, int]) -> dict:
  """Compiles value and gradient of one program for a chip of a topology and returns what the compiler says."""
  num_tokens, width, vocab_size = size
  chip = jax.sharding.SingleDeviceSharding(
      topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0])

  def make(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

  rows, table = make(jnp.bfloat16, num_tokens, width), make(jnp.bfloat16, vocab_size, width)
  arrays = rows, table, rows, table, make(jnp.int32, num_tokens), make(jnp.float32, num_tokens)
  compiled = jax.jit(jax.value_and_grad(loss_of(program), (0, 1))).lower(*arrays).compile()
  text = compiled.as_text()
  return {
      'size': size,
      'temporary_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
      'tera_flops': compiled.cost_analysis().get('flops', 0.0) / 1e12,
      'whole_logits': any(f'[{a},{b}]' in text for a, b in ((num_tokens, vocab_size), (vocab_size, num_tokens))),
      'host_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
  }


def in_own_process(topology: str, program: str) -> dict:
  """Returns what `compile_one` does in a new process, or why it did not."""
  environment = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': TOPOLOGIES[topology], 'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true'}
  arguments = ['--size=' + ','.join(SIZE.value), '--naive_size=' + ','.join(NAIVE_SIZE.value)]
  done = subprocess.run([sys.executable, '-m', 'benchmarks.deviceless', f'--only={topology}/{program}', *arguments],
                        env=environment, capture_output=True, text=True)
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  lines = [line for line in done.stderr.splitlines() if 'Error' in line or 'Ran out' in line] or ['no message']
  return {'failed': f'status {done.returncode}: {lines[-1][:200]}'}


def main() -> None:
  """Compiles all programs for all topologies and prints a table."""
  if importlib.util.find_spec('libtpu') is None:
    sys.exit("error: the TPU compiler is not installed: pip install '.[tpu]'")
  if ONLY.value:
    topology, program = ONLY.value.split('/')
    size = NAIVE_SIZE.value if PROGRAMS[program] is None else SIZE.value
    print(json.dumps(compile_one(topology, program, tuple(map(int, size)))))
    return
  result = {topology: {} for topology in TOPOLOGIES}
  print(f'{"":>10}{"":>26}{"N, D, V":>22}{"temporary MiB":>15}{"10^12 FLOPs":>13}{"[N, V] buffer":>15}')
  for program in PROGRAMS:
    for topology in TOPOLOGIES:
      row = result[topology][program] = in_own_process(topology, program)
      if 'failed' in row:
        print(f'{topology:>10}{program:>26}  {row["failed"]}', flush=True)
        continue
      size, found = ', '.join(map(str, row['size'])), 'yes' if row['whole_logits'] else 'no'
      print(f'{topology:>10}{program:>26}{size:>22}{row["temporary_mib"]:15.1f}{row["tera_flops"]:13.2f}{found:>15}',
            flush=True)
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
