"""Several hosts, a process on each, on JAX's own distributed runtime; on one host nothing here has an effect.

Every process runs the same program, and calls what is collective in the same order: jitted programs on global arrays,
saves, and the functions below. The workdir is one that all hosts see.
"""

import contextlib
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
  """Joins the other processes; to be called before anything else asks for a device.

  Args:
    coordinator_address: host and port of process 0; empty where the environment tells (SLURM, Open MPI, Cloud TPU, GKE
      and Kubernetes with the package `kubernetes`), and then the next two are not needed either.
    num_processes: number of processes.
    process_id: which of them this is.
    timeout: seconds without a sign of life after which a process is taken for dead.

  Raises:
    ValueError: if the environment does not tell what is not given.
    LostHost: if the others do not come.
  """
  try:
    jax.distributed.initialize(
        coordinator_address or None, num_processes, process_id, initialization_timeout=3 * timeout,
        heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=6 * timeout)  # the first one may still be drawing
  except ValueError as error:
    raise ValueError(f'multi_host: {error} Give --coordinator_address, --num_processes and --process_id.') from error
  except jax.errors.JaxRuntimeError as error:
    raise LostHost(f'the {num_processes or "other"} processes did not meet: {_first_line(error)}') from error


def last_words(text: str) -> Callable[[], None]:
  """Has a text printed to the standard error if this process ends before what is returned has been called.

  The runtime aborts a process when another one has been silent for too long, and says so to those who know it; nothing
  in the process can add to it, so a small process of its own waits for that end.
  """
  watch = 'import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)'
  watcher = subprocess.Popen([sys.executable, '-c', watch, text], stdin=subprocess.PIPE, start_new_session=True)
  return lambda: watcher.communicate(b'an orderly end')


def is_first() -> bool:
  """Returns whether this process is the one that prints, and writes everything but checkpoints."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line at once, on the first host only: what a slow phase does, before it begins."""
  if is_first():
    print(text, flush=True)


@contextlib.contextmanager
def waiting(text: str, every: float = 20.0) -> Iterator[None]:
  """Says what a slow phase does before it begins and, for what shows no progress of its own, such as a compilation, how
  long it has taken so far, every so many seconds."""
  say(text)
  start, over = time.monotonic(), threading.Event()

  def go_on_saying():
    while not over.wait(every):
      say(f'... {time.monotonic() - start:.0f} s so far')

  thread = threading.Thread(target=go_on_saying, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def wait_for_all(name: str) -> None:
  """Returns when all processes have called it with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def as_first_says(value: int) -> int:
  """Returns the value that process 0 has, of a few on a file system that others may see later."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_does(work: Callable[[], ResultT], *errors: type[Exception]) -> ResultT | None:
  """Calls a function on the first host alone, while the others wait, and returns its result there, None elsewhere.

  Args:
    work: is called without arguments.
    *errors: what it may raise, each with a text as its argument; then all hosts raise the same one, so that none waits
      for another in vain, and all end with the same exit code.
  """
  result, failure, number = None, None, 0
  try:
    result = work() if is_first() else None
  except errors as raised:
    failure, number = raised, next(i for i, kind in enumerate(errors, 1) if isinstance(raised, kind))
  if number := as_first_says(number):
    raise failure or errors[number - 1]('refused by the first host, which says why.')
  return result


def least(value: int) -> int:
  """Returns the least of the values, below 2^31, that all processes have."""
  if jax.process_count() == 1:
    return value
  return int(np.min(multihost_utils.process_allgather(np.int32(value))))


def any_host_before() -> Generator[int, int, None]:
  """Returns a generator to which every host sends a number in each round, and which yields the greatest number that any
  host sent in the round before: no host has to wait for the others. On one host it is that of this round.

  Prime it with `next`.
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


def may_be_lost(error: jax.errors.JaxRuntimeError) -> bool:
  """Returns whether an error of the runtime may come of the loss of another host."""
  own = 'RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED'
  return jax.process_count() > 1 and not any(kind in str(error) for kind in own)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__
