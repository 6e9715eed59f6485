"""Handles SIGINT (Ctrl-C) and SIGTERM: prints a message at once, and stops the process without losing work.

Inside a training loop the current step is finished and saved first. Everywhere else the process ends at once: files are
written whole or not at all, so nothing is left half done. A thread prints the message, because Python's own handlers
wait until the compiler returns.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, try again later
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AT_FIRST = ' before anything had to be saved; every file that was written is whole.'


class Interrupted(Exception):
  """Raised when a signal has ended a run, after its last finished step was saved."""


class Watch:
  """Decides whether a signal ends the process at once or after the current step.

  Attributes:
    text: completes the message `Stopped by SIGINT` when the process ends at once.
    deferring: whether a first signal is deferred to the end of the step, where the caller reads `caught`.
    caught: number of the deferred signal, 0 if there is none.
  """

  def __init__(self, text: str):
    self.text, self.deferring, self.caught = text, False, 0
    self._lock, self._answered = threading.Lock(), threading.Event()

  def listen(self, pipe: int) -> None:
    """Handles the signals whose numbers it reads from a pipe, until it reads a zero byte."""
    while any(number := os.read(pipe, 1)):
      if number[0] in _SIGNALS:
        self._answer(signal.Signals(number[0]))

  def _answer(self, number: signal.Signals) -> None:
    """Defers a first signal while `deferring`; ends the process otherwise."""
    with self._lock:
      if not self.deferring or self.caught:
        _say(f'Stopped by {number.name}{self.text}')
        os._exit(STOPPED)
      self.caught = int(number)
      _say('Stopping after this step; press again to quit now.')
    self._answered.set()

  def handle(self, number: int, frame: object) -> None:
    """Blocks the main thread, for at most a second, until the other thread has handled the signal."""
    self._answered.wait(1.0)

  def end_deferring(self) -> None:
    """Makes later signals end the process at once; `caught` keeps its value."""
    with self._lock:
      self.deferring = False


_current: Watch | None = None


@contextlib.contextmanager
def watch(text: str = _AT_FIRST) -> Iterator[Watch]:
  """Handles signals inside the context.

  A nested call yields the outer watch, with its text replaced. Outside the main thread, where Python delivers no
  signals, nothing is caught.

  Args:
    text: completes the message `Stopped by SIGINT`.
  """
  global _current
  if threading.current_thread() is not threading.main_thread():
    yield Watch(text)
  elif _current:
    _current.text = text
    for number in _SIGNALS:
      signal.signal(number, _current.handle)  # again: JAX's distributed runtime replaces the handler of SIGTERM
    yield _current
  else:
    _current = Watch(text)
    stop = _listen(_current)
    try:
      yield _current
    finally:
      stop()
      _current = None


def watch_process() -> None:
  """Handles signals until the process ends; programs call it in their main thread."""
  global _current
  if not _current:
    _current = Watch(_AT_FIRST)
    _listen(_current)


def tell(text: str) -> None:
  """Sets the text of the current watch; does nothing without a watch or outside the main thread."""
  if _current and threading.current_thread() is threading.main_thread():
    _current.text = text


def _listen(own: Watch) -> Callable[[], None]:
  """Lets a watch handle signals; returns a function that restores the former handlers."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  thread = threading.Thread(target=own.listen, args=(reading,), daemon=True)
  thread.start()
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  handlers = {number: signal.signal(number, own.handle) for number in _SIGNALS}

  def stop():
    for number, handler in handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before)
    os.write(writing, bytes(1))  # closing it is not enough: a forked child has the pipe open too
    thread.join()
    os.close(writing)
    os.close(reading)

  return stop


def _reset_in_child():
  """Restores the default handlers in a forked child, whose signals would otherwise end its parent."""
  global _current
  if _current:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _current = None


if hasattr(os, 'register_at_fork'):  # not on Windows
  os.register_at_fork(after_in_child=_reset_in_child)


def _say(text: str) -> None:
  """Prints a line to the standard error, below a progress bar, without taking locks of the main thread."""
  with contextlib.suppress(OSError):  # closed, or a pipe without a reader: the process ends anyway
    os.write(2, f'\n{text}\n'.encode())
