"""Ends the process with an exit code, which means the same in all binaries.

0: done. `FAILED`: the run failed (a full disk, a lost host, no finite update). `REFUSED`: the input, a workdir or a
checkpoint cannot be used. `STOPPED`: a signal ended the run; finished steps are saved, and the same command resumes.
"""

import contextlib
import os
import pathlib
import sys
import traceback
from typing import NoReturn

from critkl_jax.runtime.interruption import STOPPED as STOPPED

FAILED = 1
REFUSED = 2


def refuse(reason: object) -> NoReturn:
  """Ends the process with `REFUSED` and one line on the standard error."""
  end(REFUSED, 'error: ' + ' '.join(str(reason).splitlines()))


def show(text: str) -> None:
  """Prints a text, and exits if its reader, such as `head`, has closed the pipe."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os._exit(0)  # at once: Python would flush again at its exit


def end_now(text: object) -> NoReturn:
  """Ends the process at once with `FAILED` and a text on the standard error, after a write error.

  At an orderly exit, each thread that tries to write would print the error again.
  """
  with contextlib.suppress(OSError):  # a closed pipe, or a file on the full disk
    sys.stdout.flush()
  with contextlib.suppress(OSError):
    print(f'\n{text}', file=sys.stderr, flush=True)  # below a progress bar
  os._exit(FAILED)


def end(code: int, text: object) -> NoReturn:
  """Ends the process with a text on the standard error and an exit code."""
  with contextlib.suppress(OSError):  # as above
    print(text, file=sys.stderr, flush=True)
  sys.exit(code)


def place_of(error: BaseException) -> str:
  """Returns the place in the package where an error arose, ` (at FILE:LINE, in FUNCTION)`; empty if unknown."""
  root = pathlib.Path(__file__).resolve().parents[1]
  own = [frame for frame in traceback.extract_tb(error.__traceback__)
         if pathlib.Path(frame.filename).is_relative_to(root / 'critkl_jax')]
  if not own:
    return ''
  return f' (at {pathlib.Path(own[-1].filename).relative_to(root)}:{own[-1].lineno}, in {own[-1].name})'
