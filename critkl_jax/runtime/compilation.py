"""Caches compiled programs on disk, and measures the time spent on compilation."""

import hashlib
import os
import pathlib
import platform
import time

import jax

from critkl_jax.runtime import storage

_MOST_INTERVALS = 4096  # most intervals that a clock keeps; older ones are only summed


def default_cache() -> pathlib.Path:
  """Returns the default directory of compiled programs, in the user's cache; it may begin with `~`."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'critkl_jax' / 'programs'


def keep_programs(directory: str | os.PathLike) -> None:
  """Turns on JAX's persistent compilation cache, with a folder for each kind of processor.

  JAX's key of a program covers its text, the compiler's version and options, and the devices, but not the host's
  instruction set; without the folders, machines that share a home directory would load each other's programs. A program
  whose file cannot be read is compiled again.

  Args:
    directory: cache directory, made when the first program is saved; ignored if `JAX_COMPILATION_CACHE_DIR` is set.
  """
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(storage.to_path(directory) / _processor()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _processor() -> str:
  """Returns a folder name that identifies this host's instruction set."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  own = [line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU part'))]
  text = '\n'.join(sorted(set(own))) or platform.processor()
  return f'{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}'


class _Clock:
  """Sums the time spent on tracing and compiling; nested traces count once."""

  def __init__(self):
    self._intervals: list[tuple[float, float]] = []
    self._done = 0.0

  def add(self, name: str, seconds: float, **kwargs) -> None:
    """Adds a duration event of `jax.monitoring` that ends now."""
    del kwargs
    if not name.startswith('/jax/core/compile'):
      return
    end = time.monotonic()
    start = end - seconds
    while self._intervals and self._intervals[-1][0] >= start:
      self._intervals.pop()
    start = max(start, self._intervals[-1][1]) if self._intervals else start
    self._intervals.append((start, end))
    if len(self._intervals) > _MOST_INTERVALS:
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
