"""Opens Orbax checkpoint managers, limits the number of kept checkpoints, and reports write errors."""

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

from critkl_jax.runtime import hosts, storage

ITEMS = ('params', 'opt_state', 'config', 'rows')  # Orbax reserves the name `metrics`
ONE_SAVE = threading.RLock()  # held during a save: concurrent saves would mix up their messages in Orbax
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def open_manager(directory: str | os.PathLike, max_to_keep: int = 0) -> ocp.CheckpointManager:
  """Opens a checkpoint manager for a directory, which is made if needed; the caller closes the manager.

  Args:
    directory: contains the step directories.
    max_to_keep: number of checkpoints to keep, picked by `spread`; 0 for all.
  """
  options = ocp.CheckpointManagerOptions(
      preservation_policy=_Spread(max_to_keep or math.inf), cleanup_tmp_directories=True)
  with writing(directory):
    return ocp.CheckpointManager(storage.resolve(directory), options=options, item_names=ITEMS)


@contextlib.contextmanager
def opened(directory: str | os.PathLike, max_to_keep: int = 0) -> Iterator[ocp.CheckpointManager]:
  """Opens a manager like `open_manager`, and closes it at the end of the context, also after an error."""
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
  """Returns the steps to keep: the newest two, the first, and more spread over the run.

  A run whose newest checkpoint is damaged resumes from the second newest; the others show the course of the run. The
  step whose neighbours are closest together is dropped first.

  Args:
    steps: steps of all checkpoints, in ascending order.
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
  """Waits until checkpoints are written, then removes the old ones that they replace.

  Raises:
    OSError: if a checkpoint cannot be written; the error names the directory.
  """
  with writing(manager.directory):
    manager.wait_until_finished()
    for path in manager.directory.glob('*.replaced-*') if hosts.is_first() else ():
      path.rmtree(missing_ok=True)


def set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
  """Renames step directories, so that the steps can be saved again; `finish` removes the renamed ones."""
  if not hosts.broadcast_from_first(bool(steps)):
    return
  for step in steps if hosts.is_first() else ():
    number = len(list(manager.directory.glob(f'{step}.replaced-*')))
    (manager.directory / str(step)).rename(manager.directory / f'{step}.replaced-{number}')
  hosts.wait_for_all('set aside')
  manager.reload()


@contextlib.contextmanager
def writing(path: os.PathLike) -> Iterator[None]:
  """Converts write errors of Orbax and TensorStore to an OSError with the path.

  Suppresses the tracebacks that their threads would print meanwhile.
  """
  with ONE_SAVE:  # the hooks are global to the process
    hooks, verbosity = (sys.excepthook, sys.unraisablehook, threading.excepthook), logging.get_verbosity()
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    logging.set_verbosity(logging.FATAL)
    try:
      with storage.writing(path):
        yield
    except (ValueError, RuntimeError) as error:  # RuntimeError: from JAX, or from a thread pool that has been shut down
      number = next((n for n in _OF_DISKS if os.strerror(n) in str(error)), None)
      if number is None:
        raise
      raise OSError(number, os.strerror(number), str(path)) from error
    finally:
      logging.set_verbosity(verbosity)
      sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
