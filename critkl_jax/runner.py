"""The host loop: it dispatches steps, looks at the metrics of the step before, logs, saves, and obeys signals."""

import contextlib
import dataclasses
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

from critkl_jax import checkpoint, finite, hosts, interruption, locks, population, sharding, storage
from critkl_jax.compilation import compilation_seconds
from critkl_jax.metrics import MetricsWriter, mend_metrics
from critkl_jax.metrics import read_metrics as read_metrics
from critkl_jax.records import TrainState
from critkl_jax.storage import WorkdirError

# How the progress bar calls its metrics.
_SHORT = {'accuracy': 'acc', 'entropy': 'ent', 'weight': 'w'}


def run(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
        num_steps: int, info: checkpoint.CheckpointInfo, workdir: str | pathlib.Path, save_every: int,
        show: tuple[str, ...] = ('loss',), track: Callable | None = None) -> TrainState:
  """Advances a state to `num_steps`, from the latest checkpoint of the workdir if there is one.

  Under the workdir: `checkpoints/` (every `save_every` steps, at the end and on SIGINT or SIGTERM), `metrics.jsonl` and
  TensorBoard events. The step's arrays are donated; while the device works on a step, the host logs the one before.

  Args:
    step: (state, number of finished steps) -> (state, metrics); the metrics have `num_tokens` among them, and, if it
      leaves out updates that are not finite, those of `finite.counted`.
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
    WorkdirError: if another run writes into the workdir, or a file in it is damaged or not of a run.
    Interrupted: after a signal on any host, once the state is saved.
    NonFinite: after the config's `max_skipped` steps in a row without an update, or if the last step made none, once
      the state after the last update is saved.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume(state, info, workdir))
    first = int(state.step)
    _mend([workdir], first, known)
    _say_where(first, num_steps, workdir)
    if first >= num_steps:
      return state
    writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first, track)))
    manager = stack.enter_context(contextlib.closing(checkpoint.open_manager(workdir / 'checkpoints')))
    return _advance(step, state, num_steps, workdir, save_every, show, write=writer.write,
                    save=lambda state: checkpoint.save(manager, state, info, rows=writer.packed()),
                    idle=finite.Watch(state.params, info.training))


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
    WorkdirError: if another run writes into the workdir, or a file in it is damaged or not of a run.
    Interrupted: after a signal on any host, once the members are saved.
    NonFinite: as in `run`, if it holds for all members; others go on without those that make no update.
  """
  workdir = pathlib.Path(workdir)
  homes = {name: workdir / 'members' / name for name in infos}
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume_population(state, infos, workdir))
    first = int(state.step)
    _mend(list(homes.values()), first, known)
    _say_where(first, num_steps, workdir)
    if first >= num_steps:
      return state
    writers = [stack.enter_context(contextlib.closing(MetricsWriter(home, first, track))) for home in homes.values()]
    managers = [stack.enter_context(contextlib.closing(checkpoint.open_manager(home / 'checkpoints')))
                for home in homes.values()]

    def write(number, metrics):
      for i, writer in enumerate(writers):
        writer.write(number, {name: value[i] for name, value in metrics.items()})

    def save(state):
      own = population.members_on_host(state.replace(ref_params=None, step=None, ensemble=()))
      for manager, info, member, writer in zip(managers, infos.values(), own, writers):
        # Of several hosts, none may be ahead: two saves at once would take each other's messages.
        checkpoint.save(manager, member.replace(step=state.step), info, wait=jax.process_count() > 1,
                        rows=writer.packed())
      for manager in managers:
        manager.wait_until_finished()

    params = jax.eval_shape(lambda: population.member(state, 0).params)
    idle = finite.Watch(params, next(iter(infos.values())).training, list(infos))
    return _advance(step, state, num_steps, workdir, save_every, show, write, save, idle)


def _mend(homes: list[pathlib.Path], step: int, known: bool) -> None:
  """Restores the metrics of a run, or of members, that goes on from a step; see `mend_metrics`."""

  def mend():
    for home in homes:
      mend_metrics(home, step, known)

  hosts.first_does(mend, WorkdirError)


