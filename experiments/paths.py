"""Checks before the work starts that a user's paths for results are writable; leaves no files behind."""

import errno
import os
import pathlib
import tempfile

from critkl_jax.runtime import storage

from .exits import refuse

_NAME, _PATH = 255, 4095  # most bytes of a name and of a path on Linux and macOS
_ROOM = 255  # bytes reserved for paths below a workdir, of which unfinished checkpoints have the longest


def read_workdir(flag: str, text: str | None) -> storage.Path:
  """Returns the path of a writable directory, which need not exist yet, or exits with one line."""
  if not text:
    refuse(f'--{flag}: expected a directory, got an empty name.')
  path = _expanded(flag, text)
  if storage.is_remote(path):
    return path
  _refuse_unless_writable(flag, text, path.absolute(), path.absolute() / ('x' * _ROOM))
  return path


def check_file(flag: str, text: str | None) -> None:
  """Exits with one line if a path is given and no file can be written there."""
  if text is None or '://' in text:
    return
  if not text:
    refuse(f'--{flag}: expected a file, got an empty name.')
  path = pathlib.Path(_expanded(flag, text)).absolute()
  if path.is_dir():
    refuse(f'--{flag}: expected a file, got the directory {text}.')
  if not os.path.lexists(path.parent):
    refuse(f'--{flag}: {text} cannot be written: there is no directory {path.parent}.')
  _refuse_unless_writable(flag, text, path.parent, path.with_name(f'{path.name}.unfinished'))


def _expanded(flag, text):
  try:
    return storage.to_path(text)
  except (ValueError, RuntimeError) as error:  # an unknown scheme or user
    refuse(f'--{flag}: {error}')


def _refuse_unless_writable(flag, text, directory, longest):
  """Exits with one line unless files with paths up to `longest` can be made in a directory, which need not exist."""
  try:
    _try_writing(directory, longest)
  except (OSError, ValueError) as error:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    refuse(f'--{flag}: {text[:200]} cannot be written: {reason[0].lower()}{reason[1:]}; give another path.')


def _try_writing(directory, longest):
  if any(len(os.fsencode(part)) > _NAME for part in longest.parts) or len(os.fsencode(longest)) > _PATH:
    raise OSError(errno.ENAMETOOLONG, 'the name is too long')
  if '\0' in str(longest):
    raise ValueError('a zero byte is no part of a name')
  existing = directory
  while not os.path.lexists(existing) and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, f'{existing} is no directory')
  tempfile.TemporaryDirectory(prefix='.writable-', dir=existing).cleanup()
