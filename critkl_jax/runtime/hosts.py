"""Coordinates several hosts, with one process on each, through JAX's distributed runtime; no effect on one host.

Every process runs the same program and makes its collective calls in the same order: jitted programs on global arrays,
saves, and the functions below. All hosts see the same workdir.
"""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ResultT = TypeVar('ResultT')


class LostHost(RuntimeError):
  """Another process of this run has ended, or cannot be reached."""


def initialize(coordinator_address: str = '', num_processes: int | None = None, process_id: int | None = None,
               timeout: int = 100) -> None:
  """Joins the other processes; call it before anything asks for a device.

  Args:
    coordinator_address: host and port of process 0; empty if the environment defines it and the next two arguments
      (SLURM, Open MPI, Cloud TPU, GKE and Kubernetes with the package `kubernetes`).
    num_processes: number of processes.
    process_id: index of this process.
    timeout: seconds without a heartbeat after which a process counts as dead.

  Raises:
    ValueError: if an argument is missing and the environment does not define it.
    LostHost: if the other processes do not join in time.
  """
  try:
    jax.distributed.initialize(
        coordinator_address or None, num_processes, process_id, initialization_timeout=3 * timeout,
        heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=6 * timeout)  # host 0 may still draw pictures
  except ValueError as error:
    raise ValueError(f'multi_host: {error} Give --coordinator_address, --num_processes and --process_id.') from error
  except jax.errors.JaxRuntimeError as error:
    raise LostHost(f'the {num_processes or "other"} processes did not meet: {_first_line(error)}') from error


def last_words(text: str) -> Callable[[], None]:
  """Prints a text to the standard error if this process dies before the returned function is called.

  JAX's runtime aborts a process whose peers are lost, with a message for experts and without running any Python code;
  so a small separate process waits for this one to end.
  """
  watch = 'import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)'
  watcher = subprocess.Popen([sys.executable, '-c', watch, text], stdin=subprocess.PIPE, start_new_session=True)
  return lambda: watcher.communicate(b'an orderly end')


def is_first() -> bool:
  """Returns whether this is process 0, which prints, and writes everything but checkpoints."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line on the first host only, and flushes it."""
  if is_first():
    print(text, flush=True)


@contextlib.contextmanager
def waiting(text: str, every: float = 20.0) -> Iterator[None]:
  """Announces a slow phase without a progress bar, such as a compilation, and prints the elapsed time while it lasts.

  Args:
    text: printed before the phase begins.
    every: seconds between two lines.
  """
  say(text)
  start, over = time.monotonic(), threading.Event()

  def report():
    while not over.wait(every):
      say(f'... {time.monotonic() - start:.0f} s so far')

  thread = threading.Thread(target=report, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def wait_for_all(name: str) -> None:
  """Blocks until all processes have called it with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast_from_first(value: int) -> int:
  """Returns process 0's int32 value on all hosts, for example what it found on a file system that they share."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_does(work: Callable[[], ResultT], *errors: type[Exception]) -> ResultT | None:
  """Calls a function on the first host while the other hosts wait; returns its result there and None elsewhere.

  Args:
    work: function without arguments.
    *errors: types of exceptions that it may raise, whose constructors take a text. All hosts then raise the same type,
      so that none waits forever, and all end with the same exit code.
  """
  result, failure, number = None, None, 0
  try:
    result = work() if is_first() else None
  except errors as raised:
    failure, number = raised, next(i for i, kind in enumerate(errors, 1) if isinstance(raised, kind))
  if number := broadcast_from_first(number):
    raise failure or errors[number - 1]('refused by the first host, which says why.')
  return result


def least(value: int) -> int:
  """Returns the smallest of all processes' values, which are below 2^31."""
  if jax.process_count() == 1:
    return value
  return int(np.min(multihost_utils.process_allgather(np.int32(value))))


def any_host_before() -> Generator[int, int, None]:
  """Returns a generator that shares numbers between hosts without making any of them wait.

  Every host sends it a number in each round, and gets the greatest number that any host sent in the round before; with
  one host, the number of the same round. Start it with `next`.
  """
  sent = yield 0
  if jax.process_count() == 1:
    while True:
      sent = yield sent
  mesh = Mesh(np.asarray(jax.devices()), ('device',))
  place = NamedSharding(mesh, PartitionSpec('device'))
  greatest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
  before = np.int32(0)
  while True:
    own = np.full(jax.local_device_count(), sent, np.int32)
    found = greatest(jax.make_array_from_process_local_data(place, own))
    sent = yield int(before)
    before = found


def may_be_lost(error: Exception) -> bool:
  """Returns whether the loss of another host may have caused an exception.

  XLA raises a collective that fails at its call as ValueError, with its status first ("UNKNOWN: Gloo all-reduce ..."),
  and one that fails later as JaxRuntimeError.
  """
  own = 'RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED'
  of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
      isinstance(error, ValueError) and re.match('[A-Z_]+: ', str(error)))
  return jax.process_count() > 1 and bool(of_runtime) and not any(kind in str(error) for kind in own)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__
