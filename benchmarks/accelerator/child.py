"""Runs one part in its own process: `python -m benchmarks.accelerator.child MODULE:FUNCTION JSON`, from `parts`."""

import importlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

from benchmarks.accelerator import parts


class Report:
  """Prints a part's rows and writes them to a file at once, so that they survive the process.

  Attributes:
    preset: `full` or `smoke`.
    earlier: name -> results of an earlier part.
  """

  def __init__(self, results: str, earlier: str, seconds: float, preset: str):
    self._path, self._end, self.preset = pathlib.Path(results), time.monotonic() + seconds, preset
    found = json.loads(pathlib.Path(earlier).read_text()) if pathlib.Path(earlier).is_file() else {'parts': {}}
    self.earlier = {name: part.get('results', {}) for name, part in found['parts'].items()}
    self._rows: dict[str, dict[str, Any]] = {}

  def add(self, row: str, **values: Any) -> None:
    """Adds values (numbers or text) to a row."""
    self._rows.setdefault(row, {}).update(values)
    parts.write_json(self._path, self._rows)
    print(f'{row}: {parts.text_of(values)}', flush=True)

  def seconds_left(self) -> float:
    """Returns the seconds until this process is stopped."""
    return self._end - time.monotonic()


def main() -> None:
  """Calls the part's function with a `Report`."""
  threading.Thread(target=end_with_parent, daemon=True).start()
  module, function = sys.argv[1].split(':')
  getattr(importlib.import_module(module), function)(Report(**json.loads(sys.argv[2])))


def end_with_parent() -> None:
  """Kills this process group when the parent has ended in any way, which frees the accelerator."""
  sys.stdin.buffer.raw.read()  # until the other end of the pipe is closed
  os.killpg(0, signal.SIGKILL)


if __name__ == '__main__':
  main()
