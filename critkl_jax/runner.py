"""The host loop: it dispatches steps, looks at the metrics of the step before, logs, saves, and obeys signals."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import chex
import flax.traverse_util
import jax
import numpy as np
import tqdm
from absl import logging

from critkl_jax import checkpoint, hosts, interruption, population, sharding, storage, trackers
from critkl_jax.compilation import compilation_seconds
from critkl_jax.records import TrainState
from critkl_jax.signatures import MEANING, History

# How the progress bar calls its metrics.
_SHORT = {'accuracy': 'acc', 'entropy': 'ent', 'weight': 'w'}


class MetricsWriter:
  """Writes metrics as JSON lines and to the trackers that are there (TensorBoard, W&B); of several hosts only the first
  one writes.

  Lines of steps after `first_step` that an interrupted run left are dropped. To the metrics of a fine-tuning run it
  adds `signature/NAME` for each signature of failure, 1 where the metrics so far show it, and warns when it first does.
  Metrics of critical tokens have no entry where there were none.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int, track: Callable | None = None):
    self._path, self._trackers, self._history, self._warned = workdir / 'metrics.jsonl', [], History(), set()
    if not hosts.is_first():
      return
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_metrics(self._path) if row['step'] <= first_step]
    self._history = History(rows)
    storage.write_text(self._path, ''.join(storage.to_json(row) + '\n' for row in rows))
    self._trackers = (track or trackers.open_trackers)(workdir, first_step)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Adds the metrics of one step, Python or NumPy numbers."""
    if not hosts.is_first():
      return
    metrics = {name: float(value) for name, value in metrics.items() if not ('critical' in name and np.isnan(value))}
    self._history.add(metrics)
    metrics |= self._signatures(step)
    with self._path.open('a') as file:
      file.write(storage.to_json({'step': step, **metrics}) + '\n')
    for tracker in self._trackers:
      tracker.write(step, metrics)

  def _signatures(self, step):
    found = self._history.signatures()
    for name in (name for name, seen in found.items() if seen and name not in self._warned):
      logging.warning('%s, step %d: %s: %s.', self._path.parent, step, name, MEANING[name])
      self._warned.add(name)
    return {f'signature/{name}': float(seen) for name, seen in found.items()}

  def close(self) -> None:
    """Finishes what the trackers write."""
    for tracker in self._trackers:
      tracker.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
  """Reads the lines of a metrics file, null as NaN; a last line that was not finished is left out, a missing file has
  none."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.is_file() else []:
    try:
      row = json.loads(line)
      rows.append({name: math.nan if value is None else value for name, value in row.items()})
    except json.JSONDecodeError:
      logging.warning('%s: unfinished line dropped.', path)
  return rows


