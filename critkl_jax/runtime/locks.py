"""Locks a workdir, so that one run at a time writes into it; the lock ends with its process.

`WORKDIR/run.lock` names the process that writes there. The operating system locks the file (`flock`) until the process
ends, so the file of a killed process does not block the next run. On file systems that several hosts share, `flock` may
not reach the other hosts; there the file's modification time is a sign of life. The file stays after the run; it
shows that a run wrote the other files of the workdir.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from critkl_jax.runtime import hosts, storage
from critkl_jax.runtime.storage import WorkdirError

LOCK = 'run.lock'
BEAT = 5.0  # seconds between signs of life
PATIENCE = 4 * BEAT  # seconds without a sign of life after which a process on another host counts as dead


@dataclasses.dataclass
class _Held:
  """A lock that this process holds.

  Attributes:
    thread: identifier of the thread that holds it.
    known: whether a run had written into the workdir before.
  """

  thread: int
  known: bool


_held: dict[pathlib.Path, _Held] = {}
_files: set[int] = set()
_guard = threading.Lock()


def _release_in_child():
  """Closes the parent's lock files in a forked child; otherwise a lock would last as long as the child."""
  for file in _files:
    os.close(file)
  _held.clear()
  _files.clear()


os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[bool]:
  """Locks a workdir while the context lasts, and makes the directory if needed.

  The thread that holds a workdir may lock it again. A member's workdir locks the workdir of its study. On several hosts
  the first one locks for all. A workdir in a bucket cannot be locked; a note is printed.

  Args:
    workdir: directory of a run.

  Yields:
    Whether the workdir already had a lock file, which means that a run wrote its files; true for a bucket.

  Raises:
    WorkdirError: if another run or another thread holds the workdir, or it is not writable.
  """
  if storage.is_remote(workdir):
    hosts.say(f'{workdir} cannot be locked: take care that no other run writes into it.')
    yield True
    return
  root = _root(pathlib.Path(os.path.realpath(os.path.expanduser(workdir))))
  with _guard:
    own = _held.get(root)
  if own and own.thread == threading.get_ident():
    yield own.known
    return
  if own:
    raise WorkdirError(f'{root}: another thread of this process writes into it; wait for it, or give another workdir.')
  with _first_host_holds(root) as known:
    with _guard:
      _held[root] = _Held(threading.get_ident(), known)
    try:
      yield known
    finally:
      with _guard:
        _held.pop(root, None)


def _root(workdir):
  """Returns the workdir to lock: the study's workdir for a member, else the workdir itself."""
  study = workdir.parent.parent
  return study if workdir.parent.name == 'members' and os.path.isfile(study / 'members.json') else workdir


@contextlib.contextmanager
def _first_host_holds(root):
  with contextlib.ExitStack() as stack:
    known = hosts.first_does(lambda: stack.enter_context(_locked(root)), WorkdirError)
    yield bool(hosts.broadcast_from_first(bool(known)))


@contextlib.contextmanager
def _locked(root):
  """Locks a workdir on this host.

  If the lock file is new and nothing else was written, removes it at the end, with the directories made for it.
  """
  try:
    made = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    before = set(os.listdir(root))
    file, new = _lock(root / LOCK)
  except OSError as error:
    raise WorkdirError(f'{root}: nothing can be written there ({error.strerror}); give another workdir.') from error
  _files.add(file)
  over = threading.Event()
  thread = threading.Thread(target=_beat, args=(file, over), daemon=True)
  thread.start()
  try:
    yield not new
  finally:
    over.set()
    thread.join()
    if file in _files:  # not in a forked child
      _files.remove(file)
      _release(root, file, made, new and set(os.listdir(root)) == before | {LOCK})


def _lock(path):
  """Locks a file and writes this process into it; returns its descriptor and whether it is new."""
  while True:
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      supported = _flock(file, path)
      if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):  # else its holder has just removed it
        _refuse_living(path, _holder(file), supported)
        _write(file, {'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')})
        return file, new
    except BaseException:
      os.close(file)
      raise
    os.close(file)


def _flock(file, path):
  """Locks a file; returns whether its file system supports `flock`."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise _in_use(path, _holder(file)) from None
  except OSError:
    return False
  return True


def _refuse_living(path, holder, flock_supported):
  """Raises a WorkdirError if the process that a lock file names is alive and `flock` did not detect it."""
  if not holder:
    return
  here = holder['host'] == socket.gethostname()
  if here and (flock_supported or not _is_running(holder['pid'])):
    return
  hosts.say(f'{path} names process {holder["pid"]} on {holder["host"]}: waiting {PATIENCE:.0f} s for a sign of life.')
  before, end = _modified(path), time.monotonic() + PATIENCE
  while time.monotonic() < end:
    time.sleep(min(1.0, PATIENCE / 10))
    if _modified(path) != before:
      raise _in_use(path, holder)


def _in_use(path, holder):
  who = f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}' if holder else 'another process'
  return WorkdirError(f'{path.parent} is in use: {who}, writes into it; wait for that run, stop it, or give another '
                      'workdir.')


def _modified(path):
  with path.open() as file:  # opened each time, because a shared file system caches the attributes of an open file
    return os.fstat(file.fileno()).st_mtime_ns


def _is_running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _holder(file):
  """Reads host, process id and start time from a lock file; returns None if it has none, as after an orderly end."""
  try:
    found = json.loads(os.pread(file, 4096, 0))
    return {'host': str(found['host']), 'pid': int(found['pid']), 'since': str(found['since'])}
  except (ValueError, KeyError, TypeError):
    return None


def _write(file, value):
  os.ftruncate(file, 0)
  os.pwrite(file, f'{storage.to_json(value)}\n'.encode(), 0)


def _beat(file, over):
  while not over.wait(BEAT):
    with contextlib.suppress(OSError):
      os.utime(file)


def _release(root, file, made, unused):
  with contextlib.suppress(OSError):  # after an error the file still names the process that has ended
    if unused:
      os.unlink(root / LOCK)
      for path in made:
        path.rmdir()
    else:
      _write(file, {'ended': time.strftime('%Y-%m-%d %H:%M:%S')})
    fcntl.flock(file, fcntl.LOCK_UN)  # at once, even if a forked child has not closed its descriptor yet
  os.close(file)
