"""Many iterations take no more memory than a few, and compile nothing anew."""

import gc
import os
import pathlib

import jax
import numpy as np
import pytest
from checkpoints import SMOKE, noisy

from critkl_jax import checkpoint, runner
from critkl_jax.compilation import compilation_seconds
from critkl_jax.config import replace
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.tasks.addition import plus_task
from critkl_jax.train_step import make_train_step


def resident_bytes():
  """Returns the memory that this process holds, as Linux counts it."""
  gc.collect()
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def run_long(workdir, num_iterations, looks):
  """Runs the smoke preset; returns at each look its memory, its arrays and the seconds of compilation so far."""
  config = replace(FINETUNE_PRESETS['smoke'], num_iterations=num_iterations)
  model, seen = GPT2(SMOKE.model), {}
  state = init_finetuning(model, config, noisy(init_params(model, jax.random.key(0)), 0.3))
  key, hyperparameters = finetuning_keys(config)[1], Hyperparameters.of(config)
  step = make_train_step(model, plus_task(1, config.extra_digits), config)

  def advance(state, number):
    if number in looks:
      seen[number] = resident_bytes(), len(jax.live_arrays()), compilation_seconds()
    return step(state, key, hyperparameters)

  info = checkpoint.CheckpointInfo(SMOKE.model, SMOKE.known_digits, config)
  runner.run(advance, state, num_iterations, info, workdir, save_every=50)
  assert len(runner.read_metrics(workdir / 'metrics.jsonl')) == num_iterations
  assert step._cache_size() == 1
  return seen


LINUX = pytest.mark.skipif(not pathlib.Path('/proc/self/statm').is_file(), reason='asks Linux for memory')


@LINUX
def test_memory_that_is_held_is_seen():
  before = resident_bytes()
  held = np.ones(2**24)
  assert resident_bytes() - before > 0.9 * held.nbytes


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')
def test_iterations_leave_no_arrays_and_compile_nothing(tmp_path):
  seen = run_long(tmp_path, 120, (60, 119))
  assert seen[60][1:] == seen[119][1:]


@pytest.mark.long
@LINUX
@pytest.mark.usefixtures('standard_promotion')
def test_two_thousand_iterations_hold_no_more_memory_than_two_hundred(tmp_path):
  seen = run_long(tmp_path, 2000, range(200, 2000, 200))
  memory, arrays, compiled = zip(*seen.values())
  print(f'{memory[0] / 2**20:.1f} MiB after 200 iterations, {memory[-1] / 2**20:.1f} after 1,800: '
        f'{memory[-1] / memory[0] - 1:+.2%}; live arrays {set(arrays)}; MiB: '
        f'{[round(value / 2**20, 1) for value in memory]}')
  assert memory[-1] < 1.02 * memory[0]
  assert len(set(arrays)) == len(set(compiled)) == 1
