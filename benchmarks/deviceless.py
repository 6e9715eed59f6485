"""Compiles the weighted KL, forward and backward, for TPUs and GPUs on a machine without them, and reports memory.

    pip install '.[tpu,h100]'
    python -m benchmarks.deviceless --json=deviceless.json

Times are not measured. Each program is compiled from shapes in its own process, one at a time. `--tall` gives a second
size at which the naive program, which holds all logits, no longer fits into a v5e. FLOPs are those of the matrix
products in the traced program: a loop's body counts as often as it runs, a kernel by its cost estimate. The compiler's
own count, if there is one, counts a loop's body once.

Letters: R rows (tokens), D width, V vocabulary.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.losses import EXPONENT, naive_linear_loss, token_loss
from critkl_jax.ops.weighted_kl import linear_weighted_kl, linear_weighted_kl_loss
from critkl_jax.ops.weighted_kl.chunked import FEWEST_TOKENS
from critkl_jax.runtime import storage
from experiments import parsing, paths
from experiments.flags import keep_no_programs, run
from experiments.targets import GPU, backend_of, devices_of, environment, missing_compiler

TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
PROGRAMS = ('naive', 'pallas_tpu', 'pallas_gpu', 'chunked, vocabulary mode', 'chunked, token mode')
VOCABULARY_MODE_BUDGET = 32 * 2**20

keep_no_programs()
SIZE = flags.DEFINE_list('size', ['8192', '2048', '151936'], 'Tokens, width and vocabulary, in bfloat16.')
TALL = flags.DEFINE_list('tall', ['16384', '2048', '151936'], 'The same for a second table, on v5e; empty for none.')
TARGETS = flags.DEFINE_multi_enum('target', [*TPUS, GPU], [*TPUS, GPU], 'What to compile for; may be repeated.')
CHOSEN = flags.DEFINE_multi_enum('program', PROGRAMS, PROGRAMS, 'What to compile; may be repeated.')
ONLY = flags.DEFINE_string('only', None, 'TARGET/PROGRAM: compiles only this and prints a line of JSON.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')


def loss_of(program: str, vocab_size: int) -> Callable:
  """Returns the loss function of a program."""
  options = {'exponent': EXPONENT, 'implementation': program.split(',')[0]}
  if program == 'naive':
    return naive_linear_loss
  if program == 'chunked, token mode':
    options['memory_budget'] = 8 * vocab_size * FEWEST_TOKENS
    return lambda *arrays: linear_weighted_kl_loss(token_loss, *arrays, **options)[0]
  if program == 'chunked, vocabulary mode':
    options['memory_budget'] = VOCABULARY_MODE_BUDGET
  return lambda *arrays: jnp.sum(token_loss(linear_weighted_kl(*arrays[:-1], **options), arrays[-1]))


def chip_of(target: str) -> jax.sharding.Sharding:
  """Returns the sharding that places arrays on one chip of a target."""
  return jax.sharding.SingleDeviceSharding(devices_of(TPUS.get(target, target))[0])


def kind_of(chip: jax.sharding.Sharding) -> AbstractDevice:
  """Returns the device kind for lowering kernels; without it jax 0.12 asks this machine's devices."""
  (device,) = chip.device_set
  values = device.device_kind, getattr(device, 'core_count', None), device.platform  # jax 0.10.0 has two of the fields
  return AbstractDevice(*values[:len(dataclasses.fields(AbstractDevice))])


