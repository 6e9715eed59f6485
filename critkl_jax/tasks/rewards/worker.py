"""Calls one reward function on one batch and checks what it returns; as a program, a process of a `RewardPool`.

Needs the standard library alone, so that a process starts in an instant: `python -P worker.py FILE_DESCRIPTOR PARENT`.
"""

import importlib
import inspect
import math
import numbers
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

BUILT_IN = 'critkl_jax.tasks.rewards.functions'
ALWAYS = ('prompts', 'completions', 'completion_ids')  # what every function may name, besides the columns
_SHOWN = 200  # characters of a prompt in a message


class RewardError(RuntimeError):
  """Raised for a reward function that cannot be loaded, fails, takes too long, or returns something else than numbers.
  """


def load(name: str) -> Callable:
  """Returns the reward function `module:function`; without a module, a built-in one.

  Raises:
    RewardError: if there is no such module or function.
  """
  module, _, function = name.rpartition(':')
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # a module beside the command, as with `python -m`
  try:
    found = getattr(importlib.import_module(module or BUILT_IN), function or '-')
  except (Exception, SystemExit) as error:  # a module may raise anything
    raise RewardError(f'reward: {name!r} cannot be loaded ({_named(error)}).') from error
  if not callable(found) or (function.startswith('_') and not module):
    raise RewardError(f'reward: {name!r} is no function.')
  return found


def missing(function: Callable, columns: Sequence[str]) -> list[str]:
  """Returns the arguments that a function needs and that are neither columns nor given to every function."""
  return [name for name, p in _parameters(function).items() if name not in {*columns, *ALWAYS} and p.default is p.empty
          and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def call(function: Callable, name: str, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any],
         rows: Sequence[int]) -> list[float]:
  """Returns the values of a reward function for a batch.

  After an error the function is called again for single completions, to find the one at which it fails.

  Args:
    function: gets `prompts`, `completions` and columns by name; only those that it names, unless it has `**`.
    name: its name in messages.
    prompts: texts, or lists of messages.
    completions: the same.
    columns: name -> list of values.
    rows: number of each prompt's row from 1, for messages.

  Raises:
    RewardError: if it raises, or does not return one finite number for each completion; the message names the row.
  """
  accepted = _accepted(function, {**columns, 'prompts': prompts, 'completions': completions})

  def values(some):
    found = function(**{key: [column[i] for i in some] for key, column in accepted.items()})
    return list(found) if hasattr(found, '__iter__') and not isinstance(found, str) else found

  try:
    found = values(range(len(prompts)))
  except (Exception, SystemExit) as error:  # a reward may raise anything
    place, culprit = _first_failing(values, range(len(prompts)))
    raise RewardError(f'reward: {name} raised {_named(culprit or error)}{_line_of(culprit or error)} at '
                      f'{at(place, prompts, rows)}.') from error
  if not isinstance(found, list):
    raise RewardError(f'reward: {name} returned {_short(found)} instead of a list of {len(prompts)} numbers, at '
                      f'{at(None, prompts, rows)}.')
  if len(found) != len(prompts):
    raise RewardError(f'reward: {name} returned {len(found)} values for {len(prompts)} completions, at '
                      f'{at(None, prompts, rows)}.')
  for i, value in enumerate(found):
    if not _is_finite(value):
      raise RewardError(f'reward: {name} returned {_short(value)} instead of a finite number, at '
                        f'{at(i, prompts, rows)}.')
  return [float(value) for value in found]


def at(place: int | None, prompts: Sequence[Any], rows: Sequence[int]) -> str:
  """Names the row and the prompt of a place in a batch, or all of the batch if it is None."""
  if place is None and len(rows) > 1:
    return f'{len(rows)} completions together (the first of row {rows[0]}, prompt: {_short(prompts[0])})'
  return f'row {rows[place or 0]} (prompt: {_short(prompts[place or 0])})'


def _parameters(function):
  try:
    return inspect.signature(function).parameters
  except ValueError:  # a function written in C
    return {}


def _accepted(function, columns):
  """Returns the lists that a function takes by name."""
  parameters = _parameters(function)
  if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return columns
  return {key: column for key, column in columns.items() if key in parameters}


def _first_failing(values, places):
  """Returns the first place at which a function raises if called for it alone, and the error; None if there is none."""
  for i in places:
    try:
      values([i])
    except (Exception, SystemExit) as error:
      return i, error
  return None, None


def _is_finite(value):
  try:
    return isinstance(value, numbers.Real) and math.isfinite(value)
  except OverflowError:  # a whole number beyond all floats
    return False


def _short(value):
  text = repr(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


def _named(error):
  return f'{type(error).__name__}: {str(error).strip() or "no message"}'.splitlines()[0]


def _line_of(error):
  """Names the line in which an error was raised."""
  frames = traceback.extract_tb(error.__traceback__)
  return f' ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})' if frames else ''


def serve(connection: Connection) -> None:
  """Answers messages until the connection ends.

  The first message is `sys.path`. Each later one is `(name, prompts, completions, columns, rows)`; the answers are
  None once the function is loaded, and then its values, or the message of a `RewardError` in place of either.
  """
  sys.path[:] = connection.recv()
  functions: dict[str, Callable] = {}
  while True:
    try:
      name, *batch = connection.recv()
    except EOFError:
      return
    try:
      if name not in functions:
        functions[name] = load(name)
      connection.send(None)
      connection.send(call(functions[name], name, *batch))
    except RewardError as error:
      connection.send(str(error))


def _end_with_parent(parent):
  """Ends this process, and what its functions have started, when the process that started it is gone."""
  while os.getppid() == parent:
    time.sleep(2.0)
  os.killpg(os.getpgid(0), 9)


if __name__ == '__main__':
  threading.Thread(target=_end_with_parent, args=(int(sys.argv[2]),), daemon=True).start()
  serve(Connection(int(sys.argv[1])))
