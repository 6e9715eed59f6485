"""Finds and loads the checkpoints of a policy and its reference, checks that they fit, and makes their models."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax

from critkl_jax.models.architectures import ModelConfig, make_model, reference_config
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.runtime import checkpoint as checkpoint_lib
from critkl_jax.runtime import storage
from critkl_jax.runtime.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from critkl_jax.tasks.known_tasks import differing_settings
from critkl_jax.training.config import FinetuneConfig


def load_pair(path: str | os.PathLike | Checkpoint, reference: str | os.PathLike | Checkpoint | None = None,
              load: Callable[..., Checkpoint] = load_checkpoint, model: LanguageModel | None = None
              ) -> tuple[Checkpoint, Checkpoint]:
  """Loads the checkpoints of a policy and of its reference.

  Args:
    path, reference: as in `read_tokens`.
    load: path -> checkpoint; pass `find_checkpoint` to leave the parameters out.
    model: the model of both checkpoints, if their architecture is not known here.

  Raises:
    CheckpointError: if a checkpoint cannot be read, or their vocabularies or pre-training tasks differ.
  """
  load = functools.partial(load, model=model) if model else load
  policy = path if isinstance(path, Checkpoint) else load(path)
  load = functools.partial(load, model=policy.model) if policy.model else load
  if not isinstance(reference, Checkpoint):
    found = reference_path(policy) if reference is None else reference
    reference = policy if found == policy.path else load(found)
  pairs = {'vocab_size': (vocab_size_of(policy), vocab_size_of(reference)),
           **differing_settings(policy.info.task, reference.info.task)}
  for name, (one, two) in pairs.items():
    if one != two:
      raise CheckpointError(f'{policy.path}: {name} is {one}, but {two} in the reference {reference.path}; they do not '
                            'belong together.')
  return policy, reference


def reference_path(policy: Checkpoint) -> storage.Path:
  """Returns the path of a checkpoint's reference: the copy in its workdir or its sweep's, else the path in its config.

  A pre-trained model is its own reference, and so is an imported one.
  """
  if policy.info.kind != 'finetune':
    return policy.path
  home = policy.path.parent.parent
  study = [home.parent.parent] if home.parent.name == 'members' else []  # a sweep in a bucket has no links
  for kept in (checkpoint_lib.latest(place / 'reference') for place in [home, *study]):
    if kept is not None:
      return kept
  return checkpoint_lib.find_checkpoint(checkpoint_lib.reference_of(policy.info.training)).path


def loss_of(policy: Checkpoint) -> LossConfig:
  """Returns the loss that a policy was fine-tuned with; the default loss for a pre-trained model."""
  training = policy.info.training
  return training.loss if isinstance(training, FinetuneConfig) else LossConfig()


def vocab_size_of(found: Checkpoint) -> int:
  """Returns V of a checkpoint: of its `model` if it has one, since the config of an unknown architecture is a dict."""
  return found.model.vocab_size if found.model else found.info.model.vocab_size


def model_of(policy: Checkpoint) -> LanguageModel:
  """Makes a policy's network as in training, but without `remat`, and with `auto` for `cudnn` attention without a GPU.

  Returns the policy's `model` unchanged if it has one.
  """
  return policy.model or make_model(_on_this_device(policy.info.model))


def reference_model_of(policy: Checkpoint, reference: Checkpoint) -> LanguageModel:
  """Makes a reference's network as in the policy's training (`architectures.reference_config`)."""
  if policy.model or reference.model:
    return reference.model or policy.model
  return make_model(_on_this_device(reference_config(policy.info.model, reference.info.model)))


def _on_this_device(config: ModelConfig) -> ModelConfig:
  here = config.attention != 'cudnn' or jax.default_backend() == 'gpu'
  return dataclasses.replace(config, remat=False, attention=config.attention if here else 'auto')