def _say_where(first: int, num_steps: int, workdir: pathlib.Path) -> None:
  """Says from which step a run goes on, if it does."""
  interruption.tell(_last_save(workdir, first))
  if first >= num_steps:
    hosts.say(f'Step {first} of {num_steps} is in {workdir} already: there is nothing to train.')
  elif first:
    hosts.say(f'Going on from step {first} of {num_steps} in {workdir}.')


def _advance(step, state, num_steps, workdir, save_every, show, write, save, idle) -> TrainState:
  """Dispatches steps until `num_steps` are done; `write` takes the metrics of a step, `save` the state.

  Steps at the end that made no update are not saved: the state is that of the last one that did, under its number.
  """
  first = number = saved = int(state.step)
  signalled, stop = hosts.any_host_before(), 0
  next(signalled)
  with interruption.watch(_last_save(workdir, first)) as watch, _Bar(first, num_steps, show) as bar:
    log = _Log(lambda number, metrics: write(number, idle.take(number, metrics)), bar)
    try:
      while number < num_steps and not stop:
        state, metrics = step(state, number)
        watch.deferring = True  # not before: the first step may have to be compiled, which no signal should wait for
        number += 1
        log.add(number, metrics)
        stop = signalled.send(watch.caught)
        if stop or idle.tripped() or number % save_every == 0 or number == num_steps:
          log.flush()  # before the save, so that a resumed run has a line for every step
          if number - idle.steps > saved:
            saved = number - idle.steps
            with checkpoint.ONE_SAVE:
              save(state.replace(step=state.step - np.int32(idle.steps)) if idle.steps else state)
          watch.text = _last_save(workdir, saved)
          if idle.tripped(last=number == num_steps):
            raise finite.NonFinite(idle.reason(number, num_steps) + _left(workdir, saved))
          if number == num_steps:
            watch.end_deferring()
          # A signal that came in the save is obeyed at once, too; that of another host arrives a round later.
          stop = stop or signalled.send(watch.caught) or signalled.send(watch.caught)
    finally:
      watch.end_deferring()
  if stop:
    raise interruption.Interrupted(
        f'stopped by {signal.Signals(stop).name} after step {number} of {num_steps}{_last_save(workdir, saved)}')
  return state


def _left(workdir: pathlib.Path, saved: int) -> str:
  """Completes the reason for which a run ends that makes no more updates."""
  kept = f'step {saved} is saved in {workdir}' if saved else 'nothing is saved'
  return (f'; {kept}. The same command would come to the same end; other settings, such as a smaller learning rate, '
          'need a workdir of their own.')


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
  if not step:
    return state
  path = pathlib.Path(workdir) / 'checkpoints' / str(step)
  _say_rounding(path, info)
  return checkpoint.restore(path, state)


def resume_population(state: TrainState, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | pathlib.Path
                      ) -> TrainState:
  """Returns the state of the latest step that all members under a study's workdir have saved, or `state` itself if
  there is none.

  Raises:
    CheckpointError: if the workdir holds other members, or a checkpoint is damaged or was made with another config.
  """
  directories = {name: pathlib.Path(workdir) / 'members' / name / 'checkpoints' for name in infos}
  hosts.first_does(lambda: _keep_members(pathlib.Path(workdir), list(infos)), ValueError)
  saved = [set(checkpoint.steps_in(directory)) for directory in directories.values()]
  step = hosts.as_first_says(max(set.intersection(*saved), default=-1))
  hosts.first_does(lambda: _drop_later(directories, infos, step), ValueError)
  if step < 0:
    return state
  paths = [directory / str(step) for directory in directories.values()]
  for path, info in zip(paths, infos.values()):
    _check_same(path, info)
  _say_rounding(paths[0], next(iter(infos.values())))
  logging.info('Going on from step %d of %s.', step, workdir)
  target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(lambda: population.member(state, 0)))
  found = population.stack([checkpoint.restore(path, target) for path in paths])
  own = state.replace(ref_params=None, ensemble=())
  placed = sharding.put(found.replace(ref_params=None, ensemble=()), jax.tree.map(lambda x: x.sharding, own))
  return placed.replace(ref_params=state.ref_params, ensemble=state.ensemble)


