"""Runs reward functions in processes of their own, with a time limit for each call."""

import itertools
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np

from critkl_jax.tasks.rewards import worker
from critkl_jax.tasks.rewards.worker import RewardError

_LOADING = 120.0  # seconds that a process may take to import a function, added to the limit of its first call


class RewardPool:
  """Calls reward functions on batches, each call in a process of the pool, or in this process without any.

  A function is called once for each part of a batch; a part holds whole groups, the completions of one prompt that
  follow each other. With one process a batch is one part, so that a function may compare all completions.
  """

  def __init__(self, workers: int = 0, seconds: float = 60.0):
    """Makes a pool; processes start when they are first needed.

    Args:
      workers: number of processes; 0 calls functions in this process, where no time limit holds.
      seconds: time limit of a call.
    """
    self._workers, self._seconds = workers, seconds
    self._processes: list[_Process | None] = [None] * workers
    self._loaded: dict[str, Callable] = {}

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
      process = self._processes[slot] = self._processes[slot] or _Process()
      try:
        results[i] = process.call(functions[i], batches[i], self._seconds)
      except RewardError as fault:
        results[i] = fault
        if not process.alive():
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
    # goes to the standard error.
    paths = os.pathsep.join(path for path in sys.path if path)
    self._process = subprocess.Popen(
        [sys.executable, '-P', str(pathlib.Path(worker.__file__)), str(other.fileno())], pass_fds=[other.fileno()],
        stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,  # Ctrl-C is for the run, which ends its processes
        env=os.environ | {'PYTHONPATH': paths})
    other.close()
    self._known: set[str] = set()

  def call(self, name: str, batch: tuple[Any, ...], seconds: float) -> list[float]:
    """Returns the values of a function for a batch; raises RewardError."""
    limit = seconds if name in self._known else seconds + _LOADING
    self._known.add(name)
    try:
      self._connection.send((name, *batch))
      if not self._connection.poll(limit):
        self.close()
        raise RewardError(f'reward: {name} took more than {seconds:g} s for rows {batch[-1][0]} to {batch[-1][-1]}; '
                          'give a greater reward_seconds if it needs them.')
      values, fault = self._connection.recv()
    except (EOFError, OSError) as error:
      self.close()
      raise RewardError(f'reward: the process of {name} died (exit code {self._process.returncode}) at rows '
                        f'{batch[-1][0]} to {batch[-1][-1]}.') from error
    if fault:
      raise RewardError(fault)
    return values

  def alive(self) -> bool:
    """Returns whether the process still runs."""
    return self._process.poll() is None

  def close(self) -> None:
    """Ends the process."""
    self._connection.close()
    try:
      self._process.wait(0.2)  # it ends when the connection does, unless a function is running
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


def _parts(rows: Sequence[int], number: int) -> list[range]:
  """Splits positions into at most `number` parts of about equal size, none of which divides successive equal rows."""
  starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
  bounds = [starts[len(starts) * k // number] for k in range(number)]
  bounds = [*dict.fromkeys(bounds), len(rows)]
  return [range(a, b) for a, b in itertools.pairwise(bounds)]
