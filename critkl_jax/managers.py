"""Orbax checkpoint managers: opens them, limits how many checkpoints are kept, and reports errors of writing."""

import contextlib
import errno
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

from critkl_jax import hosts, storage

ITEMS = ('params', 'opt_state', 'config', 'rows')  # Orbax reserves the name `metrics`
ONE_SAVE = threading.RLock()  # held during a save: in Orbax two saves at once would take each other's messages
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def open_manager(directory: str | os.PathLike, max_to_keep: int = 0) -> ocp.CheckpointManager:
  """Opens a directory for saving, making it if needed; close it at the end.

  Args:
    directory: of step directories.
    max_to_keep: number of checkpoints that are kept, picked by `spread`; 0 for all.
  """
  options = ocp.CheckpointManagerOptions(
      preservation_policy=_Spread(max_to_keep or math.inf), cleanup_tmp_directories=True)
  with writing(directory):
    return ocp.CheckpointManager(storage.resolve(directory), options=options, item_names=ITEMS)


@contextlib.contextmanager
def opened(directory: str | os.PathLike, max_to_keep: int = 0) -> Iterator[ocp.CheckpointManager]:
  """Opens a directory like `open_manager`, and closes the manager at the end, after an error too."""
  manager = open_manager(directory, max_to_keep)
  try:
    yield manager
  except BaseException:
    with contextlib.suppress(Exception), writing(directory):  # closing raises the same error again
      manager.close()
    raise
  with writing(directory):
    manager.close()


def spread(steps: Sequence[int], most: float) -> list[int]:
  """Returns the steps to keep: the newest two, then the first, and others spread over the run.

  The second newest is there in case the newest is damaged; the others show the course of the run. The step whose
  neighbours are closest together is dropped first.

  Args:
    steps: of all checkpoints, in ascending order.
    most: number of steps to keep, 2 or more.
  """
  kept = list(steps)
  while len(kept) > most:
    gaps = [after - before for before, after in zip([-math.inf, *kept], kept[1:-1])]
    del kept[gaps.index(min(gaps))]
  return kept


class _Spread:
  """Applies `spread` as a preservation policy of Orbax."""

  def __init__(self, most: float):
    self._most = most

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Returns for each checkpoint whether to keep it."""
    del context
    kept = set(spread([x.step for x in checkpoints], self._most))
    return [x.step in kept for x in checkpoints]


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until saved checkpoints are written, and removes the checkpoints that they replace.

  Raises:
    OSError: if a checkpoint cannot be written; the error names the directory.
  """
  with writing(manager.directory):
    manager.wait_until_finished()
    for path in manager.directory.glob('*.replaced-*') if hosts.is_first() else ():
      path.rmtree(missing_ok=True)


def set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
  """Renames step directories, so that the steps can be saved again; `finish` removes the renamed ones."""
  if not hosts.as_first_says(bool(steps)):
    return
  for step in steps if hosts.is_first() else ():
    number = len(list(manager.directory.glob(f'{step}.replaced-*')))
    (manager.directory / str(step)).rename(manager.directory / f'{step}.replaced-{number}')
  hosts.wait_for_all('set aside')
  manager.reload()


@contextlib.contextmanager
def writing(path: os.PathLike) -> Iterator[None]:
  """Turns an error of Orbax or TensorStore about a file that cannot be written into an OSError with the path.

  Meanwhile the threads of both would print tracebacks of their own: these are suppressed.
  """
  with ONE_SAVE:  # the hooks are those of the whole process
    hooks, verbosity = (sys.excepthook, sys.unraisablehook, threading.excepthook), logging.get_verbosity()
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    logging.set_verbosity(logging.FATAL)
    try:
      with storage.writing(path):
        yield
    except (ValueError, RuntimeError) as error:  # RuntimeError: of JAX, or of a thread pool that has ended
      number = next((n for n in _OF_DISKS if os.strerror(n) in str(error)), None)
      if number is None:
        raise
      raise OSError(number, os.strerror(number), str(path)) from error
    finally:
      logging.set_verbosity(verbosity)
      sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
