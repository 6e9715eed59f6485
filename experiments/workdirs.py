"""Whose results a workdir holds: a binary refuses those of another one, instead of mixing its own with them."""

import json
import pathlib
from typing import Any

from critkl_jax import checkpoint

from .exits import refuse

_HOLDS = {
    'pretrain': 'a pre-training (experiments.pretrain)',
    'finetune': 'a fine-tuning run (experiments.finetune)',
    'sweep': 'a sweep (experiments.sweep)',
    'reproduce': 'studies (experiments.reproduce)',
    'compare_checkpoints': 'a comparison of checkpoints (experiments.compare_checkpoints)',
    'analyze': 'an analysis (experiments.analyze)',
}


def refuse_others(workdir: pathlib.Path, binary: str) -> None:
  """Exits with one line if a workdir holds the results of another binary than this one."""
  for owner in owners(workdir):
    if owner != binary:
      refuse(f'--workdir: {workdir} holds {_HOLDS[owner]}; give another directory.')


def refuse_fewer_steps(directory: pathlib.Path, num_steps: int, flag: str) -> None:
  """Exits with one line if a directory of checkpoints holds a later step than the run is to end with: its results would
  be those of the later one."""
  last = max(checkpoint.steps_in(directory), default=0)
  if last > num_steps:
    refuse(f'--{flag}: {directory} holds step {last}, which is beyond {num_steps}; ask for {last} or '
                     'more, or give another --workdir.')


def refuse_other_results(file: pathlib.Path, wanted: dict[str, Any]) -> None:
  """Exits with one line if a file of JSON is there in which a value is not the wanted one."""
  found = read_json(file)
  different = [f'{name}: {found.get(name)!r} then, {value!r} now' for name, value in wanted.items()
               if found and found.get(name) != value]
  if different:
    refuse(f'--workdir: {file} was made with other settings ({"; ".join(different)}); give the same '
                     'ones, or another directory.')


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file; an empty one if the file is missing or not whole."""
  try:
    return json.loads(file.read_text())
  except (FileNotFoundError, ValueError):
    return {}


def owners(workdir: pathlib.Path) -> list[str]:
  """Returns the binaries whose results a workdir holds."""
  found = []
  step = checkpoint.latest(workdir / 'checkpoints')
  if step is not None:
    found.append(checkpoint.read_info(step).kind)
  marks = {'sweep': 'members.json', 'reproduce': 'studies.json', 'compare_checkpoints': 'comparison.json',
           'analyze': 'report.html'}
  return found + [binary for binary, mark in marks.items() if (workdir / mark).is_file()]
