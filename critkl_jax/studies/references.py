"""The references of a study's runs: the shipped one, or others, pre-trained when they are first needed."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from critkl_jax.config import replace
from critkl_jax.runtime import checkpoint, hosts
from critkl_jax.runtime.checkpoint import Checkpoint, CheckpointError
from critkl_jax.runtime.pretraining import pretrain
from critkl_jax.studies.catalog import OF_PRESET, Study
from critkl_jax.tasks.known_tasks import KNOWN_TASKS
from critkl_jax.training.config import PretrainConfig
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

SHIPPED = {'tiny': 'addition', 'stories': 'stories'}  # preset -> task whose reference in the package was made with it


def references_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the workdir of a reference's pre-training."""
  return workdir / 'working' / 'references' / (name or 'base')


def pretrain_config(preset: str, changes: Mapping[str, Any]) -> PretrainConfig:
  """Returns the config of a reference's pre-training: the preset with changes.

  Raises:
    ValueError: if a change is not allowed.
  """
  return replace(PRETRAIN_PRESETS[preset], **changes)


def suited(study: Study, preset: str) -> Study:
  """Removes the arms of a study that make no sense at a preset, and names them in its note.

  It removes arms whose changes give the preset's own pre-training, and arms with such changes whose problems of N + k
  do not fit into the context.
  """
  base, left_out = FINETUNE_PRESETS[preset], []
  known = KNOWN_TASKS[base.task]
  for arm in study.arms:
    config = pretrain_config(preset, arm.pretraining)
    task = known.make(known.finetuned(known.pretrained(config), base))
    too_long = task.prompt_length + task.response_length > config.model.context_length
    if arm.pretraining and (too_long or config == pretrain_config(preset, {})):
      left_out.append(arm.label)
  if not left_out:
    return study
  return dataclasses.replace(
      study, arms=tuple(arm for arm in study.arms if arm.label not in left_out),
      contrasts=tuple(pair for pair in study.contrasts if not set(pair) & set(left_out)),
      note=f'{study.note} Left out at preset {preset}, whose own reference they have, or whose context is too short: '
           f'{"; ".join(left_out)}.'.strip())


def with_numbers(study: Study, preset: str) -> Study:
  """Replaces `OF_PRESET` in a study's labels by the preset's number of digits or width."""
  config = pretrain_config(preset, {})

  def name(label):
    return label.replace(f'N {OF_PRESET}', f'N = {config.addition.known_digits}').replace(
        f'width {OF_PRESET}', f'width {config.model.width}')

  arms = tuple(dataclasses.replace(arm, label=name(arm.label), condition=name(arm.condition)) for arm in study.arms)
  return dataclasses.replace(study, arms=arms, contrasts=tuple((name(a), name(b)) for a, b in study.contrasts))


def find_reference(preset: str, name: str, changes: Mapping[str, Any], workdir: pathlib.Path, damaged: str = 'skip'
                   ) -> Checkpoint:
  """Loads a reference; pre-trains it first if it does not exist.

  Args:
    preset: preset of the studies.
    name: name of the reference, `catalog.reference_name` of its changes; empty for the preset's own.
    changes: field -> value, where its pre-training differs from the preset's.
    workdir: directory of the studies.
    damaged: as in `loop.run`.

  Raises:
    CheckpointError: as `loop.run`, or if the reference was the result of a run and is gone.
    Interrupted: as `loop.run`.
  """
  home = references_path(workdir, name)
  if checkpoint.latest(home / 'reference') is None:
    if not name and preset in SHIPPED:
      return checkpoint.load_checkpoint(checkpoint.SHIPPED_REFERENCES[SHIPPED[preset]])
    if name and not changes:
      raise CheckpointError(f'{home}: no such reference; it was the result of a run.')
    config = pretrain_config(preset, changes)
    hosts.say(f'Pre-training the reference {name or preset}: {config.num_steps} steps.')
    pretrain(config, home, damaged=damaged)
  return checkpoint.load_checkpoint(home / 'reference')
