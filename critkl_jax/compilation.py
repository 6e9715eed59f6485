"""Compiled programs: kept on disk for the next process, and the time that compilation takes."""

import hashlib
import os
import pathlib
import platform
import time

import jax

from critkl_jax import storage

_LONGEST_INTERVALS = 4096  # older ones are summed up


def default_cache() -> pathlib.Path:
  """Returns the directory of compiled programs in the user's cache directory, which may begin with `~`."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'critkl_jax' / 'programs'


def keep_programs(directory: str | os.PathLike) -> None:
  """Has JAX keep compiled programs under a directory, one folder for each kind of processor, and look there first.

  JAX finds a program by its text, its compiler's version and options and the devices; a file that cannot be read is
  compiled anew. What it leaves out of the key is the host's instruction set, which a home directory that is shared by
  several machines makes dangerous: hence a folder of its own for each.

  Args:
    directory: made when the first program is kept. A directory that `JAX_COMPILATION_CACHE_DIR` names is left alone.
  """
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(storage.to_path(directory) / _processor()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _processor() -> str:
  """Returns a name for the instruction set of this host."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  own = [line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU part'))]
  text = '\n'.join(sorted(set(own))) or platform.processor()
  return f'{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}'


class _Clock:
  """Sums the time in which something was traced or compiled; what is traced inside of another trace counts once."""

  def __init__(self):
    self._intervals: list[tuple[float, float]] = []
    self._done = 0.0

  def add(self, name: str, seconds: float, **kwargs) -> None:
    """Takes an event of `jax.monitoring`, which ends now."""
    del kwargs
    if not name.startswith('/jax/core/compile'):
      return
    end = time.monotonic()
    start = end - seconds
    while self._intervals and self._intervals[-1][0] >= start:
      self._intervals.pop()
    start = max(start, self._intervals[-1][1]) if self._intervals else start
    self._intervals.append((start, end))
    if len(self._intervals) > _LONGEST_INTERVALS:
      self._done += sum(end - start for start, end in self._intervals[:-16])
      self._intervals = self._intervals[-16:]

  def seconds(self) -> float:
    """Returns the sum so far."""
    return self._done + sum(end - start for start, end in self._intervals)


_CLOCK = _Clock()
jax.monitoring.register_event_duration_secs_listener(_CLOCK.add)


def compilation_seconds() -> float:
  """Returns the seconds that this process has spent on tracing and compiling since this module was imported."""
  return _CLOCK.seconds()
