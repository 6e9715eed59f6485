"""Directories of checkpoints as Orbax manages them: what is kept, what is replaced, and what cannot be written."""

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

ITEMS = ('params', 'opt_state', 'config', 'rows')  # Orbax keeps the name metrics to itself
ONE_SAVE = threading.RLock()  # held while a thread saves: two saves at once would take each other's messages in Orbax
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def open_manager(directory: str | os.PathLike, max_to_keep: int = 0) -> ocp.CheckpointManager:
  """Opens a directory for saving, making it if needed; close it at the end.

  Args:
    directory: of step directories.
    max_to_keep: how many checkpoints are kept, those that `spread` says; 0 for all.
  """
  options = ocp.CheckpointManagerOptions(
      preservation_policy=_Spread(max_to_keep or math.inf), cleanup_tmp_directories=True)
  with writing(directory):
    return ocp.CheckpointManager(storage.resolve(directory), options=options, item_names=ITEMS)


@contextlib.contextmanager
def opened(directory: str | os.PathLike, max_to_keep: int = 0) -> Iterator[ocp.CheckpointManager]:
  """Opens a directory as `open_manager` does, and closes it at the end, whatever has failed by then."""
  manager = open_manager(directory, max_to_keep)
  try:
    yield manager
  except BaseException:
    with contextlib.suppress(Exception), writing(directory):  # it raises once more what could not be written
      manager.close()
    raise
  with writing(directory):
    manager.close()


def spread(steps: Sequence[int], most: float) -> list[int]:
  """Returns the steps to keep: the newest two, the first, and others spread over the run.

  Of the newest two the older one is there should the newest be damaged, and the rest shows how the run went. The steps
  that go are those whose neighbours are closest together.

  Args:
    steps: of all checkpoints, in ascending order.
    most: how many are kept, 2 or more.
  """
  kept = list(steps)
  while len(kept) > most:
    gaps = [after - before for before, after in zip([-math.inf, *kept], kept[1:-1])]
    del kept[gaps.index(min(gaps))]
  return kept


class _Spread:
  """Orbax's policy for `spread`."""

  def __init__(self, most: float):
    self._most = most

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Returns for each checkpoint whether it is kept."""
    del context
    kept = set(spread([x.step for x in checkpoints], self._most))
    return [x.step in kept for x in checkpoints]


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until all is written that was saved, and removes what it replaces.

  Raises:
    OSError: as `save`.
  """
  with writing(manager.directory):
    manager.wait_until_finished()
    for path in manager.directory.glob('*.replaced-*') if hosts.is_first() else ():
      path.rmtree(missing_ok=True)


def set_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
  """Gives step directories other names, so that they can be saved again; `finish` removes them."""
  if not hosts.as_first_says(bool(steps)):
    return
  for step in steps if hosts.is_first() else ():
    number = len(list(manager.directory.glob(f'{step}.replaced-*')))
    (manager.directory / str(step)).rename(manager.directory / f'{step}.replaced-{number}')
  hosts.wait_for_all('set aside')
  manager.reload()


@contextlib.contextmanager
def writing(path: os.PathLike) -> Iterator[None]:
  """Turns what Orbax and TensorStore raise where a file cannot be written into an OSError with the path.

  The threads of both print tracebacks of their own while the error is on its way to the caller: they are left out.
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
