"""Runs pre-training and saves the reference that fine-tuning starts from."""

import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.architectures import make_model
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, loop, resuming, storage
from critkl_jax.tasks.known_tasks import KNOWN_TASKS, known_task_of
from critkl_jax.training.config import PretrainConfig
from critkl_jax.training.pretrain_step import init_pretraining, make_pretrain_step, pretraining_keys


def pretrain(config: PretrainConfig, workdir: str | os.PathLike, mesh: Mesh | None = None,
             track: Callable | None = None, damaged: str = 'skip') -> TrainState:
  """Pre-trains a model, resuming a stopped run, and saves its parameters in `WORKDIR/reference`.

  Args:
    config: model, problems and optimizer.
    workdir: directory of checkpoints and metrics, as in `loop.run`.
    mesh: the devices over which examples and parameters are sharded; None for one device.
    track: opens the trackers of the metrics, as in `loop.run`.
    damaged: as in `loop.run`.

  Returns:
    The last state.

  Raises:
    CheckpointError: as `loop.run`, or if `WORKDIR/reference` was made with other settings.
    OSError, Interrupted: as `loop.run`.
  """
  model, workdir = make_model(config.model_config), storage.to_path(workdir)
  info = check_pretraining(config, workdir)
  tasks, pick = known_task_of(info.task).curriculum(info.task)
  steps = [jax.jit(make_pretrain_step(model, task, config, mesh), donate_argnums=0) for task in tasks]
  key = sharding.replicate(pretraining_keys(config)[1], mesh)
  state = loop.run(
      lambda state, number: steps[pick(config.seed, number)](state, key), init_pretraining(model, config, mesh),
      config.num_steps, info, workdir, config.save_every, show=('loss', 'accuracy'), track=track,
      damaged=damaged)
  checkpoint.save_params(workdir / 'reference', state.params, info, int(state.step))
  return state


def check_pretraining(config: PretrainConfig, workdir: str | os.PathLike) -> checkpoint.CheckpointInfo:
  """Checks that a workdir is new or holds this pre-training, and returns the description of its checkpoints.

  Writes nothing.

  Raises:
    CheckpointError: if the workdir holds a run or a reference made with other settings.
  """
  task = KNOWN_TASKS[config.task].pretrained(config)
  info = checkpoint.CheckpointInfo(model=config.model_config, task=task, training=config,
                                   architecture=config.architecture)
  resuming.check_workdir(workdir, info)
  path = checkpoint.latest(storage.to_path(workdir) / 'reference')
  if path is not None:  # another pre-training's parameters: never overwritten, and never taken for this one's
    resuming.check_same(path, info, checkpoint.read_info(path))
  return info
