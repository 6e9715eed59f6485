"""Reads Hugging Face model directories as checkpoints, to use them as references."""

import pathlib

from jax.sharding import Mesh

from critkl_jax.models import huggingface
from critkl_jax.models.architectures import make_model
from critkl_jax.runtime.checkpoint import Checkpoint
from critkl_jax.runtime.checkpoint_info import CheckpointInfo
from critkl_jax.tasks.questions import TextFinetuning, settings_for
from critkl_jax.training.config import ImportConfig


def find_imported(config: TextFinetuning) -> Checkpoint:
  """Describes a model directory as a checkpoint for the task `questions`, with `params` None.

  Reads no weights and starts no device.

  Args:
    config: `model` names the directory; the others are settings of the task.

  Raises:
    PretrainedError: as `huggingface.read_config`.
    ValueError: if the file of prompts cannot be read.
  """
  directory = pathlib.Path(config.model).expanduser().absolute()
  model = make_model(huggingface.read_config(directory))
  task = settings_for(config, str(directory), model.vocab_size)
  info = CheckpointInfo(model.config, task, ImportConfig(directory=str(directory)), model.name)
  return Checkpoint(params=None, info=info, step=0, path=directory)


def load_imported(config: TextFinetuning, mesh: Mesh | None = None) -> Checkpoint:
  """Reads a model directory as a checkpoint; its critic is fresh.

  Args:
    config: as in `find_imported`.
    mesh: the devices over which the parameters are spread; the first device of this host if None.

  Raises:
    PretrainedError: as `huggingface.load_pretrained`.
    ValueError: if the file of prompts cannot be read.
  """
  found = find_imported(config)
  params = huggingface.load_pretrained(found.path, mesh=mesh).params
  return Checkpoint(params=params, info=found.info, step=0, path=found.path)
