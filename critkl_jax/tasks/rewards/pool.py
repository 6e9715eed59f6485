"""Runs reward functions in processes of their own, with a time limit for each call."""

import contextlib
import itertools
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np

from critkl_jax.tasks.rewards import worker
from critkl_jax.tasks.rewards.worker import RewardError

_LOADING = 120.0  # seconds that a process may take to import a function


class RewardPool:
  """Calls reward functions on batches: those given by name in processes of the pool, others in this process.

  A function is called once for each part of a batch. A part contains whole groups: successive completions of the same
  prompt. So a function may compare the completions of one prompt, but no others; its values must not depend on chance.
  """

  def __init__(self, workers: int = 0, seconds: float = 60.0):
    """Makes a pool; processes start when they are first needed.

    Args:
      workers: number of processes; 0 calls functions in this process, where no time limit holds.
      seconds: time limit of a call, without the time to import the function.
    """
    self._workers, self._seconds = workers, seconds
    self._processes: list[_Process | None] = [None] * workers
    self._loaded: dict[str, Callable] = {}

  def __enter__(self) -> 'RewardPool':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def __call__(self, functions: dict[str, Callable | str], prompts: Sequence[Any], completions: Sequence[Any],
               columns: dict[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Rewards a batch.

    Args:
      functions: name -> function, or its name `module:function`; only the latter can run in another process.
      prompts: n texts, or lists of messages.
      completions: n of the same kind.
      columns: name -> n values.
      rows: number of each prompt's row from 1.

    Returns:
      Name -> float64 `[n]` values.

    Raises:
      RewardError: as `worker.call`, or if a call takes too long or its process dies.
    """
    if not rows:
      return {name: np.zeros(0) for name in functions}
    parts = _parts(rows, max(self._workers, 1))
    jobs = [(name, function, part) for name, function in functions.items() for part in parts]
    batches = [([prompts[i] for i in part], [completions[i] for i in part],
                {key: [column[i] for i in part] for key, column in columns.items()}, [rows[i] for i in part])
               for _, _, part in jobs]
    found = self._run([function for _, function, _ in jobs], [name for name, _, _ in jobs], batches)
    return {name: np.concatenate([np.asarray(values) for (own, _, _), values in zip(jobs, found) if own == name])
            for name in functions}

  def _run(self, functions, names, batches):
    """Returns the values of all jobs, in order; raises the fault of the first job that has one."""
    waiting, results = queue.SimpleQueue(), [None] * len(batches)
    inside = [i for i, function in enumerate(functions) if callable(function) or not self._workers]
    for i in range(len(batches)):
      if i not in inside:
        waiting.put(i)
    threads = [threading.Thread(target=self._serve, args=(slot, waiting, functions, batches, results), daemon=True)
               for slot in range(min(self._workers, len(batches) - len(inside)))]
    for thread in threads:
      thread.start()
    for i in inside:
      results[i] = self._call_here(functions[i], names[i], batches[i])
    for thread in threads:
      thread.join()
    for result in results:
      if isinstance(result, RewardError):
        raise result
    return results

  def _call_here(self, function, name, batch):
    try:
      if isinstance(function, str):
        if function not in self._loaded:
          self._loaded[function] = worker.load(function)
        function = self._loaded[function]
      return worker.call(function, name, *batch)
    except RewardError as fault:
      return fault

  def _serve(self, slot, waiting, functions, batches, results):
    """Takes jobs until none is left."""
    while True:
      try:
        i = waiting.get_nowait()
      except queue.Empty:
        return
      try:
        process = self._processes[slot] = self._processes[slot] or _Process()
        results[i] = process.call(functions[i], batches[i], self._seconds)
      except RewardError as fault:
        results[i] = fault
      except Exception as error:  # columns that cannot be sent, or no room for a process
        results[i] = RewardError(f'reward: {functions[i]} cannot be called in a process of its own '
                                 f'({type(error).__name__}: {error}).')
      if self._processes[slot] and not self._processes[slot].alive():
        self._processes[slot] = None

  def close(self) -> None:
    """Ends the processes."""
    for process in filter(None, self._processes):
      process.close()
    self._processes = [None] * self._workers


class _Process:
  """A process that runs reward functions."""

  def __init__(self):
    self._connection, other = Pipe()
    # Not by `multiprocessing`, whose processes import the main module again, and JAX with it. What a function prints
    # goes to the standard error. Ctrl-C is for the run, which ends its processes.
    self._process = subprocess.Popen(
        [sys.executable, '-P', str(pathlib.Path(worker.__file__)), str(other.fileno()), str(os.getpid())],
        pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    other.close()
    self._connection.send(sys.path)

  def call(self, name: str, batch: tuple[Any, ...], seconds: float) -> list[float]:
    """Returns the values of a function for a batch; raises RewardError."""
    prompts, rows = batch[0], batch[-1]
    try:
      # Pickled here: where a column cannot be, `send` leaves a buffer behind that warns when it is collected.
      self._connection.send_bytes(pickle.dumps((name, *batch)))
      for limit, doing in ((_LOADING, 'to be imported'), (seconds, f'for {worker.at(None, prompts, rows)}')):
        if not self._connection.poll(limit):
          self.close()
          raise RewardError(f'reward: {name} took more than {limit:g} s {doing}; --reward_seconds sets the limit of a '
                            'call.')
        found = self._connection.recv()
        if isinstance(found, str):
          raise RewardError(found)
    except (EOFError, OSError) as error:
      self.close()
      raise RewardError(f'reward: the process of {name} died (exit code {self._process.returncode}) at '
                        f'{worker.at(None, prompts, rows)}.') from error
    return found

  def alive(self) -> bool:
    """Returns whether the process still runs."""
    return self._process.poll() is None

  def close(self) -> None:
    """Ends the process, and what its functions have started."""
    self._connection.close()
    try:
      self._process.wait(0.2)  # it ends when the connection does, unless a function is running
    except subprocess.TimeoutExpired:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()


def _parts(rows: Sequence[int], number: int) -> list[range]:
  """Splits positions into at most `number` parts of about equal size, none of which divides successive equal rows."""
  starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
  bounds = [starts[len(starts) * k // number] for k in range(number)]
  bounds = [*dict.fromkeys(bounds), len(rows)]
  return [range(a, b) for a, b in itertools.pairwise(bounds)]
