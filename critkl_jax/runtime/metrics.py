"""Writes, reads and restores the metrics of a run: a JSON line for each step, in metrics.jsonl and in checkpoints."""

import base64
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from critkl_jax.runtime import hosts, storage, trackers
from critkl_jax.runtime.failure_signatures import MEANING, History
from critkl_jax.runtime.storage import WorkdirError

FILE = 'metrics.jsonl'


class MetricsWriter:
  """Writes metrics as JSON lines and to the installed trackers (TensorBoard, W&B), on the first host only.

  Drops lines of steps after `first_step`, which an interrupted run left. Adds `signature/NAME` to the metrics of a
  fine-tuning run for each signature of failure: 1 if the metrics so far show it, else 0. The first 1 prints a warning.
  Leaves out metrics of critical tokens in steps without critical tokens.
  """

  def __init__(self, workdir: storage.Path, first_step: int, track: Callable | None = None):
    self._path, self._trackers, self._history, self._warned = workdir / FILE, [], History(), set()
    self._lines: list[str] = []
    if not hosts.is_first():
      return
    with storage.writing(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_metrics(self._path) if row['step'] <= first_step]
    self._history = History(rows)
    self._lines = [storage.to_json(row) + '\n' for row in rows]
    storage.write_text(self._path, self.text())
    self._trackers = (track or trackers.open_trackers)(workdir, first_step)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes the metrics of one step, which are Python or NumPy scalars."""
    if not hosts.is_first():
      return
    metrics = {name: float(value) for name, value in metrics.items() if not ('critical' in name and np.isnan(value))}
    self._history.add(metrics)
    metrics |= self._signatures(step)
    self._lines.append(storage.to_json({'step': step, **metrics}) + '\n')
    if not storage.is_remote(self._path):
      with storage.writing(self._path), self._path.open('a') as file:
        file.write(self._lines[-1])
    for tracker in self._trackers:
      tracker.write(step, metrics)

  def text(self) -> str:
    """Returns all lines as the text of the file."""
    return ''.join(self._lines)

  def packed(self) -> dict[str, str]:
    """Returns all lines compressed for a checkpoint, from which `mend_metrics` restores the file."""
    return {'zlib_base85': base64.b85encode(zlib.compress(self.text().encode(), 1)).decode()}

  def _signatures(self, step):
    found = self._history.signatures()
    for name in (name for name, seen in found.items() if seen and name not in self._warned):
      logging.warning('%s, step %d: %s: %s.', self._path.parent, step, name, MEANING[name])
      self._warned.add(name)
    return {f'signature/{name}': float(seen) for name, seen in found.items()}

  def flush(self) -> None:
    """Writes all lines if the file is in a bucket, where it cannot be appended to; call it before each save."""
    if storage.is_remote(self._path):
      storage.write_text(self._path, self.text())

  def close(self) -> None:
    """Flushes the lines and closes the trackers."""
    self.flush()
    for tracker in self._trackers:
      tracker.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
  """Reads the rows of a metrics file, with NaN for null.

  A missing file has no rows; an unfinished last line is left out.

  Raises:
    WorkdirError: if any other line does not hold metrics; the message gives its number.
  """
  rows, fault = storage.read_lines(path)
  for number, row in enumerate(rows, start=1):
    wrong = [name for name, value in row.items() if not (value is None or type(value) in (int, float))]
    if type(row.get('step')) is not int:
      rows, fault = rows[:number - 1], f'line {number} has no step'
      break
    if wrong:
      rows, fault = rows[:number - 1], f'line {number}: {wrong[0]} is not a number'
      break
  if fault:
    raise WorkdirError(f'{path} is damaged ({fault}); the same command as before restores it from the newest '
                       'checkpoint, or else remove that line.')
  return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def saved_lines(path: storage.Path) -> str | None:
  """Reads the metrics saved in a step directory, as the text of the file.

  Returns None if the checkpoint has none, as in older versions, or, after printing a note, if they cannot be read.
  """
  file = path / 'rows' / 'metadata'
  if not file.is_file():
    return None
  try:
    return zlib.decompress(base64.b85decode(json.loads(file.read_text())['zlib_base85'])).decode()
  except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
    hosts.say(f'{file} cannot be read ({error}): {FILE} is taken as it is.')
    return None


def mend_metrics(workdir: storage.Path, step: int, known: bool) -> None:
  """Restores missing or damaged lines of a resumed run's metrics file from its checkpoint, and prints a note.

  Args:
    workdir: workdir of the run, or of a member.
    step: step of the checkpoint from which the run resumes; 0 for none.
    known: whether the workdir had a lock file, which means that a run wrote its files.

  Raises:
    WorkdirError: if the file was not written by a run, or is damaged and the checkpoint holds no lines.
  """
  path = workdir / FILE
  found = path.read_bytes() if path.is_file() else b''
  saved = saved_lines(workdir / 'checkpoints' / str(step)) if step else None
  if saved is not None:
    if not found.startswith(saved.encode()):
      hosts.say(f'{path}: lines were missing or had been changed; restored from the checkpoint of step {step}.')
    if found != saved.encode():  # drops lines of later steps, which the run repeats
      storage.write_text(path, saved)
  elif step:
    number = len({row['step'] for row in read_metrics(path) if row['step'] <= step})
    if number < step:
      hosts.say(f'{path} has lines of {number} of the {step} finished steps only: pictures and sums lack the others.')
  elif found and not known:
    raise WorkdirError(f'{path} exists, and no run wrote it; move it away, or give another workdir.')
  elif found:
    storage.write_text(path, '')  # left by a run that stopped before its first checkpoint
