"""Runs the parts one after another, each in its own process with a time limit.

This module uses the standard library alone: the process must not open a device, whose memory the parts would lack.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ERROR_LINES = 12  # last printed lines kept of a failed part
QUICK = ' --xla_backend_optimization_level=0'
MARGIN = 5.0  # seconds kept at the end to write the results


class Part(NamedTuple):
  """One part of the benchmark.

  Attributes:
    name: name of the part.
    function: `module:function`, called with a `Report` in its own process.
    share: share of the minutes, relative to the other parts' shares. Time that a part leaves goes to the next ones.
    least: seconds that the part needs at `full` size; with less it is skipped.
    environment: environment variables of its process.
  """

  name: str
  function: str
  share: float
  least: float = 5.0
  environment: Mapping[str, str] = types.MappingProxyType({})


def run_parts(parts: Sequence[Part], path: pathlib.Path, minutes: float, preset: str) -> dict[str, Any]:
  """Runs the parts and writes their results to a JSON file, which is rewritten after each part.

  Args:
    parts: the parts, in the order in which they run.
    path: the file. Results of parts that do not run now stay in it. The cache of compiled programs and the running
      part's results are next to it.
    minutes: time limit of all parts together.
    preset: `full` or `smoke`.

  Returns:
    The content of the file.
  """
  path = path.absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  found = json.loads(path.read_text()) if path.is_file() else {'parts': {}}
  found |= {'preset': preset, 'minutes': minutes, 'started': time.strftime('%Y-%m-%d %H:%M:%S')}
  for part in parts:
    found['parts'].pop(part.name, None)
  end = 0.0
  for part in parts:
    end += (60 * minutes - MARGIN) * part.share / sum(part.share for part in parts)
    left = end - (time.monotonic() - start)
    say(start, part.name, f'begins, with {left:.0f} s at most')
    if left < (part.least if preset == 'full' else 1.0):
      row = {'status': 'skipped', 'error': [f'{left:.0f} s are left, it needs {part.least:.0f}']}
    else:
      row = run_part(part, path, left, preset, start)
    found['parts'][part.name] = {'limit_seconds': left, **row}
    found['seconds'] = time.monotonic() - start
    write_json(path, found)
    say(start, part.name, f'{row["status"]} after {row.get("seconds", 0.0):.0f} s')
  return found


def run_part(part: Part, path: pathlib.Path, limit: float, preset: str, start: float) -> dict[str, Any]:
  """Runs one part until it ends or its limit is reached.

  Returns:
    `status` (`done`, `failed`, or `stopped` at the limit), `seconds`, `results` and, unless it is done, the last
    printed lines as `error`.
  """
  results = path.with_name(f'{path.name}.{part.name}')
  results.unlink(missing_ok=True)
  arguments = json.dumps({'results': str(results), 'earlier': str(path), 'seconds': limit, 'preset': preset},
                         allow_nan=False)
  began, last = time.monotonic(), collections.deque(maxlen=ERROR_LINES)
  with process_group([sys.executable, '-m', 'benchmarks.accelerator.child', part.function, arguments],
                     environment(path, preset) | dict(part.environment)) as process:
    reader = threading.Thread(target=relay, args=(process.stdout, part.name, start, last), daemon=True)
    reader.start()
    try:
      status = 'done' if process.wait(limit) == 0 else 'failed'
    except subprocess.TimeoutExpired:
      status = 'stopped'
  reader.join(1.0)
  if not reader.is_alive():  # a process that has left the group may still hold the pipe
    process.stdout.close()
  row = {'status': status, 'seconds': time.monotonic() - began,
         'results': json.loads(results.read_text()) if results.is_file() else {}}
  results.unlink(missing_ok=True)
  if status == 'stopped':
    last.append(f'stopped at its limit of {limit:.0f} s')
  elif process.returncode < 0:
    last.append(f'ended by {signal.Signals(-process.returncode).name}')
  return row if status == 'done' else row | {'error': list(last)}


@contextlib.contextmanager
def process_group(command: Sequence[str], variables: dict[str, str]) -> Iterator[subprocess.Popen]:
  """Starts a process as the leader of a group, and kills the group at the end of the context."""
  process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)
  try:
    yield process
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()
    process.wait()


def environment(path: pathlib.Path, preset: str) -> dict[str, str]:
  """Returns the environment variables of all parts.

  They set a cache of compiled programs next to the JSON file, unless a cache is set already, and at `smoke` size, where
  times do not matter, compilation without optimization.
  """
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR', f'{path}.cache')
  flags = os.environ.get('XLA_FLAGS', '') + QUICK * (preset == 'smoke')
  return os.environ | {
      'XLA_FLAGS': flags, 'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'PYTHONUNBUFFERED': '1',
      'TF_CPP_MIN_LOG_LEVEL': '2', 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}


def relay(stream: Iterator[str], name: str, start: float, last: collections.deque) -> None:
  """Prints the lines of a part with time and name, and keeps the last lines."""
  with contextlib.suppress(ValueError):  # closed at the end of this process
    for line in stream:
      if line.strip():
        say(start, name, line.rstrip())
        last.append(line.rstrip())


def say(start: float, name: str, text: str) -> None:
  """Prints a line with time and name of the part, unbuffered."""
  print(f'[{time.monotonic() - start:6.1f} s] {name}: {text}', flush=True)


def write_json(path: pathlib.Path, found: Any) -> None:
  """Writes strict JSON atomically; numbers that are not finite become null."""
  unfinished = path.with_name(f'{path.name}.unfinished')
  unfinished.write_text(json.dumps(strict(found), indent=2, allow_nan=False) + '\n')
  os.replace(unfinished, path)


def strict(found: Any) -> Any:
  """Converts a value to the types of JSON; numbers that are not finite become None."""
  if isinstance(found, dict):
    return {str(name): strict(value) for name, value in found.items()}
  if isinstance(found, list | tuple):
    return [strict(value) for value in found]
  if hasattr(found, 'tolist'):  # a NumPy or JAX array
    return strict(found.tolist())
  return None if isinstance(found, float) and not math.isfinite(found) else found


def text_of(values: dict[str, Any]) -> str:
  """Formats the values of a row as one line."""
  return ', '.join(f'{name} {number_text(value)}' for name, value in values.items())


def number_text(value: Any) -> str:
  """Formats a value with three or more significant digits."""
  if isinstance(value, float):
    return f'{value:.0f}' if 1000 <= abs(value) < 1e7 else f'{value:.3g}'
  if isinstance(value, dict):
    return f'({text_of(value)})'
  if isinstance(value, list | tuple):
    return '[' + ' '.join(map(number_text, value)) + ']'
  return str(value)


def table(found: dict[str, Any]) -> str:
  """Formats the table of all parts and rows."""
  lines = [f'{"part":<12}{"status":<9}{"seconds":>8}{"limit":>7}  results']
  for name, part in found['parts'].items():
    seconds = f'{part["seconds"]:.0f}' if 'seconds' in part else '-'
    lines.append(f'{name:<12}{part["status"]:<9}{seconds:>8}{part["limit_seconds"]:>7.0f}')
    lines += [f'{"":<14}{row}: {text_of(values)}' for row, values in part.get('results', {}).items()]
    lines += [f'{"":<14}| {line}' for line in part.get('error', ())[-ERROR_LINES:]]
  return '\n'.join(lines)