def check_members(workdir: pathlib.Path, names: list[str]) -> None:
  """Checks that a study's workdir holds these members or has saved nothing, and changes nothing.

  Raises:
    CheckpointError: if it holds others.
    WorkdirError: if its list of members cannot be read.
  """
  file, old = workdir / 'members.json', names
  started = [path for path in workdir.glob('members/*/checkpoints') if checkpoint.steps_in(path)]
  if started and file.is_file():
    old = storage.read_json(file, list, 'restore it, or remove it if the members of this command are all of them')
  if old != names:
    different = sorted(set(map(str, old)) ^ set(names)) or ['in another order']
    some = ', '.join(different[:4]) + (', ...' if len(different) > 4 else '')
    raise checkpoint.CheckpointError(
        f'{workdir}: made with other members ({some}); give the same ones, or another --workdir.')


def _keep_members(workdir, names):
  """Keeps the names of a study's members in its workdir."""
  check_members(workdir, names)
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(workdir / 'members.json', names, indent=None)


def _drop_later(directories: dict[str, pathlib.Path], infos: dict[str, checkpoint.CheckpointInfo], step: int) -> None:
  """Removes what some members have saved beyond the step that all have: the study will come to other numbers there, if
  it goes on elsewhere. A stop amid a save leaves one such step at most, and directories of all members; where it is
  otherwise, somebody removed a member's checkpoints, and the others' are kept."""
  later = {name: [n for n in checkpoint.steps_in(directory) if n > step] for name, directory in directories.items()}
  newest = max((n for steps in later.values() for n in steps), default=step)
  lacking = [name for name, steps in later.items() if newest not in steps]
  if max(map(len, later.values())) > 1 or any(newest > step and not directories[name].is_dir() for name in lacking):
    raise WorkdirError(f'{directories[lacking[0]]} lacks step {newest}, which other members have; restore it, or '
                       'remove the checkpoints of all members to begin again.')
  for name, path in ((name, directories[name] / str(n)) for name, steps in later.items() for n in steps):
    _check_same(path, infos[name])
    hosts.say(f'Step {path.name} of {name} is made again: not all members had saved it.')
    shutil.rmtree(path)


# Fields that may differ between a run and its continuation: they change no update, or by rounding alone.
FREE_FIELDS = frozenset({'num_iterations', 'save_every', 'max_skipped', 'eval_problems'})
ROUNDING_FIELDS = frozenset({'attention', 'remat', 'rollout', 'scan_layers', 'window'})


def _check_same(path: pathlib.Path, info: checkpoint.CheckpointInfo) -> None:
  different = [said for name, said in _differences(path, info).items()
               if name not in FREE_FIELDS | ROUNDING_FIELDS and not (
                   name == 'reference' and _is_kept(path, info.training.reference))]
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')


def _say_rounding(path: pathlib.Path, info: checkpoint.CheckpointInfo) -> None:
  """Says which settings of a run that goes on differ from those that it had, where numbers may be rounded otherwise."""
  different = [said for name, said in _differences(path, info).items() if name in ROUNDING_FIELDS]
  if different:
    hosts.say(f'Other settings than before ({"; ".join(different)}): updates are the same up to rounding.')


def _differences(path: pathlib.Path, info: checkpoint.CheckpointInfo) -> dict[str, str]:
  """Returns what differs between a checkpoint's settings and others, by the name of the field."""
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(one), sep='/')
              for one in (checkpoint.read_info(path), info))
  return {name.split('/')[-1]: f'{name}: {old.get(name)!r} then, {new.get(name)!r} now'
          for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)}


def _is_kept(path: pathlib.Path, reference: str) -> bool:
  """Returns whether a reference, given by another path than before, is the one that the run of a checkpoint keeps."""
  kept = checkpoint.latest(path.parent.parent / 'reference')
  given = checkpoint.find_checkpoint(reference or checkpoint.SHIPPED_REFERENCE).path
  return kept is not None and checkpoint.same_params(kept, given)
