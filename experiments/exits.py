"""Exit codes of all binaries, and how they refuse.

0: done. `FAILED`: something went wrong that no other input would have helped. `REFUSED`: the input was wrong, and
nothing was changed. `STOPPED`: a signal ended the run, what was finished is saved, and the same command goes on.
"""

import os
import sys
from typing import NoReturn

from critkl_jax.interruption import STOPPED as STOPPED

FAILED = 1
REFUSED = 2


def refuse(reason: object) -> NoReturn:
  """Ends the process with one line on the standard error, as wrong input does."""
  end(REFUSED, f'error: {reason}')


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
