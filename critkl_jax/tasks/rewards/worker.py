"""Calls one reward function on one batch and checks what it returns; as a program, a process of a `RewardPool`.

Needs the standard library alone, so that a process starts in an instant: `python -P worker.py FILE_DESCRIPTOR`.
"""

import importlib
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

BUILT_IN = 'critkl_jax.tasks.rewards.functions'
_SHOWN = 200  # characters of a prompt in a message


class RewardError(RuntimeError):
  """Raised for a reward function that cannot be loaded, fails, takes too long, or returns something else than numbers.
  """


def load(name: str) -> Callable:
  """Returns the reward function `module:function`; without a module, one that comes along.

  Raises:
    RewardError: if there is no such module or function.
  """
  module, _, function = name.rpartition(':')
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # a module beside the command, as with `python -m`
  try:
    found = getattr(importlib.import_module(module or BUILT_IN), function or '-')
  except Exception as error:  # a module may raise anything
    raise RewardError(f'reward: {name!r} cannot be loaded ({_named(error)}).') from error
  if not callable(found) or function.startswith('_'):
    raise RewardError(f'reward: {name!r} is no function.')
  return found


def call(function: Callable, name: str, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any],
         rows: Sequence[int]) -> list[float]:
  """Returns the values of a reward function for a batch.

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
    return function(**{key: [column[i] for i in some] for key, column in accepted.items()})

  everything = range(len(prompts))
  try:
    found = values(everything)
  except Exception as error:  # a reward may raise anything
    place, culprit = _first_failing(values, everything)
    raise RewardError(f'reward: {name} raised {_named(culprit or error)}{_line_of(culprit or error)} at '
                      f'{_at(place, prompts, rows)}.') from error
  try:
    found = list(found)
  except TypeError as error:
    raise RewardError(f'reward: {name} returned {_short(found)} instead of a list of {len(prompts)} numbers, at '
                      f'{_at(None, prompts, rows)}.') from error
  if len(found) != len(prompts):
    raise RewardError(f'reward: {name} returned {len(found)} values for {len(prompts)} completions, at '
                      f'{_at(None, prompts, rows)}.')
  for i, value in enumerate(found):
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
      raise RewardError(f'reward: {name} returned {_short(value)} instead of a finite number, at '
                        f'{_at(i, prompts, rows)}.')
  return [float(value) for value in found]


def _accepted(function, columns):
  """Returns the lists that a function takes by name."""
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return columns
  return {key: column for key, column in columns.items() if key in parameters}


def _first_failing(values, places):
  """Returns the first place at which a function raises if called for it alone, and the error; None if there is none."""
  for i in places:
    try:
      values([i])
    except Exception as error:
      return i, error
  return None, None


def _at(place, prompts, rows):
  """Names the row and the prompt of a place, or of all if it is None."""
  if place is None:
    return f'rows {rows[0]} to {rows[-1]} together (first prompt: {_short(prompts[0])})' if len(rows) > 1 else _at(
        0, prompts, rows)
  return f'row {rows[place]} (prompt: {_short(prompts[place])})'


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
  """Answers `(name, prompts, completions, columns, rows)` with values or a `RewardError`'s message, until the end."""
  functions: dict[str, Callable] = {}
  while True:
    try:
      name, *batch = connection.recv()
    except EOFError:
      return
    try:
      if name not in functions:
        functions[name] = load(name)
      connection.send((call(functions[name], name, *batch), None))
    except RewardError as fault:
      connection.send((None, str(fault)))


if __name__ == '__main__':
  serve(Connection(int(sys.argv[1])))
