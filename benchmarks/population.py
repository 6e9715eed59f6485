"""Times a population in one program, for each mapping, against as many single runs one after another.

    python -m benchmarks.population --json=population.json

Every program is compiled in its own process, as for a user, without a cache of compiled programs; starting processes
and reading checkpoints are not timed. Only a few single runs are made, and their mean is extrapolated. An iteration is
one of `experiments.finetune` with the preset `tiny`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
from absl import flags

from benchmarks import timing
from critkl_jax import sharding
from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint, storage
from critkl_jax.tasks.addition import plus_task
from critkl_jax.training import population
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS
from critkl_jax.training.train_step import make_train_step
from experiments import parsing, paths
from experiments.exits import refuse
from experiments.flags import keep_no_programs, run

keep_no_programs()
MEMBERS = flags.DEFINE_integer('members', 16, 'Members of the study.', lower_bound=1)
SINGLES = flags.DEFINE_integer('singles', 3, 'Single runs to time.', lower_bound=1)
ITERATIONS = flags.DEFINE_integer('iterations', 2, 'Timed iterations of a run.', lower_bound=1)
EPISODES = flags.DEFINE_integer('episodes', 96, 'Episodes in an iteration.', lower_bound=3)
MAPPINGS = flags.DEFINE_multi_enum('mapping', population.MAPPINGS, population.MAPPINGS, 'Mappings to time.')
ONLY = flags.DEFINE_string('only', None, '`single` or a mapping: times only this, here, and prints a line of JSON.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')


def time_population(mapping: str) -> dict[str, Any]:
  """Times compilation and iterations of all members in one program."""
  base = replace(FINETUNE_PRESETS['tiny'], episodes=EPISODES.value)
  configs = population.product(base, certainty_exponent=(0.0, 10.0, 150.0, 1000.0), seed=range(-(-MEMBERS.value // 4)))
  configs = configs[:MEMBERS.value]
  reference = checkpoint.load_checkpoint()
  model = gpt2(base.model_of(reference.info.model))
  task = plus_task(reference.info.task.known_digits, base.addition.extra_digits)
  mesh = population.members_mesh(len(configs)) if mapping == 'shard' else sharding.make_mesh('data:1')
  state = population.init_population(model, configs, reference.params, mesh)
  numbers = population.numbers_of(configs, mesh)
  start = time.perf_counter()
  step, memory = population.compile_step(model, task, configs, mesh, mapping)
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(ITERATIONS.value):
    (state, _), elapsed = timing.result_and_seconds(step, state, *numbers)
    seconds.append(elapsed)
  return {'compile': compile_seconds, 'iterations': seconds, 'memory_mib': memory.total / 2**20, 'devices': mesh.size,
          'device': jax.devices()[0].device_kind}


def time_single() -> dict[str, Any]:
  """Times compilation and iterations of one run."""
  config = replace(FINETUNE_PRESETS['tiny'], episodes=EPISODES.value)
  reference = checkpoint.load_checkpoint()
  model = gpt2(config.model_of(reference.info.model))
  task = plus_task(reference.info.task.known_digits, config.addition.extra_digits)
  state, numbers = init_finetuning(model, config, reference.params), Hyperparameters.of(config)
  _, key = finetuning_keys(config)
  start = time.perf_counter()
  step = make_train_step(model, task, config).lower(state, key, numbers).compile()
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(ITERATIONS.value):
    (state, _), elapsed = timing.result_and_seconds(step, state, key, numbers)
    seconds.append(elapsed)
  return {'compile': compile_seconds, 'iterations': seconds, 'device': jax.devices()[0].device_kind}


def in_own_process(what: str) -> dict[str, Any]:
  """Runs one measurement in a new process; `shard` on a CPU gets one device for each core."""
  devices = min(os.cpu_count() or 1, MEMBERS.value) if what == 'shard' else 1
  environment = os.environ | {
      'JAX_ENABLE_COMPILATION_CACHE': 'false',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'}
  command = [sys.executable, '-m', 'benchmarks.population', f'--only={what}', f'--members={MEMBERS.value}',
             f'--iterations={ITERATIONS.value}', f'--episodes={EPISODES.value}']
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def check() -> tuple[()]:
  """Exits with one line if the flags are invalid."""
  if ONLY.value:
    parsing.check_known('only', [ONLY.value], ['single', *population.MAPPINGS])
  if EPISODES.value % 3:
    refuse(f'--episodes: expected a multiple of 3, got {EPISODES.value}.')
  paths.check_file('json', JSON.value)
  return ()


def main() -> None:
  """Measures single runs and each mapping, and prints a table."""
  if ONLY.value:
    print(storage.to_json(time_single() if ONLY.value == 'single' else time_population(ONLY.value)))
    return
  singles = [in_own_process('single') for _ in range(SINGLES.value)]
  compiling = statistics.mean(single['compile'] for single in singles)
  running = statistics.mean(sum(single['iterations']) for single in singles)
  result = {'device': singles[0]['device'], 'members': MEMBERS.value, 'iterations': ITERATIONS.value,
            'episodes': EPISODES.value, 'singles': singles,
            'one_after_another': {'compile': MEMBERS.value * compiling, 'run': MEMBERS.value * running}}
  print(f'{result["device"]}, {MEMBERS.value} members, {ITERATIONS.value} iterations of {EPISODES.value} episodes\n'
        f'{"":>18}{"compile s":>11}{"run s":>9}{"times faster":>14}{"with compilation":>18}{"MiB":>8}\n'
        f'{"single runs":>18}{MEMBERS.value * compiling:11.1f}{MEMBERS.value * running:9.1f}', flush=True)
  for mapping in MAPPINGS.value:
    found = in_own_process(mapping)
    if found['device'] != result['device']:
      raise SystemExit(f'error: {mapping} ran on {found["device"]}, single runs on {result["device"]}.')
    found['run'] = sum(found['iterations'])
    found['ratio'] = MEMBERS.value * running / found['run']
    found['ratio_with_compilation'] = MEMBERS.value * (compiling + running) / (found['compile'] + found['run'])
    result[mapping] = found
    print(f'{mapping:>18}{found["compile"]:11.1f}{found["run"]:9.1f}{found["ratio"]:14.2f}'
          f'{found["ratio_with_compilation"]:18.2f}{found["memory_mib"]:8.0f}', flush=True)
  if JSON.value:
    storage.write_json(JSON.value, result)


if __name__ == '__main__':
  run(main, check)