def compile_one(target: str, program: str, size: tuple[int, int, int]) -> dict[str, Any]:
  """Compiles value and gradient of one program for a chip and returns memory and FLOPs."""
  num_tokens, width, vocab_size = size
  chip = chip_of(target)

  def make(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

  rows, table = make(jnp.bfloat16, num_tokens, width), make(jnp.bfloat16, vocab_size, width)
  arrays = rows, table, rows, table, make(jnp.int32, num_tokens), make(jnp.float32, num_tokens)
  with mock.patch('jax.default_backend', return_value='gpu' if target == GPU else 'tpu'):  # decides the tiles
    traced = jax.jit(jax.value_and_grad(loss_of(program, vocab_size), (0, 1))).trace(*arrays)
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), (), abstract_device=kind_of(chip))):
    compiled = traced.lower().compile()
  text, costs = compiled.as_text(), compiled.cost_analysis()
  return {
      'temporary_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
      'tera_flops': product_flops(traced.jaxpr) / 1e12,
      'compiler_tera_flops': costs['flops'] / 1e12 if costs else None,
      'whole_logits': any(f'[{a},{b}]' in text for a, b in ((num_tokens, vocab_size), (vocab_size, num_tokens))),
      'host_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
  }


def product_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
  """Counts the floating-point operations of all matrix products of a program."""
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      lhs, ((contracted, _), _) = equation.invars[0].aval, params['dimension_numbers']
      total += 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracted)
    elif name == 'pallas_call':
      total += params['cost_estimate'].flops
    else:
      inner = [x for x in jax.tree.leaves(list(params.values())) if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
      total += params.get('length', 1) * sum(map(product_flops, inner))
  return total


def in_own_process(target: str, program: str, size: list[str]) -> dict[str, Any]:
  """Runs `compile_one` in a new process; returns its result, with GPU kernels' statistics, or the failure."""
  with tempfile.TemporaryDirectory() as folder:
    variables = os.environ | {'JAX_PLATFORMS': 'cpu'} | (
        gpu_environment(folder) if target == GPU else environment(target))
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.deviceless', f'--only={target}/{program}', '--size=' + ','.join(size)],
        env=variables, capture_output=True, text=True)
    if done.returncode:
      return {'failed': reason(done.stderr) or f'status {done.returncode}, no message'}
    result = json.loads(done.stdout.splitlines()[-1])
    if program == 'pallas_gpu':
      result['kernels'] = triton_kernels(pathlib.Path(folder))
  return result


def gpu_environment(folder: str) -> dict[str, str]:
  """Returns variables that make XLA write the PTX of its kernels into a folder."""
  emitted = ('--xla_dump_emitter_re=.*',) * (jax.__version_info__ >= (0, 11))  # older versions always write PTX
  found = os.environ.get('XLA_FLAGS', ''), f'--xla_dump_to={folder}', *emitted, *(
      f'--xla_gpu_cuda_data_dir={root}' for root in cuda_folders()[:1])
  return {'XLA_FLAGS': ' '.join(found)}


def cuda_folders() -> list[pathlib.Path]:
  """Returns the folders of the CUDA compiler's wheels."""
  nvidia = importlib.util.find_spec('nvidia')
  roots = nvidia.submodule_search_locations if nvidia else ()
  return [folder for root in roots for folder in pathlib.Path(root).glob('cu*') if (folder / 'bin' / 'ptxas').exists()]


def ptxas() -> str | None:
  """Returns the path of CUDA's assembler, from the wheels if they are installed, else from PATH."""
  return shutil.which('ptxas', path=os.pathsep.join([*(f'{x}/bin' for x in cuda_folders()), os.environ['PATH']]))


def triton_kernels(folder: pathlib.Path) -> dict[str, dict[str, int]]:
  """Returns registers per thread and spilled bytes of each Pallas kernel, as reported by ptxas."""
  kernels = {}
  for path in sorted(folder.glob('*.ptx')):
    done = subprocess.run([ptxas(), '-v', '-arch=sm_90a', path, '-o', os.devnull],
                          capture_output=True, text=True, check=True)
    for name, said in re.findall(r"entry function '(\w+)'(.*?registers)", done.stderr, re.DOTALL):
      if name.startswith('weighted_kl'):
        spilled = sum(map(int, re.findall(r'(\d+) bytes spill', said)))
        kernels[name] = {'registers': int(re.search(r'(\d+) registers', said)[1]), 'spilled_bytes': spilled}
  return kernels


