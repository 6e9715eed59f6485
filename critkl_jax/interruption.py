"""Signals that ask a process to stop, SIGINT (Ctrl-C) and SIGTERM: answered at once, obeyed where nothing is lost.

Inside a training loop the step under way is finished and saved. Everywhere else the process ends at once: files are
written whole or not at all, so that there is nothing to finish. A thread gives the answer, because Python's own
handlers wait until the compiler returns.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, try again later
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """A signal ended the run after a finished step, which has been saved."""


class Watch:
  """What becomes of signals now.

  Attributes:
    text: completes `Stopped by SIGINT`, for a process that ends at once.
    caught: numbers of the signals since the watch began.
    deferring: whether a first signal waits for the end of a step, after which the caller looks at `caught`.
  """

  def __init__(self, text: str):
    self.text, self.caught, self.deferring = text, [], False

  def answer(self, pipe: int) -> None:
    """Reads numbers of signals from a pipe until it is closed, says what follows from each, and ends the process."""
    waiting = False
    while number := os.read(pipe, 1):
      if number[0] not in _SIGNALS:
        continue
      if self.deferring and not waiting:
        waiting = True
        _say('Stopping after this step; press again to quit now.')
      else:
        _say(f'Stopped by {signal.Signals(number[0]).name}{self.text}')
        os._exit(STOPPED)


_current: Watch | None = None


@contextlib.contextmanager
def watch(text: str = ' before anything had to be saved; every file that was written is whole.') -> Iterator[Watch]:
  """Answers signals inside the context.

  Inside of another watch that one is returned, with its text set to this one. Outside of the main thread, where Python
  has no signals, nothing is caught.

  Args:
    text: completes `Stopped by SIGINT`.
  """
  global _current
  if _current is not None:
    _current.text = text
    yield _current
    return
  own = Watch(text)
  if threading.current_thread() is not threading.main_thread():
    yield own
    return
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  thread = threading.Thread(target=own.answer, args=(reading,), daemon=True)
  thread.start()
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  handlers = {number: signal.signal(number, lambda number, frame: own.caught.append(number)) for number in _SIGNALS}
  _current = own
  try:
    yield own
  finally:
    _current = None
    for number, handler in handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before)
    os.close(writing)
    thread.join()
    os.close(reading)


def _say(text: str) -> None:
  """Prints a line to the standard error, past a progress bar and whatever the main thread holds."""
  os.write(2, f'\n{text}\n'.encode())
