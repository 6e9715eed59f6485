"""The references of a study's runs: the one that comes with the package, or others, pre-trained where they are missing.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from critkl_jax import checkpoint
from critkl_jax.checkpoint import Checkpoint, CheckpointError
from critkl_jax.config import PretrainConfig, replace
from critkl_jax.presets import PRETRAIN_PRESETS
from critkl_jax.pretraining import pretrain

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


def find_reference(preset: str, name: str, changes: Mapping[str, Any], workdir: pathlib.Path) -> Checkpoint:
  """Returns a reference, and pre-trains it first if it is not there.

  Args:
    preset: of the studies.
    name: of the reference, `catalog.reference_name` of its changes; empty for the preset's own.
    changes: field -> value, where its pre-training differs from the preset's.
    workdir: of the studies.

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
    print(f'Pre-training of the reference {name or preset}:', flush=True)
    pretrain(pretrain_config(preset, changes), home)
  return checkpoint.load_checkpoint(home / 'reference')
