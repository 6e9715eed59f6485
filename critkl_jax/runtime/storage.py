"""Resolves a user's paths, and reads and writes text and JSON files, each whole or not at all.

A local path is a `pathlib.Path`; a path in a bucket is an `epath.Path`, which has the same methods except for links.
"""

import contextlib
import errno
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from typing import Any

from etils import epath

from critkl_jax.runtime import hosts

Path = pathlib.Path | epath.Path
_BUCKETS = ('gs', 's3')  # schemes that both Orbax and TensorStore can write
_WIDTH = 120  # columns of a line of JSON


class WorkdirError(ValueError):
  """A workdir or a file in it cannot be used; the message is one line with the reason and what to do."""


class PathError(ValueError):
  """A path cannot be used; the message is one line with the reason."""


def to_path(path: str | os.PathLike) -> Path:
  """Converts text to a local path, with `~` expanded, or to a path in a bucket: `gs://bucket/run`, `s3://bucket/run`.

  Raises:
    PathError: if the path is empty or has another scheme, or the package for its scheme is not installed.
  """
  text = os.fspath(path)
  scheme, rest = re.match(r'(?:([A-Za-z][A-Za-z0-9+.-]+):(?=/))?(.*)', text, re.S).groups()
  if scheme == 'file':
    return pathlib.Path(_of_file(text))
  if scheme:
    return _in_bucket(scheme, rest, text)
  if not text:
    raise PathError('expected a path, got an empty one.')
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise PathError(f'{text}: this machine has no such user; give the path in full.') from error


def _of_file(text):
  url = urllib.parse.urlsplit(text)
  if url.netloc not in ('', 'localhost') or not url.path.strip('/'):
    raise PathError(f'{text}: expected file:///PATH with a path on this machine.')
  return urllib.parse.unquote(url.path)


def _in_bucket(scheme, rest, text):
  known = ' or '.join(f'{name}://' for name in _BUCKETS)
  if scheme not in _BUCKETS or not rest.startswith('//') or not rest.strip('/'):
    raise PathError(f'{text}: expected a path on this machine, or of a bucket, {known}BUCKET/PATH.')
  if not importlib.util.find_spec('tensorflow'):  # if it is installed, epath reads buckets with it
    import fsspec  # loads the package of each scheme on demand

    try:
      fsspec.get_filesystem_class(scheme)
    except ImportError as error:
      raise PathError(f'{text}: {error}.') from error
  return epath.Path(text)


def is_remote(path: os.PathLike) -> bool:
  """Returns whether a path is in a bucket, which supports neither appending to files nor links."""
  return '://' in os.fspath(path)


def resolve(path: str | os.PathLike) -> Path:
  """Returns an absolute path without links; leaves a path in a bucket as it is."""
  path = to_path(path)
  return path if is_remote(path) else path.resolve()


def remove(path: str | os.PathLike) -> None:
  """Removes a file, or a directory with its content; does nothing if the path does not exist."""
  path = to_path(path)
  if not is_remote(path) and path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  elif is_remote(path) and path.is_dir():
    path.rmtree()
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Adds an error number and a file name, by default `path`, to each OSError in the context."""
  try:
    yield
  except OSError as error:
    number, reason = error.errno or errno.EIO, error.strerror or str(error) or type(error).__name__
    raise OSError(number, reason, os.fspath(error.filename or path)) from error


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes text in UTF-8, like `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file whole or not at all, even if the process is killed; only the first host writes.

  Raises:
    OSError: if the file cannot be written; the error names it.
  """
  if not hosts.is_first():
    return
  path = to_path(path)
  unfinished = path.with_name(f'{path.name}.unfinished')
  with writing(path):
    unfinished.write_bytes(data)
    unfinished.replace(path)


def to_json(value: Any) -> str:
  """Formats nested values as one line of strict JSON, with null for each number that is not finite."""
  return json.dumps(plain(value), allow_nan=False)


def to_json_text(value: Any) -> str:
  """Formats nested values as strict JSON in few lines that still make readable diffs.

  A value that fits takes one line, and so does every list of scalars, however long. In a longer object or list, each
  inner object or list starts a line, and the scalars between them share lines.
  """
  return _lay_out(plain(value))


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes nested values in the format of `to_json_text`, like `write_text`."""
  write_text(path, to_json_text(value) + '\n')


def plain(value: Any) -> Any:
  """Converts nested values, including NumPy and JAX arrays, to JSON types; numbers that are not finite become None."""
  if isinstance(value, dict):
    return {str(name): plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _lay_out(value: Any, indent: int = 0, used: int = 0) -> str:
  """Formats a value like `to_json_text`, indented by `indent`, after `used` columns of the first line."""
  flat, inner = json.dumps(value, allow_nan=False), ' ' * (indent + 1)
  if used + len(flat) < _WIDTH or not _has_lines(value):  # < leaves room for a comma
    return flat
  lines, fills = [], False  # fills: whether the last line holds scalars only
  for name, x in value.items() if isinstance(value, dict) else (('', x) for x in value):
    key = f'{json.dumps(name, allow_nan=False)}: ' if isinstance(value, dict) else ''
    text = key + _lay_out(x, indent + 1, indent + 1 + len(key))
    scalar = not isinstance(x, dict | list)
    if fills and scalar and len(f'{inner}{lines[-1]}, {text}') < _WIDTH:
      lines[-1] += f', {text}'
    else:
      lines.append(text)
    fills = scalar
  start, end = '{}' if isinstance(value, dict) else '[]'
  return f'{start}\n{inner}' + f',\n{inner}'.join(lines) + f'\n{inner[1:]}{end}'


def _has_lines(value):
  return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value))


def read_json(path: str | os.PathLike, kind: type = dict, advice: str = 'remove it, and it is made again') -> Any:
  """Reads a JSON file that a run has written.

  Args:
    path: an existing file.
    kind: type of the value, `dict` or `list`.
    advice: what to do with a file that cannot be read, for the end of the error message.

  Raises:
    WorkdirError: if the file cannot be read, is not JSON, or has a value of another type; the message gives the line.
  """
  try:
    return _parse(to_path(path).read_bytes(), kind)
  except OSError as error:
    raise WorkdirError(f'{path} cannot be read ({error.strerror or error}); {advice}.') from error
  except ValueError as error:
    raise WorkdirError(f'{path} is damaged ({error}); {advice}.') from error


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], str]:
  """Reads a file with one JSON object in each line, up to the first damaged line.

  Args:
    path: the file; a missing file has no lines.

  Returns:
    The objects before the first damaged line, and a description of the damage, empty if there is none. An unfinished
    last line, which a killed process leaves, is left out.

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
  """Moves the complete directory `new` to the path `old`; removes the directory that was there last of all."""
  new, old = to_path(new), to_path(old)
  former = old.with_name(f'{old.name}.replaced')
  if former.exists():  # left by a process that was killed in this function
    remove(former)
  if old.exists():
    old.rename(former)
  new.rename(old)
  if former.exists():
    remove(former)


def _parse(data: bytes, kind: type, first: int = 1) -> Any:
  """Parses JSON whose first line is line `first` of a file; raises a short ValueError with the line number."""
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
