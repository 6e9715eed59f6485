"""Checks which binary wrote a workdir; every binary refuses the workdir of another."""

import contextlib
from collections.abc import Sequence
from typing import Any

from critkl_jax.runtime import checkpoint, hosts, locks, storage
from critkl_jax.runtime.storage import WorkdirError

from .exits import refuse

_HOLDS = {
    'pretrain': 'a pre-training (experiments.pretrain)',
    'finetune': 'a fine-tuning run (experiments.finetune)',
    'sweep': 'a sweep (experiments.sweep)',
    'reproduce': 'studies (experiments.reproduce)',
    'compare_checkpoints': 'a comparison of checkpoints (experiments.compare_checkpoints)',
    'analyze': 'an analysis (experiments.analyze)',
}
# Files of each binary in its workdir, without the reference, which has a mark of its own.
_WRITES = {
    'pretrain': ('checkpoints', 'metrics.jsonl', 'summary.json'),
    'finetune': ('checkpoints', 'metrics.jsonl', 'samples.jsonl', 'before.json', 'curves.png', 'summary.json'),
    'sweep': ('members', 'members.json', 'before.json', 'curves.png', 'results.json', 'results.csv'),
    'reproduce': ('studies.json', 'runs', 'references', 'working', 'studies', 'README.md'),
    'compare_checkpoints': ('comparison.json', 'comparison.png'),
    'analyze': (),  # its record, analysis.json, lists its files
}
held = contextlib.ExitStack()  # locks of this process, released when the binary ends


def claim(workdir: storage.Path, binary: str) -> None:
  """Locks a workdir until `flags.run` ends the binary.

  Raises:
    WorkdirError: if another run holds the workdir, if it holds the results of another binary, or if this binary would
      overwrite a file that no run wrote.
  """
  known = held.enter_context(locks.hold(workdir))
  hosts.first_does(lambda: _check_owner(workdir, binary, known), checkpoint.CheckpointError, WorkdirError, OSError)


def _check_owner(workdir, binary, known):
  found = owners(workdir)
  for owner in found if binary != 'analyze' else ():
    if owner != binary:
      raise WorkdirError(f'--workdir: {workdir} holds {_HOLDS[owner]}; give another directory.')
  for path in (workdir / name for name in _WRITES[binary] if not (known or found)):
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
      raise WorkdirError(f'--workdir: {path} exists, and no run wrote it; move it away, or give another directory.')


def refuse_other_file(path: str, names: Sequence[str], flag: str) -> None:
  """Exits with one line if a file exists that this binary did not write.

  Args:
    path: path of the file.
    names: fields of the JSON object that this binary writes.
    flag: name of the flag with the path.
  """
  file = storage.to_path(path)
  try:
    own = not file.exists() or set(names) <= storage.read_json(file).keys()
  except WorkdirError:
    own = False
  if not own:
    refuse(f'--{flag}: {path} exists, and this command did not write it; give another file.')


def refuse_fewer_steps(directory: storage.Path, num_steps: int, flag: str) -> None:
  """Exits with one line if a directory of checkpoints has a step after the last step of the run.

  Otherwise the results would be those of the later step.
  """
  last = max(checkpoint.steps_in(directory), default=0)
  if last > num_steps:
    refuse(f'--{flag}: {directory} holds step {last}, which is beyond {num_steps}; ask for {last} or more, or give '
           'another --workdir.')


def refuse_other_results(file: storage.Path, wanted: dict[str, Any]) -> None:
  """Exits with one line if a JSON file exists and its values differ from the wanted ones."""
  found = storage.read_json(file, advice='remove it, or give another directory') if file.exists() else wanted
  different = [f'{name}: {found.get(name)!r} then, {value!r} now' for name, value in wanted.items()
               if found.get(name) != value]
  if different:
    refuse(f'--workdir: {file} was made with other settings ({"; ".join(different)}); give the same ones, or another '
           'directory.')


def owners(workdir: storage.Path) -> list[str]:
  """Returns the names of the binaries whose results a workdir holds."""
  found = []
  info = checkpoint.newest_info(workdir / 'checkpoints')
  if info is not None:
    found.append(info.kind)
  if any(checkpoint.latest(path) is not None for path in workdir.glob('members/*/checkpoints')):
    found.append('sweep')
  marks = {'sweep': 'members.json', 'reproduce': 'studies.json', 'compare_checkpoints': 'comparison.json',
           'analyze': 'report.html'}
  return found + [binary for binary, mark in marks.items() if (workdir / mark).is_file()]
