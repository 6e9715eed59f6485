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
