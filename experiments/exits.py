"""Exit codes of all binaries, and how they refuse.

0: done. `FAILED`: something went wrong that no other input would have helped. `REFUSED`: the input was wrong, and
nothing was changed. `STOPPED`: a signal ended the run, what was finished is saved, and the same command goes on.
"""

import os
import pathlib
import sys
import traceback
from typing import NoReturn

from critkl_jax.interruption import STOPPED as STOPPED

FAILED = 1
REFUSED = 2


def refuse(reason: object) -> NoReturn:
  """Ends the process with one line on the standard error, as wrong input does."""
  end(REFUSED, 'error: ' + ' '.join(str(reason).splitlines()))


def end_now(text: object) -> NoReturn:
  """Ends the process with a text on the standard error and `FAILED`, not orderly: files cannot be written, and
  each thread that tries would say so at length."""
  sys.stdout.flush()
  print(f'\n{text}', file=sys.stderr, flush=True)  # below a progress bar
  os._exit(FAILED)


def end(code: int, text: object) -> NoReturn:
  """Ends the process with a text on the standard error and an exit code."""
  print(text, file=sys.stderr, flush=True)
  sys.exit(code)


def place_of(error: BaseException) -> str:
  """Returns from which line of the project an error came, ` (at FILE:LINE, in FUNCTION)`; empty if none is known."""
  root = pathlib.Path(__file__).resolve().parents[1]
  own = [frame for frame in traceback.extract_tb(error.__traceback__)
         if pathlib.Path(frame.filename).is_relative_to(root / 'critkl_jax')]
  if not own:
    return ''
  return f' (at {pathlib.Path(own[-1].filename).relative_to(root)}:{own[-1].lineno}, in {own[-1].name})'
