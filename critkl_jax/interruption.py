"""Signals that ask a process to stop, SIGINT (Ctrl-C) and SIGTERM: answered at once, obeyed where nothing is lost.

Inside a training loop the step under way is finished and saved. Everywhere else the process ends at once: files are
written whole or not at all, so that there is nothing to finish. A thread gives the answer, because Python's own
handlers wait until the compiler returns.
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
  """A signal ended the run after a finished step, which has been saved."""


class Watch:
  """Decides how the process answers a signal.

  Attributes:
    text: completes `Stopped by SIGINT`, for a process that ends at once.
    deferring: whether a first signal waits for the end of a step, after which the caller looks at `caught`.
    caught: number of the signal that waits, 0 if none does.
  """

  def __init__(self, text: str):
    self.text, self.deferring, self.caught = text, False, 0
    self._lock, self._answered = threading.Lock(), threading.Event()

  def listen(self, pipe: int) -> None:
    """Answers the signals whose numbers it reads from a pipe, until a zero byte."""
    while any(number := os.read(pipe, 1)):
      if number[0] in _SIGNALS:
        self._answer(signal.Signals(number[0]))

  def _answer(self, number: signal.Signals) -> None:
    """Lets a first signal wait while `deferring`; ends the process otherwise."""
    with self._lock:
      if not self.deferring or self.caught:
        _say(f'Stopped by {number.name}{self.text}')
        os._exit(STOPPED)
      self.caught = int(number)
      _say('Stopping after this step; press again to quit now.')
    self._answered.set()

  def handle(self, number: int, frame: object) -> None:
    """Keeps the main thread from going on before the signal is answered."""
    self._answered.wait(1.0)

  def end_deferring(self) -> None:
    """Makes signals end the process at once from now on; `caught` does not change any more."""
    with self._lock:
      self.deferring = False


_current: Watch | None = None


@contextlib.contextmanager
def watch(text: str = _AT_FIRST) -> Iterator[Watch]:
  """Answers signals inside the context.

  Inside of another watch that one is returned, with its text set to this one. Outside of the main thread, where Python
  has no signals, nothing is caught.

  Args:
    text: completes `Stopped by SIGINT`.
  """
  global _current
  if threading.current_thread() is not threading.main_thread():
    yield Watch(text)
  elif _current:
    _current.text = text
    for number in _SIGNALS:
      signal.signal(number, _current.handle)  # again: the runtime of several hosts takes SIGTERM for itself
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
  """Answers signals from now on until the process ends; to be called by programs, in their main thread."""
  global _current
  if not _current:
    _current = Watch(_AT_FIRST)
    _listen(_current)


def tell(text: str) -> None:
  """Sets the text of the watch that there is, if there is one and this is its thread."""
  if _current and threading.current_thread() is threading.main_thread():
    _current.text = text


def _listen(own: Watch) -> Callable[[], None]:
  """Has a watch answer signals; returns what ends that, and restores what was in its place."""
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
    os.write(writing, bytes(1))  # to close it would not do: a forked child holds the pipe, too
    thread.join()
    os.close(writing)
    os.close(reading)

  return stop


def _forget():
  """Gives a forked child the usual answers to signals: those of its parent would end the parent in its place."""
  global _current
  if _current:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _current = None


if hasattr(os, 'register_at_fork'):  # not on Windows
  os.register_at_fork(after_in_child=_forget)


def _say(text: str) -> None:
  """Prints a line to the standard error, past a progress bar and whatever the main thread holds."""
  with contextlib.suppress(OSError):  # closed, or a pipe that nobody reads: the process ends all the same
    os.write(2, f'\n{text}\n'.encode())
