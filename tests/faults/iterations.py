"""Runs iterations in a process of its own and prints what it holds, every so many of them.

    python tests/faults/iterations.py WORKDIR NUMBER EVERY SAVE_EVERY
"""

import ctypes
import gc
import json
import os
import pathlib
import sys

import jax
from checkpoints import SMOKE, noisy

from critkl_jax.config import replace
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint, loop
from critkl_jax.runtime.compilation import compilation_seconds
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS
from critkl_jax.training.train_step import make_train_step


def resident_bytes():
  """Returns the memory that this process holds, as Linux counts it, without what the allocator keeps for later."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def run(workdir, num_iterations, every, save_every):
  """Runs the smoke preset with fewer and shorter episodes; returns what is held at every so many iterations."""
  config = replace(FINETUNE_PRESETS['smoke'], num_iterations=num_iterations, extra_digits=0, episodes=2, minibatches=1)
  model, seen = gpt2(SMOKE.model), {'memory': [], 'arrays': [], 'compilation_seconds': []}
  state = init_finetuning(model, config, noisy(model.init(jax.random.key(0)), 0.3))
  key, hyperparameters = finetuning_keys(config)[1], Hyperparameters.of(config)
  step = make_train_step(model, plus_task(1, config.addition.extra_digits), config)

  def advance(state, number):
    if number % every == every - 1:  # not right after a save, whose arrays Orbax still holds
      seen['memory'].append(resident_bytes())
      seen['arrays'].append(len(jax.live_arrays()))
      seen['compilation_seconds'].append(compilation_seconds())
    return step(state, key, hyperparameters)

  info = checkpoint.CheckpointInfo(SMOKE.model, Addition(SMOKE.addition.known_digits), config)
  loop.run(advance, state, num_iterations, info, workdir, save_every=save_every)
  return seen


if __name__ == '__main__':
  print(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
