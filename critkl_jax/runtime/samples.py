"""Writes and reads `samples.jsonl`: a few responses of a run at each save, with their rewards."""

import os
from typing import Any

from critkl_jax.runtime import hosts, storage

FILE = 'samples.jsonl'


class SamplesFile:
  """Writes the file, on the first host only; lines of steps after the one that is resumed from are dropped."""

  def __init__(self, workdir: storage.Path, first_step: int):
    self._path, self._lines = workdir / FILE, []
    if hosts.is_first():
      self._lines = [row for row in read_samples(self._path) if row['step'] <= first_step]

  def write(self, step: int, samples: list[dict[str, Any]]) -> None:
    """Writes the responses of one step behind those of earlier steps."""
    if not hosts.is_first():
      return
    self._lines = [row for row in self._lines if row['step'] != step] + [{'step': step, **row} for row in samples]
    storage.write_text(self._path, ''.join(storage.to_json(row) + '\n' for row in self._lines))


def read_samples(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows: `step`, `row` (of the prompt, from 1), `prompt`, `completion`, `reward`, and `reward/NAME` for each
  reward function. A missing file has none; damaged lines, and those after them, are left out."""
  rows, _ = storage.read_lines(path)
  return [row for row in rows if isinstance(row.get('step'), int) and {'prompt', 'completion', 'reward'} <= row.keys()]
