"""Writes a model of real size, reads it and trains it for one whole step on the CPU; measures the memory of the two.

    python -m benchmarks.large_model --workdir=runs/large_model --json=large_model.json

A Qwen3 of half a billion random parameters is written as a model directory, read from there, and takes one step: two
prompts of 32 tokens, two responses of 32. The step is compiled before, from shapes, and read from the cache of
programs. Each part is a process of its own, whose greatest resident memory is read from the operating system (Linux).
"""

import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from critkl_jax import sharding
from critkl_jax.models.huggingface import load_pretrained, read_config, save_pretrained
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.models.llama import LlamaConfig, llama
from critkl_jax.runtime import compilation, storage
from critkl_jax.tasks.fixed_lengths import fixed_lengths
from critkl_jax.tasks.task import Task
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.train_step import make_train_step
from experiments import paths
from experiments.exits import refuse
from experiments.flags import run

WORKDIR = flags.DEFINE_string('workdir', 'runs/large_model', 'Directory of the model, which takes 2 GB.')
PART = flags.DEFINE_enum('part', None, ['write', 'read', 'compile', 'step'], 'One part alone; all if not given.')
SCAN = flags.DEFINE_bool('scan_layers', False, 'Run the blocks of the step as a loop.')
REMAT = flags.DEFINE_bool('remat', False, 'Recompute the blocks in the backward pass of the step.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')

MODEL = LlamaConfig(vocab_size=151936, context_length=32768, num_layers=24, num_heads=14, num_kv_heads=2, width=896,
                    head_width=64, hidden_width=4864, rope_base=1e6, qk_norm=True)
LENGTH, EPISODES = 32, 2


def check() -> tuple[pathlib.Path]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  paths.check_file('json', JSON.value)
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  if any((workdir / 'model').glob('*')) and not (workdir / 'model' / 'config.json').exists():
    refuse(f'--workdir: {workdir / "model"} holds no whole model; it is kept: move it away, or give another directory.')
  return (workdir,)


def main(workdir: pathlib.Path) -> None:
  """Runs one part and prints its result as JSON, or all parts, each in a process of its own."""
  if PART.value:
    compilation.keep_programs(str(workdir / 'programs'))
    print(json.dumps(PARTS[PART.value](workdir / 'model'), allow_nan=False))
    return
  found, written = {}, (workdir / 'model' / 'config.json').exists()
  for part in [name for name in PARTS if name != 'write' or not written]:
    done = subprocess.run([sys.executable, '-m', 'benchmarks.large_model', f'--part={part}', f'--workdir={workdir}',
                           f'--scan_layers={SCAN.value}', f'--remat={REMAT.value}'], text=True, stdout=subprocess.PIPE,
                          check=True)
    found[part] = json.loads(done.stdout.splitlines()[-1])
    print(f'{part}: ' + ', '.join(f'{name} {value:,.3g}' if isinstance(value, float) else f'{name} {value:,}'
                                  for name, value in found[part].items()), flush=True)
  if JSON.value:
    storage.write_json(JSON.value, found)


def write(directory: pathlib.Path) -> dict[str, Any]:
  """Writes the model with random parameters."""
  start, model = time.perf_counter(), llama(MODEL)
  params = jax.jit(model.init)(jax.random.key(0))
  save_pretrained(directory, model, params)
  return {'parameters': sum(x.size for x in jax.tree.leaves(params)), 'seconds': time.perf_counter() - start}


def read(directory: pathlib.Path) -> dict[str, Any]:
  """Reads the model; the goal is a peak below its parameters plus twice the largest tensor."""
  jax.block_until_ready(jax.numpy.zeros(1))  # starts the device
  before, start = megabytes('VmRSS'), time.perf_counter()
  params = load_pretrained(directory).params
  seconds = time.perf_counter() - start
  largest = max(x.nbytes for x in jax.tree.leaves(params)) / 1e6
  stays, peak = total(params), megabytes('VmHWM') - before
  return {'seconds': seconds, 'stays_mb': stays, 'largest_mb': largest, 'peak_mb': peak,
          'excess_in_largest': (peak - stays) / largest}


def compile_step(directory: pathlib.Path) -> dict[str, Any]:
  """Compiles the step from shapes alone, for the cache of programs."""
  model, task, config = setting(read_config(directory, **numerics()))
  start = time.perf_counter()
  state = jax.eval_shape(lambda: init_finetuning(model, config, model.init(jax.random.key(0))))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  state = sharding.shapes(state, jax.tree.map(lambda _: here, state))  # committed, as `init_finetuning` makes it
  compiled = make_train_step(model, task, config).lower(state, *inputs(config)).compile()
  return {'seconds': time.perf_counter() - start, 'peak_mb': megabytes('VmHWM'),
          'temporary_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6}


def step(directory: pathlib.Path) -> dict[str, Any]:
  """Takes one step; the goal is a peak of at most 1.3 times parameters, optimizer and reference."""
  found = load_pretrained(directory, **numerics())
  model, task, config = setting(found.model.config)
  state = init_finetuning(model, config, found.params)
  del found
  holds = total((state.params, state.opt_state, state.ref_params))
  start = time.perf_counter()
  state, metrics = jax.block_until_ready(make_train_step(model, task, config)(state, *inputs(config)))
  peak = megabytes('VmHWM')
  return {'seconds': time.perf_counter() - start, 'reward': float(metrics['reward']),
          'gradient_norm': float(metrics['grad_norm']), 'holds_mb': holds, 'peak_mb': peak,
          'peak_over_holds': peak / holds}


def numerics() -> dict[str, bool]:
  """Returns the fields of the model's config that the flags set."""
  return {'scan_layers': SCAN.value, 'remat': REMAT.value}


def setting(config: LlamaConfig) -> tuple[LanguageModel, Task, FinetuneConfig]:
  """Returns the model, the task and the config of the step."""
  return llama(config), fixed_lengths(config.vocab_size, LENGTH, LENGTH), FinetuneConfig(
      episodes=EPISODES, minibatches=1, rollout='cached', **numerics())


def inputs(config: FinetuneConfig) -> tuple[Any, ...]:
  """Returns the inputs of the step besides the state."""
  return finetuning_keys(config)[1], Hyperparameters.of(config)


def total(tree: Any) -> float:
  """Returns the megabytes of all arrays, each counted once."""
  return sum({id(x): x.nbytes for x in jax.tree.leaves(tree)}.values()) / 1e6


def megabytes(kind: str) -> float:
  """Returns the resident megabytes of this process: `VmRSS` now, `VmHWM` at most so far."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{kind}:\s+(\d+) kB', status)[1]) * 1024 / 1e6


PARTS: dict[str, Callable[[pathlib.Path], dict[str, Any]]] = {
    'write': write, 'read': read, 'compile': compile_step, 'step': step}

if __name__ == '__main__':
  run(main, check)
