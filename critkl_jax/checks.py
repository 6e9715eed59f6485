"""Checks the fields of a config; each error names the field, the expected values and the value given."""

import dataclasses
import difflib
import numbers
import os
from collections.abc import Iterable
from typing import Any

LARGEST_INT = 2**31 - 1  # of an int32
LARGEST_SEED = 2**32 - 1  # JAX's keys ignore higher bits, so two larger seeds could give the same run
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # of a float32, the smallest with all digits
_KINDS = {int: 'a whole number', float: 'a real number', bool: 'True or False', str: 'text'}


def convert_fields(config: Any, **most: int) -> None:
  """Converts the values of a frozen config, such as NumPy and JAX scalars and paths, to the types of their fields.

  Args:
    config: to convert in place, in its `__post_init__`.
    **most: the greatest whole number of a field, by its name; `LARGEST_INT` for the other fields.

  Raises:
    ValueError: if a value has another type (a bool or a float is no whole number), is not finite, or does not fit
      int32 or float32.
  """
  for field in dataclasses.fields(config):
    value = _convert(field.name, field.type, getattr(config, field.name), most.get(field.name, LARGEST_INT))
    object.__setattr__(config, field.name, value)


def _convert(name, kind, value, most):
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, kind):
      raise ValueError(f'{name}: expected a {kind.__name__}, got {value!r}.')
    return value
  found = _as_python(value)
  wanted = (float, int) if kind is float else kind
  if not isinstance(found, wanted) or (isinstance(found, bool) and kind is not bool):
    raise ValueError(f'{name}: expected {_KINDS[kind]}, got {value!r}.')
  if kind is int and abs(found) > most:
    raise ValueError(f'{name}: expected a whole number up to {most}, got {_shown(found)}.')
  if kind is float and not (found == 0 or SMALLEST_FLOAT <= abs(found) <= LARGEST_FLOAT):
    raise ValueError(f'{name}: expected a finite number that float32 holds (0, or {SMALLEST_FLOAT:g} to '
                     f'{LARGEST_FLOAT:g} in size), got {_shown(found)}.')
  return kind.__str__(found) if kind is str else kind(found)  # the value of a subclass, such as an enumeration


def _as_python(value):
  """Returns a scalar of NumPy or JAX, or a path, as Python's own type; anything else as it is."""
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if getattr(value, 'ndim', None) != 0 or not hasattr(value, 'item'):
    return value
  try:
    found = value.item()
  except (TypeError, ValueError):  # a key, or an array that is being traced
    return value
  return float(found) if isinstance(found, numbers.Real) and not isinstance(found, int) else found


def _shown(number):
  return f'a number of {number.bit_length()} bits' if isinstance(number, int) and number.bit_length() > 128 else number


def one_of(config: Any, name: str, *options: str) -> None:
  """Raises ValueError unless a field is one of the options; the message names the nearest."""
  value = getattr(config, name)
  if value not in options:
    raise ValueError(f'{name}: expected one of {options}, got {value!r}; the nearest is {nearest(value, options)!r}.')


def at_least(config: Any, least: float, *names: str) -> None:
  """Raises ValueError unless fields have this value or more."""
  for name in names:
    if not getattr(config, name) >= least:
      raise ValueError(f'{name}: expected {least} or more, got {getattr(config, name)}.')


def positive(config: Any, *names: str) -> None:
  """Raises ValueError unless fields are greater than 0."""
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}: expected a positive number, got {getattr(config, name)}.')


def other_than(config: Any, name: str, refused: float, reason: str) -> None:
  """Raises ValueError if a field has the value `refused`; the message gives the reason."""
  if getattr(config, name) == refused:
    raise ValueError(f'{name}: expected another number than {refused}: {reason}.')


def between(config: Any, least: float, most: float, *names: str) -> None:
  """Raises ValueError unless fields lie between two values."""
  for name in names:
    if not least <= getattr(config, name) <= most:
      raise ValueError(f'{name}: expected {least} to {most}, got {getattr(config, name)}.')


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns the most similar of some names: the one with these initials (`lr` for `learning_rate`), else by letters."""
  names = list(names)
  initials = [other for other in names if '_' in other and name == ''.join(word[:1] for word in other.split('_'))]
  return (initials or difflib.get_close_matches(name, names, 1, 0.0))[0]
