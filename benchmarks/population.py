"""Members of a study in one program, for each mapping, beside as many single runs one after another.

    python -m benchmarks.population --json=population.json

Every program is compiled in a process of its own, as a user's runs are, with no cache of compiled programs; a process's
start and the reading of checkpoints count nowhere. Of single runs only some are made, and the time of all follows from
their mean. An iteration is one of `experiments.finetune` at the preset `tiny`.
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
from critkl_jax import checkpoint, population, sharding, storage
from critkl_jax.config import replace
from critkl_jax.gpt2 import GPT2
from critkl_jax.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.tasks.addition import plus_task
from critkl_jax.train_step import make_train_step
from experiments.flags import keep_no_programs, run

keep_no_programs()
MEMBERS = flags.DEFINE_integer('members', 16, 'Members of the study.', lower_bound=1)
SINGLES = flags.DEFINE_integer('singles', 3, 'Single runs that are made.', lower_bound=1)
ITERATIONS = flags.DEFINE_integer('iterations', 2, 'Timed iterations of a run.', lower_bound=1)
EPISODES = flags.DEFINE_integer('episodes', 96, 'Episodes in an iteration.', lower_bound=3)
MAPPINGS = flags.DEFINE_multi_enum('mapping', population.MAPPINGS, population.MAPPINGS, 'Mappings to time.')
ONLY = flags.DEFINE_string('only', None, '`single` or a mapping: times this one here and prints a line of JSON.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')


def time_population(mapping: str) -> dict[str, Any]:
  """Times compilation and iterations of all members in one program."""
  base = replace(FINETUNE_PRESETS['tiny'], episodes=EPISODES.value)
  configs = population.product(base, certainty_exponent=(0.0, 10.0, 150.0, 1000.0), seed=range(-(-MEMBERS.value // 4)))
  configs = configs[:MEMBERS.value]
  reference = checkpoint.load_checkpoint()
  model, task = GPT2(base.model_of(reference.info.model)), plus_task(reference.info.known_digits, base.extra_digits)
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
  model = GPT2(config.model_of(reference.info.model))
  task = plus_task(reference.info.known_digits, config.extra_digits)
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
  """Returns what a new process measures, with a device of each core for `shard` on a CPU."""
  devices = min(os.cpu_count() or 1, MEMBERS.value) if what == 'shard' else 1
  environment = os.environ | {
      'JAX_ENABLE_COMPILATION_CACHE': 'false',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'}
  command = [sys.executable, '-m', 'benchmarks.population', f'--only={what}', f'--members={MEMBERS.value}',
             f'--iterations={ITERATIONS.value}', f'--episodes={EPISODES.value}']
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Measures one after another and prints a table."""
  if ONLY.value:
    print(json.dumps(time_single() if ONLY.value == 'single' else time_population(ONLY.value)))
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
    storage.to_path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
