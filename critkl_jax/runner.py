"""The host loop: it dispatches steps, looks at the metrics of the step before, logs, saves, and obeys signals."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import chex
import flax.traverse_util
import jax
import tqdm
from absl import logging

from critkl_jax import checkpoint
from critkl_jax.records import TrainState

try:
  import tensorboardX
except ImportError:  # an extra
  tensorboardX = None


class Interrupted(Exception):
  """A signal ended the run after a finished step, which has been saved."""


class MetricsWriter:
  """Writes metrics as JSON lines and, where tensorboardX is installed, as TensorBoard events.

  Lines of steps after `first_step` that an interrupted run left are dropped.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int):
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / 'metrics.jsonl'
    rows = [row for row in read_metrics(self._path) if row['step'] <= first_step]
    write_text(self._path, ''.join(json.dumps(row) + '\n' for row in rows))
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=first_step + 1) if tensorboardX else None

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of one step."""
    with self._path.open('a') as file:
      file.write(json.dumps({'step': step, **metrics}) + '\n')
    if self._events:
      for name, value in metrics.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Finishes the event file."""
    if self._events:
      self._events.close()


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all, whenever the process ends."""
  unfinished = path.with_name(f'{path.name}.unfinished')
  unfinished.write_text(text)
  os.replace(unfinished, path)


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
  """Reads the lines of a metrics file; a last line that was not finished is left out, a missing file has none."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.is_file() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning('%s: unfinished line dropped.', path)
  return rows


def run(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
        num_steps: int, info: checkpoint.CheckpointInfo, workdir: str | pathlib.Path, save_every: int,
        show: tuple[str, ...] = ('loss',)) -> TrainState:
  """Advances a state to `num_steps`, from the latest checkpoint of the workdir if there is one.

  Under the workdir: `checkpoints/` (every `save_every` steps, at the end and on SIGINT or SIGTERM), `metrics.jsonl` and
  TensorBoard events. The step's arrays are donated; while the device works on a step, the host logs the one before.

  Args:
    step: (state, number of finished steps) -> (state, metrics); the metrics have `num_tokens` among them.
    state: where to start if there is no checkpoint.
    num_steps: number of finished steps at which the run ends.
    info: saved beside the arrays; a checkpoint of another run is refused.
    workdir: directory of this run.
    save_every: steps between checkpoints.
    show: metrics in the progress bar.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir's checkpoint belongs to another config or is damaged.
    Interrupted: after a signal, once the state is saved.
  """
  workdir = pathlib.Path(workdir)
  state = resume(state, info, workdir)
  # Bind the arrays to their devices: a restored state is bound, a fresh one is not, and to jit the two differ.
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))
  first = int(state.step)
  if first >= num_steps:
    return state
  with (contextlib.closing(MetricsWriter(workdir, first)) as writer,
        contextlib.closing(checkpoint.open_manager(workdir / 'checkpoints')) as manager,
        _caught_signals() as caught,
        tqdm.tqdm(total=num_steps, initial=first, unit='it', dynamic_ncols=True) as bar):
    log = _Log(writer, bar, show)
    for number in range(first + 1, num_steps + 1):
      state, metrics = step(state, number - 1)
      log.add(number, metrics)
      stop = bool(caught)
      if stop or number % save_every == 0 or number == num_steps:
        log.flush()  # before the save, so that a resumed run has a line for every step
        checkpoint.save(manager, state, info)
      if stop and number < num_steps:
        raise Interrupted(f'stopped by {signal.Signals(caught[0]).name} after step {number} of {num_steps}; it is '
                          f'saved in {workdir}, and the same command goes on from there.')
  return state


class _Log:
  """Holds back the metrics of the last step until the next one is under way, so that the device never waits."""

  def __init__(self, writer: MetricsWriter, bar: tqdm.tqdm, show: tuple[str, ...]):
    self._writer, self._bar, self._show = writer, bar, show
    self._pending: tuple[int, dict[str, chex.Array]] | None = None
    self._time = time.monotonic()

  def add(self, number: int, metrics: dict[str, chex.Array]) -> None:
    """Logs what was held back, and holds back these metrics of a step that has been dispatched."""
    self.flush()
    self._pending = (number, metrics)

  def flush(self) -> None:
    """Waits for the metrics held back, and logs them."""
    if self._pending is None:
      return
    number, metrics = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    values |= {'seconds': now - self._time, 'tokens_per_second': values['num_tokens'] / (now - self._time)}
    self._time = now
    self._writer.write(number, values)
    shown = {name: f'{values[name]:.3g}' for name in (*self._show, 'tokens_per_second')}
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()


def resume(state: TrainState, info: checkpoint.CheckpointInfo, workdir: str | pathlib.Path) -> TrainState:
  """Returns the state of the workdir's latest checkpoint, or `state` itself if there is none.

  Raises:
    CheckpointError: if the checkpoint is damaged or was made with another config.
  """
  path = checkpoint.latest(pathlib.Path(workdir) / 'checkpoints')
  if path is None:
    return state
  different = _differences(checkpoint.read_info(path), info)
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')
  logging.info('Going on from %s.', path)
  return checkpoint.restore(path, state)


# Fields that may differ between a run and its continuation: they change no update.
_FREE_FIELDS = frozenset({'num_iterations', 'save_every'})


def _differences(old: checkpoint.CheckpointInfo, new: checkpoint.CheckpointInfo) -> list[str]:
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(info), sep='/') for info in (old, new))
  return [f'{name}: {old.get(name)!r} then, {new.get(name)!r} now' for name in sorted(old.keys() | new.keys())
          if old.get(name) != new.get(name) and name.split('/')[-1] not in _FREE_FIELDS]


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM in a list instead of dying of them; a second one of a kind acts as usual."""
  caught: list[int] = []
  old = {}

  def handler(number, frame):
    del frame
    caught.append(number)
    signal.signal(number, old[number])

  for number in (signal.SIGINT, signal.SIGTERM):
    old[number] = signal.signal(number, handler)
  try:
    yield caught
  finally:
    for number, previous in old.items():
      signal.signal(number, previous)
