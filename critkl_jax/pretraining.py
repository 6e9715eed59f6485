"""Pre-training from the first step to the parameters that fine-tuning starts from."""

import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from critkl_jax import checkpoint, resuming, runner, sharding, storage
from critkl_jax.config import PretrainConfig
from critkl_jax.gpt2 import GPT2
from critkl_jax.pretrain_step import draw_longest, init_pretraining, make_pretrain_step, pretraining_keys
from critkl_jax.records import TrainState
from critkl_jax.tasks.addition import pretraining_task


def pretrain(config: PretrainConfig, workdir: str | os.PathLike, mesh: Mesh | None = None,
             track: Callable | None = None, damaged: str = 'skip') -> TrainState:
  """Pre-trains a model, from where it was stopped if it was, and leaves its parameters in `WORKDIR/reference`.

  Args:
    config: model, problems and optimizer.
    workdir: directory of checkpoints and metrics, as in `runner.run`.
    mesh: the devices over which examples and model are spread; None for one device.
    track: opens the trackers of the metrics, as in `runner.run`.
    damaged: as in `runner.run`.

  Returns:
    The last state.

  Raises:
    CheckpointError, OSError: as `runner.run`; CheckpointError also if `WORKDIR/reference` was made with other settings.
    Interrupted: as `runner.run`.
  """
  model, workdir = GPT2(config.model), storage.to_path(workdir)
  info = check_pretraining(config, workdir)
  tasks = {n: pretraining_task(config.known_digits, n) for n in range(1, config.known_digits + 1)}
  steps = {n: jax.jit(make_pretrain_step(model, task, config, mesh), donate_argnums=0) for n, task in tasks.items()}
  key = sharding.replicate(pretraining_keys(config)[1], mesh)
  state = runner.run(
      lambda state, number: steps[draw_longest(config, number)](state, key), init_pretraining(model, config, mesh),
      config.num_steps, info, workdir, config.save_every, show=('loss', 'accuracy'), track=track,
      damaged=damaged)
  checkpoint.save_params(workdir / 'reference', state.params, info, int(state.step))
  return state


def check_pretraining(config: PretrainConfig, workdir: str | os.PathLike) -> checkpoint.CheckpointInfo:
  """Checks that a workdir is new or holds this pre-training, and returns the description of its checkpoints.

  Changes nothing.

  Raises:
    CheckpointError: if the workdir holds a run or a reference of other settings.
  """
  info = checkpoint.CheckpointInfo(model=config.model, known_digits=config.known_digits, training=config)
  resuming.check_workdir(workdir, info)
  path = checkpoint.latest(storage.to_path(workdir) / 'reference')
  if path is not None:  # parameters of another pre-training are never overwritten, and would be taken for this one's
    resuming.check_same(path, info, checkpoint.read_info(path))
  return info