def run(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
        num_steps: int, info: checkpoint.CheckpointInfo, workdir: str | pathlib.Path, save_every: int,
        show: tuple[str, ...] = ('loss',), track: Callable | None = None) -> TrainState:
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
    track: (workdir, number of finished steps) -> trackers of the metrics; `trackers.open_trackers` if None.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir's checkpoint belongs to another config or is damaged.
    Interrupted: after a signal on any host, once the state is saved.
  """
  workdir = pathlib.Path(workdir)
  state = sharding.bound(resume(state, info, workdir))
  first = int(state.step)
  _say_where(first, num_steps, workdir)
  if first >= num_steps:
    return state
  with (contextlib.closing(MetricsWriter(workdir, first, track)) as writer,
        contextlib.closing(checkpoint.open_manager(workdir / 'checkpoints')) as manager):
    return _advance(step, state, num_steps, workdir, save_every, show, write=writer.write,
                    save=lambda state: checkpoint.save(manager, state, info))


def run_population(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
                   num_steps: int, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | pathlib.Path,
                   save_every: int, show: tuple[str, ...] = ('loss',), track: Callable | None = None
                   ) -> TrainState:
  """Advances a population to `num_steps`, from the latest step that all members have saved.

  Each member has a workdir of its own, `members/NAME` under the study's, as `run` would have left it; `seconds` in its
  metrics is its share of the program's time. A study that another list of members made is refused.

  Args:
    step: (state, number of finished steps) -> (state, metrics `[P]`).
    state: of P members, see `population.init_population`.
    num_steps: number of finished steps at which the run ends.
    infos: of the members in their order, by name.
    workdir: directory of the study.
    save_every: steps between checkpoints.
    show: metrics whose means over the members the progress bar shows.
    track: as in `run`, called for each member's workdir.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir holds other members, or a checkpoint belongs to another config or is damaged.
    Interrupted: after a signal on any host, once the members are saved.
  """
  workdir = pathlib.Path(workdir)
  homes = {name: workdir / 'members' / name for name in infos}
  state = sharding.bound(resume_population(state, infos, workdir))
  first = int(state.step)
  _say_where(first, num_steps, workdir)
  if first >= num_steps:
    return state
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(contextlib.closing(MetricsWriter(home, first, track))) for home in homes.values()]
    managers = [stack.enter_context(contextlib.closing(checkpoint.open_manager(home / 'checkpoints')))
                for home in homes.values()]

    def write(number, metrics):
      for i, writer in enumerate(writers):
        writer.write(number, {name: value[i] for name, value in metrics.items()})

    def save(state):
      own = population.members_on_host(state.replace(ref_params=None, step=None, ensemble=()))
      for manager, info, member in zip(managers, infos.values(), own):
        # Of several hosts, none may be ahead: two saves at once would take each other's messages.
        checkpoint.save(manager, member.replace(step=state.step), info, wait=jax.process_count() > 1)
      for manager in managers:
        manager.wait_until_finished()

    return _advance(step, state, num_steps, workdir, save_every, show, write, save)


def _say_where(first: int, num_steps: int, workdir: pathlib.Path) -> None:
  """Says from which step a run goes on, if it does."""
  interruption.tell(_last_save(workdir, first))
  if first >= num_steps:
    hosts.say(f'Step {first} of {num_steps} is in {workdir} already: there is nothing to train.')
  elif first:
    hosts.say(f'Going on from step {first} of {num_steps} in {workdir}.')


def _advance(step, state, num_steps, workdir, save_every, show, write, save) -> TrainState:
  """Dispatches steps until `num_steps` are done; `write` takes the metrics of a step, `save` the state."""
  first = number = int(state.step)
  signalled, stop = hosts.any_host_before(), 0
  next(signalled)
  with interruption.watch(_last_save(workdir, first)) as watch, _Bar(first, num_steps, show) as bar:
    log = _Log(write, bar)
    try:
      while number < num_steps and not stop:
        state, metrics = step(state, number)
        watch.deferring = True  # not before: the first step may have to be compiled, which no signal should wait for
        number += 1
        log.add(number, metrics)
        stop = signalled.send(watch.caught)
        if stop or number % save_every == 0 or number == num_steps:
          log.flush()  # before the save, so that a resumed run has a line for every step
          with checkpoint.ONE_SAVE:
            save(state)
          watch.text = _last_save(workdir, number)
          if number == num_steps:
            watch.end_deferring()
          # A signal that came in the save is obeyed at once, too; that of another host arrives a round later.
          stop = stop or signalled.send(watch.caught) or signalled.send(watch.caught)
    finally:
      watch.end_deferring()
  if stop:
    raise interruption.Interrupted(
        f'stopped by {signal.Signals(stop).name} after step {number} of {num_steps}; it is saved in {workdir}, and the '
        'same command goes on from there.')
  return state


def _last_save(workdir: pathlib.Path, step: int) -> str:
  """Completes `Stopped by SIGINT` with the step that is saved."""
  if not step:
    return ' before the first step was saved: there is nothing to go on from.'
  return f'; step {step} is saved in {workdir}, and the same command goes on from there.'


class _Bar:
  """A progress bar of at most 80 columns, whose estimate leaves compilation out."""

  def __init__(self, first: int, num_steps: int, show: tuple[str, ...]):
    self._show, self._compiled = show, compilation_seconds()
    self._bar = tqdm.tqdm(
        total=num_steps, initial=first, ncols=min(80, shutil.get_terminal_size().columns), smoothing=0,
        bar_format='{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}', disable=not hosts.is_first())

  def __enter__(self) -> '_Bar':
    return self

  def __exit__(self, *exception) -> None:
    self._bar.close()

  def update(self, metrics: dict[str, Any]) -> None:
    """Moves on by a step and shows its metrics, means over members if there are some."""
    compiled = compilation_seconds()
    self._bar.start_t = getattr(self._bar, 'start_t', 0.0) + compiled - self._compiled
    self._compiled = compiled
    shown = [f'{_SHORT.get(name, name)} {_number(np.mean(metrics[name]))}' for name in self._show]
    rate = np.sum(metrics['num_tokens']) / np.sum(metrics['seconds'])
    self._bar.set_postfix_str('  '.join([*shown, f'{_number(rate)} tok/s']), refresh=False)
    self._bar.update()


def _number(value: float) -> str:
  """Formats a number in five characters or so: 0.54, .0043, 2.8k."""
  if not np.isfinite(value):
    return str(value)
  if abs(value) >= 1000:
    return f'{value / 1000:.1f}k' if abs(value) < 1e6 else f'{value / 1e6:.1f}M'
  text = f'{value:.2g}' if abs(value) < 0.1 else f'{value:.2f}' if abs(value) < 10 else f'{value:.0f}'
  return text.replace('0.0', '.0', 1) if text.startswith('0.0') and text != '0.00' else text


class _Log:
  """Holds back the metrics of the last step until the next one is under way, so that the device never waits."""

  def __init__(self, write: Callable[[int, dict[str, Any]], None], bar: _Bar):
    self._write, self._bar = write, bar
    self._pending: tuple[int, dict[str, chex.Array]] | None = None
    self._time, self._compiled = time.monotonic(), compilation_seconds()

  def add(self, number: int, metrics: dict[str, chex.Array]) -> None:
    """Logs what was held back, and holds back these metrics of a step that has been dispatched."""
    self.flush()
    self._pending = (number, metrics)

  def flush(self) -> None:
    """Waits for the metrics held back, and logs them: numbers of a single run, arrays `[P]` of a population."""
    if self._pending is None:
      return
    number, metrics = self._pending
    self._pending = None
    values = {name: value[()] for name, value in jax.tree.map(np.asarray, jax.device_get(metrics)).items()}
    tokens = values['num_tokens']
    seconds = np.full(np.shape(tokens), self._lap() / np.size(tokens))[()]
    values |= {'seconds': seconds, 'tokens_per_second': tokens / seconds}
    self._write(number, values)
    self._bar.update(values)

  def _lap(self) -> float:
    """Returns the seconds since the last call, compilation left out."""
    before, self._time = self._time, time.monotonic()
    compiled_before, self._compiled = self._compiled, compilation_seconds()
    return max(self._time - before - (self._compiled - compiled_before), 1e-9)


def check_workdir(workdir: str | pathlib.Path, info: checkpoint.CheckpointInfo) -> int:
  """Returns the number of steps that a workdir's run has finished and saved, 0 for a new workdir.

  Raises:
    CheckpointError: if the workdir holds the run of another config.
  """
  directory = pathlib.Path(workdir) / 'checkpoints'
  step = hosts.as_first_says(max(checkpoint.steps_in(directory), default=0))
  if step:
    _check_same(directory / str(step), info)
  return step


def resume(state: TrainState, info: checkpoint.CheckpointInfo, workdir: str | pathlib.Path) -> TrainState:
  """Returns the state of the workdir's latest checkpoint, or `state` itself if there is none.

  Raises:
    CheckpointError: if the checkpoint is damaged or was made with another config.
  """
  step = check_workdir(workdir, info)
  return checkpoint.restore(pathlib.Path(workdir) / 'checkpoints' / str(step), state) if step else state


def resume_population(state: TrainState, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | pathlib.Path
                      ) -> TrainState:
  """Returns the state of the latest step that all members under a study's workdir have saved, or `state` itself if
  there is none.

  Raises:
    CheckpointError: if the workdir holds other members, or a checkpoint is damaged or was made with another config.
  """
  directories = [pathlib.Path(workdir) / 'members' / name / 'checkpoints' for name in infos]
  _check_members(pathlib.Path(workdir), list(infos))
  saved = [set(checkpoint.steps_in(directory)) for directory in directories]
  step = hosts.as_first_says(max(set.intersection(*saved), default=-1))
  _drop_later(directories, step)
  if step < 0:
    return state
  paths = [directory / str(step) for directory in directories]
  for path, info in zip(paths, infos.values()):
    _check_same(path, info)
  logging.info('Going on from step %d of %s.', step, workdir)
  target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(lambda: population.member(state, 0)))
  found = population.stack([checkpoint.restore(path, target) for path in paths])
  own = state.replace(ref_params=None, ensemble=())
  placed = sharding.put(found.replace(ref_params=None, ensemble=()), jax.tree.map(lambda x: x.sharding, own))
  return placed.replace(ref_params=state.ref_params, ensemble=state.ensemble)


def _check_members(workdir: pathlib.Path, names: list[str]) -> None:
  """Keeps the names of a study's members in its workdir; those of a study that has saved nothing may change."""
  file = workdir / 'members.json'
  old = json.loads(file.read_text()) if file.is_file() else names
  started = any(checkpoint.steps_in(directory) for directory in workdir.glob('members/*/checkpoints'))
  if hosts.as_first_says(started and old != names):
    different = sorted(set(old) ^ set(names)) or ['in another order']
    some = ', '.join(different[:4]) + (', ...' if len(different) > 4 else '')
    raise checkpoint.CheckpointError(
        f'{workdir}: made with other members ({some}); give the same ones, or another --workdir.')
  hosts.wait_for_all('members')
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(file, names, indent=None)


def _drop_later(directories: list[pathlib.Path], step: int) -> None:
  """Removes what some members have saved beyond the step that all have: the study will come to other numbers there, if
  it goes on elsewhere."""
  later = [directory / str(n) for directory in directories for n in checkpoint.steps_in(directory) if n > step]
  for path in later if hosts.is_first() else ():
    shutil.rmtree(path)
  hosts.wait_for_all('dropped')


# Fields that may differ between a run and its continuation: they change no update.
_FREE_FIELDS = frozenset({'num_iterations', 'save_every'})


def _check_same(path: pathlib.Path, info: checkpoint.CheckpointInfo) -> None:
  different = _differences(checkpoint.read_info(path), info)
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')


def _differences(old: checkpoint.CheckpointInfo, new: checkpoint.CheckpointInfo) -> list[str]:
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(info), sep='/') for info in (old, new))
  return [f'{name}: {old.get(name)!r} then, {new.get(name)!r} now' for name in sorted(old.keys() | new.keys())
          if old.get(name) != new.get(name) and name.split('/')[-1] not in _FREE_FIELDS]
