"""Files of a run: paths that a user gives, text and JSON that are written whole or not at all."""

import json
import math
import os
from typing import Any

from etils import epath

from critkl_jax import hosts


class WorkdirError(ValueError):
  """A workdir or a file in it that cannot be used; the message is one line that says why and what to do."""


def to_path(path: str | os.PathLike) -> epath.Path:
  """Returns a path on this machine or of a bucket (`gs://bucket/run`), with `~` expanded."""
  return epath.Path(os.fspath(path)).expanduser()


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file whole or not at all, whenever the process ends; of several hosts only the first one writes."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes bytes as `write_text` writes text."""
  if not hosts.is_first():
    return
  path = to_path(path)
  unfinished = path.with_name(f'{path.name}.unfinished')
  unfinished.write_bytes(data)
  unfinished.replace(path)


def to_json(value: Any, indent: int | None = None) -> str:
  """Formats nested values as JSON that strict parsers read: null stands for a number that is not finite."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
  """Writes nested values as `to_json` formats them, as `write_text` writes."""
  write_text(path, to_json(value, indent) + '\n')


def plain(value: Any) -> Any:
  """Converts nested values, NumPy and JAX arrays among them, to the types of JSON: None for a number that is not
  finite."""
  if isinstance(value, dict):
    return {str(name): plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike, kind: type = dict, advice: str = 'remove it, and it is made again') -> Any:
  """Reads a file of JSON that a run has written.

  Args:
    path: of the file, which is there.
    kind: of the value, `dict` or `list`.
    advice: what to do about a file that cannot be read.

  Raises:
    WorkdirError: if it cannot be read, is not JSON, or holds a value of another kind; the message names the line.
  """
  try:
    return _parse(to_path(path).read_bytes(), kind)
  except OSError as error:
    raise WorkdirError(f'{path} cannot be read ({error.strerror or error}); {advice}.') from error
  except ValueError as error:
    raise WorkdirError(f'{path} is damaged ({error}); {advice}.') from error


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], str]:
  """Reads a file with an object of JSON on each line.

  Args:
    path: of the file; one that is missing has no lines.

  Returns:
    The objects up to the first line that cannot be read, and what is wrong with that line, empty if nothing is. A last
    line that was not finished, as a killed process leaves it, is left out.

  Raises:
    WorkdirError: if the file cannot be read at all.
  """
  path, objects = to_path(path), []
  try:
    *lines, unfinished = path.read_bytes().split(b'\n') if path.exists() else [b'']
  except OSError as error:
    raise WorkdirError(f'{path} cannot be read ({error.strerror or error}); make it readable.') from error
  for number, line in enumerate([*lines, unfinished], start=1):
    if number > len(lines) and not line:
      break
    try:
      objects.append(_parse(line, dict, number))
    except ValueError as error:
      return objects, '' if number > len(lines) else str(error)
  return objects, ''


def replace_directory(new: str | os.PathLike, old: str | os.PathLike) -> None:
  """Renames a directory that is whole to the name of another one, which goes only then."""
  new, old = to_path(new), to_path(old)
  former = old.with_name(f'{old.name}.replaced')
  if former.exists():  # of a process that ended in here
    former.rmtree()
  if old.exists():
    old.rename(former)
  new.rename(old)
  if former.exists():
    former.rmtree()


def _parse(data: bytes, kind: type, first: int = 1) -> Any:
  """Returns the value of a text of JSON whose first line has this number; raises a ValueError in a few words."""
  try:
    value = json.loads(data.decode())
  except UnicodeDecodeError as error:
    line = first + data.count(b'\n', 0, error.start)
    raise ValueError(f'line {line} has a byte that is not UTF-8') from error
  except (json.JSONDecodeError, RecursionError) as error:
    line = first - 1 + getattr(error, 'lineno', 1)
    raise ValueError(f'line {line} is not JSON' if data.strip() else f'line {first} is empty') from error
  if not isinstance(value, kind):
    raise ValueError(f'line {first}: expected {_KINDS[kind]}, got {type(value).__name__}')
  return value


_KINDS = {dict: 'an object of JSON', list: 'a list of JSON'}