def reason(stderr: str) -> str:
  """Extracts the reason of a failed compilation as one line; empty if there is none."""
  lines = [line for line in stderr.splitlines() if 'Error' in line or 'Ran out' in line]
  amounts = re.findall(r'\d[\d.]*[KMG]', lines[-1]) if lines else []
  if len(amounts) > 1 and 'Ran out of memory' in lines[-1]:
    return f'out of memory: needs {amounts[0]} of {amounts[1]}'
  return lines[-1][:200] if lines else ''


def missing_compilers() -> dict[str, str]:
  """Returns the targets whose compilers are missing, target -> the extra that installs it."""
  missing = {target: missing_compiler(backend_of(target)) for target in (*TPUS, GPU)}
  if ptxas() is None:
    missing[GPU] = 'h100'
  return {target: extra for target, extra in missing.items() if extra}


def present(targets: list[str]) -> list[str]:
  """Returns the targets whose compilers are installed, and prints how to install the others; exits if none is."""
  missing = missing_compilers()
  for target in targets:
    if target in missing:
      print(f"{target}: skipped, the compiler is not installed: pip install '.[{missing[target]}]'", flush=True)
  found = [target for target in targets if target not in missing]
  if not found:
    sys.exit('error: no compiler is installed.')
  return found


def table(targets: list[str], size: list[str]) -> dict[str, dict[str, Any]]:
  """Compiles all programs for the targets, prints a row for each and returns the rows."""
  print('\nR={} D={} V={}, bfloat16'.format(*size))
  titles = f'{"temporary MiB":>15}{"times less":>12}{"10^12 FLOPs":>13}{"by compiler":>13}{"[R, V] buffer":>15}'
  print(f'{"":>32}{titles}', flush=True)
  rows = {}
  for target in targets:
    rows[target] = {}
    for program in CHOSEN.value:
      if program == ('pallas_tpu' if target == GPU else 'pallas_gpu'):
        continue
      row = rows[target][program] = in_own_process(target, program, size)
      naive = rows[target].get('naive', {}).get('temporary_mib')
      if naive and row.get('temporary_mib'):
        row['memory_ratio'] = naive / row['temporary_mib']
      print(f'{target:>6}{program:>26}{line_of(row)}', flush=True)
  return rows


def line_of(row: dict[str, Any]) -> str:
  """Formats a row of the table, with a further line for each GPU kernel."""
  if 'failed' in row:
    return '  ' + row['failed']
  ratio = f'{row["memory_ratio"]:.1f}' if 'memory_ratio' in row else '-'
  by_compiler = '-' if row['compiler_tera_flops'] is None else f'{row["compiler_tera_flops"]:.2f}'
  whole = 'yes' if row['whole_logits'] else 'no'
  line = f'{row["temporary_mib"]:15.1f}{ratio:>12}{row["tera_flops"]:13.2f}{by_compiler:>13}{whole:>15}'
  for name, kernel in row.get('kernels', {}).items():
    line += f'\n{name:>32}: {kernel["registers"]} registers, {kernel["spilled_bytes"]} bytes spilled'
  return line


def check() -> tuple[()]:
  """Exits with one line if the flags are invalid."""
  parsing.read_sizes(SIZE, 3)
  if TALL.value:
    parsing.read_sizes(TALL, 3)
  if ONLY.value is not None:
    known = [f'{target}/{program}' for target in [*TPUS, GPU] for program in PROGRAMS]
    parsing.check_known('only', [ONLY.value], known)
  paths.check_file('json', JSON.value)
  return ()


def main() -> None:
  """Compiles all programs for all targets and prints tables."""
  if ONLY.value:
    target, program = ONLY.value.split('/')
    print(storage.to_json(compile_one(target, program, tuple(map(int, SIZE.value)))))
    return
  targets = present(TARGETS.value)
  tables = [{'size': SIZE.value, 'rows': table(targets, SIZE.value)}]
  if TALL.value and 'v5e' in targets:
    tables.append({'size': TALL.value, 'rows': table(['v5e'], TALL.value)})
  if JSON.value:
    storage.write_json(JSON.value, tables)


if __name__ == '__main__':
  run(main, check)
