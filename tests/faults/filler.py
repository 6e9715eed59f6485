"""A run without a model, started as a binary: `python filler.py WORKDIR STEPS KILOBYTES [LIMIT]`.

Its checkpoints have so many kilobytes; no file may be longer than LIMIT kilobytes.
"""

import resource
import sys

import jax.numpy as jnp

from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, loop
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from experiments.flags import run

INFO = checkpoint.CheckpointInfo(PRETRAIN_PRESETS['smoke'].model, Addition(1), FINETUNE_PRESETS['smoke'])


def main(workdir, steps, kilobytes, limit='0'):
  if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * int(limit),) * 2)
  noise = jnp.sin(jnp.arange(250 * int(kilobytes), dtype=jnp.float32))  # which no compression makes shorter
  start = TrainState({'w': noise}, {'m': jnp.ones(3)}, jnp.int32(0))

  def step(state, number):
    moved = {'w': state.params['w'] * 1.01}
    return state.replace(params=moved, step=state.step + 1), {'loss': moved['w'][1], 'num_tokens': jnp.float32(1)}

  state = loop.run(step, start, int(steps), INFO, workdir, 1)
  print('finished', int(state.step))


if __name__ == '__main__':
  run(main, lambda *given: given, 'WORKDIR', 'STEPS', 'KILOBYTES', *(['LIMIT'] if len(sys.argv) > 4 else []))
