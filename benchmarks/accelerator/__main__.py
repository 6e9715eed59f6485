"""Runs the parts and prints one table; see the package's docstring."""

import os
import pathlib
import signal
import sys
import types
from typing import NoReturn

from absl import app, flags

from benchmarks.accelerator.parts import Part, run_parts, table

NO_PREALLOCATION = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
PARTS = (  # the share is in seconds of 8 minutes; time that a part leaves goes to the next one
    Part('device', 'benchmarks.accelerator.device:measure', 40, environment=NO_PREALLOCATION),
    Part('operation', 'benchmarks.accelerator.operation:measure', 95, environment=NO_PREALLOCATION),
    Part('rollouts', 'benchmarks.accelerator.rollouts:measure', 80),
    Part('generate', 'benchmarks.accelerator.generate:measure', 40, environment={'JAX_PLATFORMS': 'cpu'}),
    Part('train_step', 'benchmarks.accelerator.train_steps:measure', 70),
    Part('finetune', 'benchmarks.accelerator.finetuning:measure', 65),
    Part('paper', 'benchmarks.accelerator.paper:measure', 85, least=75),
)
REFUSED, STOPPED = 2, 75  # exit codes of `experiments.exits`, repeated here because this process must not load JAX
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = [part.name for part in PARTS]

MINUTES = flags.DEFINE_float('minutes', 8.0, 'Time limit of all parts together.', lower_bound=0.5)
PRESET = flags.DEFINE_enum('preset', 'full', ['full', 'smoke'], '`smoke`: sizes for a CPU, to try the command.')
CHOSEN = flags.DEFINE_multi_enum('part', NAMES, NAMES, 'A part to run; may be repeated. Others in the file are kept.')
JSON = flags.DEFINE_string('json', 'accelerator.json', 'File for the results, rewritten after each part.')


def main(arguments: list[str]) -> None:
  """Runs the parts; exits with status 1 if one of them failed or was stopped."""
  if len(arguments) > 1:
    refuse(f'arguments {arguments[1:]} are not flags; flags start with --, see --help.')
  path = pathlib.Path(JSON.value).expanduser()
  if not JSON.value or path.is_dir() or not os.access(path.parent, os.W_OK):
    refuse(f'--json: {JSON.value!r} cannot be written; give a file in a directory that is there.')
  found = run_parts([part for part in PARTS if part.name in CHOSEN.value], path, MINUTES.value, PRESET.value)
  print(f'\n{table(found)}\n\n{found["seconds"]:.0f} s. In {path}.', flush=True)
  sys.exit(any(part['status'] in ('failed', 'stopped') for part in found['parts'].values()))


def parse(argv: list[str]) -> list[str]:
  """Parses the command line, or exits with one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    refuse(error)


def refuse(reason: object) -> NoReturn:
  """Exits with one line on the standard error and the status of invalid input."""
  print(f'error: {reason}', file=sys.stderr)
  sys.exit(REFUSED)


def stop(number: int, frame: types.FrameType | None) -> None:
  """Handles a signal: prints a sentence and exits, which also ends the running part."""
  for one in SIGNALS:
    signal.signal(one, signal.SIG_IGN)
  print(f'\nStopped by {signal.Signals(number).name}; the parts that ended before are in the file.', file=sys.stderr,
        flush=True)
  sys.exit(STOPPED)


if __name__ == '__main__':
  for one in SIGNALS:
    signal.signal(one, stop)
  app.run(main, flags_parser=parse)
