"""The references of a study's runs: the one that comes with the package, or others, pre-trained where they are missing.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from critkl_jax import checkpoint, hosts
from critkl_jax.checkpoint import Checkpoint, CheckpointError
from critkl_jax.config import PretrainConfig, replace
from critkl_jax.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from critkl_jax.pretraining import pretrain
from critkl_jax.studies.catalog import OF_PRESET, Study
from critkl_jax.tasks.addition import plus_task

SHIPPED_PRESET = 'tiny'  # that of the reference in the package; of its checkpoints the one of step 2200 was taken


def references_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the workdir of a reference's pre-training."""
  return workdir / 'working' / 'references' / (name or 'base')


def pretrain_config(preset: str, changes: Mapping[str, Any]) -> PretrainConfig:
  """Returns the config of a reference's pre-training.

  Raises:
    ValueError: if a change is not allowed.
  """
  return replace(PRETRAIN_PRESETS[preset], **changes)


def suited(study: Study, preset: str) -> Study:
  """Returns a study without the arms that make no sense at a preset, which its note names: those whose reference is
  pre-trained as the preset's own is, and those whose N + k digits do not fit into the context."""
  extra_digits, left_out = FINETUNE_PRESETS[preset].extra_digits, []
  for arm in study.arms:
    config = pretrain_config(preset, arm.pretraining)
    task = plus_task(config.known_digits, extra_digits)
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
  """Returns a study whose labels have the preset's own number of digits and width in the place of `OF_PRESET`."""
  config = pretrain_config(preset, {})

  def name(label):
    return label.replace(f'N {OF_PRESET}', f'N = {config.known_digits}').replace(
        f'width {OF_PRESET}', f'width {config.model.width}')

  arms = tuple(dataclasses.replace(arm, label=name(arm.label), condition=name(arm.condition)) for arm in study.arms)
  return dataclasses.replace(study, arms=arms, contrasts=tuple((name(a), name(b)) for a, b in study.contrasts))


def find_reference(preset: str, name: str, changes: Mapping[str, Any], workdir: pathlib.Path, damaged: str = 'skip'
                   ) -> Checkpoint:
  """Returns a reference, and pre-trains it first if it is not there.

  Args:
    preset: of the studies.
    name: of the reference, `catalog.reference_name` of its changes; empty for the preset's own.
    changes: field -> value, where its pre-training differs from the preset's.
    workdir: of the studies.
    damaged: as in `runner.run`.

  Raises:
    CheckpointError: as `runner.run`, or if it is the result of a run, which is gone.
    Interrupted: as `runner.run`.
  """
  home = references_path(workdir, name)
  if checkpoint.latest(home / 'reference') is None:
    if not name and preset == SHIPPED_PRESET:
      return checkpoint.load_checkpoint()
    if name and not changes:
      raise CheckpointError(f'{home}: no such reference; it was the result of a run.')
    config = pretrain_config(preset, changes)
    hosts.say(f'Pre-training the reference {name or preset}: {config.num_steps} steps.')
    pretrain(config, home, damaged=damaged)
  return checkpoint.load_checkpoint(home / 'reference')
