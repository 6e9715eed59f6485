"""Files of a run: paths that a user gives, text and JSON that are written whole or not at all.

A path on this machine is a `pathlib.Path`, one in a bucket an `epath.Path`, which has the same methods but for links.
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

from critkl_jax import hosts

Path = pathlib.Path | epath.Path
_BUCKETS = ('gs', 's3')  # where both Orbax and TensorStore write


class WorkdirError(ValueError):
  """A workdir or a file in it that cannot be used; the message is one line that says why and what to do."""


class PathError(ValueError):
  """A path that leads nowhere; the message is one line that says why and what to do."""


def to_path(path: str | os.PathLike) -> Path:
  """Returns a path on this machine, with `~` expanded, or in a bucket: `gs://bucket/run` or `s3://bucket/run`.

  Raises:
    PathError: if it is empty or of another scheme, or the package that reads such buckets is not installed.
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
  if not importlib.util.find_spec('tensorflow'):  # with which epath reads buckets where it is installed
    import fsspec  # loads what it needs when asked

    try:
      fsspec.get_filesystem_class(scheme)
    except ImportError as error:
      raise PathError(f'{text}: {error}.') from error
  return epath.Path(text)


def is_remote(path: os.PathLike) -> bool:
  """Returns whether a path is in a bucket: files there are not appended to, and there are no links."""
  return '://' in os.fspath(path)


def resolve(path: str | os.PathLike) -> Path:
  """Returns an absolute path without links; one in a bucket is that already."""
  path = to_path(path)
  return path if is_remote(path) else path.resolve()


def remove(path: str | os.PathLike) -> None:
  """Removes a file or a directory with all in it; a missing one is none."""
  path = to_path(path)
  if not is_remote(path) and path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  elif is_remote(path) and path.is_dir():
    path.rmtree()
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Gives each OSError in the context a number and the name of a file: this path, if it has none."""
  try:
    yield
  except OSError as error:
    number, reason = error.errno or errno.EIO, error.strerror or str(error) or type(error).__name__
    raise OSError(number, reason, os.fspath(error.filename or path)) from error


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes text in UTF-8 as `write_bytes` writes."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file whole or not at all, whenever the process ends; of several hosts only the first one writes.

  Raises:
    OSError: if it cannot be written; the error names the file.
  """
  if not hosts.is_first():
    return
  path = to_path(path)
  unfinished = path.with_name(f'{path.name}.unfinished')
  with writing(path):
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
    remove(former)
  if old.exists():
    old.rename(former)
  new.rename(old)
  if former.exists():
    remove(former)


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
