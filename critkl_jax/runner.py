"""The host loop: it dispatches steps, looks at the metrics of the step before, logs, saves, and obeys signals."""

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax.traverse_util
import jax
import numpy as np
import tqdm

from critkl_jax import checkpoint, hosts, interruption, locks, managers, population, sharding, storage
from critkl_jax.compilation import compilation_seconds
from critkl_jax.metrics import MetricsWriter, mend_metrics
from critkl_jax.metrics import read_metrics as read_metrics
from critkl_jax.records import TrainState
from critkl_jax.storage import WorkdirError

# How the progress bar calls its metrics.
_SHORT = {'accuracy': 'acc', 'entropy': 'ent', 'weight': 'w'}


def run(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
        num_steps: int, info: checkpoint.CheckpointInfo, workdir: str | os.PathLike, save_every: int,
        show: tuple[str, ...] = ('loss',), track: Callable | None = None, damaged: str = 'skip') -> TrainState:
  """Advances a state to `num_steps`, from the newest whole checkpoint of the workdir if there is one.

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
    damaged: `skip` to go on from the newest whole checkpoint if newer ones are damaged, or `refuse`.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir's checkpoint belongs to another config, or is damaged and so are all others.
    WorkdirError: if another run writes into the workdir, or a file in it is damaged or not of a run.
    OSError: if something cannot be written; the error has a note that says which step is saved.
    Interrupted: after a signal on any host, once the state is saved.
  """
  workdir = storage.to_path(workdir)
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume(state, info, workdir, damaged))
    first = int(state.step)
    stack.enter_context(_saying_what_is_saved(workdir, [workdir]))
    _mend([workdir], first, known)
    _say_where(first, num_steps, workdir)
    if first >= num_steps:
      return state
    writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first, track)))
    manager = stack.enter_context(managers.opened(workdir / 'checkpoints', info.training.max_to_keep))

    def save(state, after):
      writer.flush()
      checkpoint.save(manager, state, info, rows=writer.packed(), after=after)

    return _advance(step, state, num_steps, workdir, save_every, show, writer.write, save)


def run_population(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
                   num_steps: int, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | os.PathLike,
                   save_every: int, show: tuple[str, ...] = ('loss',), track: Callable | None = None,
                   damaged: str = 'skip') -> TrainState:
  """Advances a population to `num_steps`, from the latest step that all members have saved whole.

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
    damaged: as in `run`.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir holds other members, or a checkpoint belongs to another config, or no step that all
      have is whole.
    WorkdirError, OSError: as `run`.
    Interrupted: after a signal on any host, once the members are saved.
  """
  workdir = storage.to_path(workdir)
  homes = {name: workdir / 'members' / name for name in infos}
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume_population(state, infos, workdir, damaged))
    first = int(state.step)
    stack.enter_context(_saying_what_is_saved(workdir, list(homes.values())))
    _mend(list(homes.values()), first, known)
    _say_where(first, num_steps, workdir)
    if first >= num_steps:
      return state
    writers = [stack.enter_context(contextlib.closing(MetricsWriter(home, first, track))) for home in homes.values()]
    opened = [stack.enter_context(managers.opened(home / 'checkpoints', info.training.max_to_keep))
              for home, info in zip(homes.values(), infos.values())]

    def write(number, metrics):
      for i, writer in enumerate(writers):
        writer.write(number, {name: value[i] for name, value in metrics.items()})

    def save(state, after):
      own = population.members_on_host(state.replace(ref_params=None, step=None, ensemble=()))
      for manager, info, member, writer in zip(opened, infos.values(), own, writers):
        writer.flush()
        # Of several hosts, none may be ahead: two saves at once would take each other's messages.
        checkpoint.save(manager, member.replace(step=state.step), info, wait=jax.process_count() > 1,
                        rows=writer.packed(), after=after)
      for manager in opened:
        managers.finish(manager)

    return _advance(step, state, num_steps, workdir, save_every, show, write, save)


@contextlib.contextmanager
def _saying_what_is_saved(workdir: storage.Path, homes: list[storage.Path]) -> Iterator[None]:
  """Adds to an error of writing from where the run goes on."""
  try:
    yield
  except OSError as error:
    steps = set.intersection(*(set(checkpoint.steps_in(home / 'checkpoints')) for home in homes))
    error.add_note(f'the last whole checkpoint in {workdir} is step {max(steps)}' if steps else
                   f'no checkpoint is in {workdir} yet')
    raise


def _mend(homes: list[storage.Path], step: int, known: bool) -> None:
  """Restores the metrics of a run, or of members, that goes on from a step; see `mend_metrics`."""

  def mend():
    for home in homes:
      mend_metrics(home, step, known)

  hosts.first_does(mend, WorkdirError)


def _say_where(first: int, num_steps: int, workdir: storage.Path) -> None:
  """Says from which step a run goes on, if it does."""
  if first >= num_steps:
    hosts.say(f'Step {first} of {num_steps} is in {workdir} already: there is nothing to train.')
  elif first:
    hosts.say(f'Going on from step {first} of {num_steps} in {workdir}.')


def _advance(step, state, num_steps, workdir, save_every, show, write, save) -> TrainState:
  """Dispatches steps until `num_steps` are done; `write` takes the metrics of a step, `save` the state and
  the step that was saved before."""
  first = saved = int(state.step)
  signalled = hosts.any_host_before()
  next(signalled)
  with interruption.watch(_last_save(workdir, first)) as watch, _Bar(first, num_steps, show) as bar:
    log = _Log(write, bar)
    try:
      for number in range(first + 1, num_steps + 1):
        state, metrics = step(state, number - 1)
        watch.deferring = True  # not before: the first step may have to be compiled, which no signal should wait for
        log.add(number, metrics)
        stop = signalled.send(watch.caught[0] if watch.caught else 0)
        if stop or number % save_every == 0 or number == num_steps:
          log.flush()  # before the save, so that a resumed run has a line for every step
          save(state, saved)
          saved = number
          watch.text = _last_save(workdir, saved)
        if stop and number < num_steps:
          raise interruption.Interrupted(
              f'stopped by {signal.Signals(stop).name} after step {number} of {num_steps}; it is saved in {workdir}, '
              'and the same command goes on from there.')
    finally:
      watch.deferring = False
  return state


def _last_save(workdir: storage.Path, step: int) -> str:
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


def check_workdir(workdir: str | os.PathLike, info: checkpoint.CheckpointInfo) -> int:
  """Returns the number of steps that a workdir's run has finished and saved, 0 for a new workdir. Whether the arrays
  are whole is left to `resume`.

  Raises:
    CheckpointError: if the workdir holds the run of another config.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def check(step):
    _check_same(directory / str(step), info, checkpoint.read_info_together(directory / str(step)))
    return step

  return checkpoint.newest_whole(_agreed(checkpoint.steps_in(directory)), check)[0] or 0


def resume(state: TrainState, info: checkpoint.CheckpointInfo, workdir: str | os.PathLike, damaged: str = 'skip'
           ) -> TrainState:
  """Returns the state of the workdir's newest whole checkpoint, or `state` itself if it has no checkpoint; says so if
  newer ones are damaged, or refuses, as `damaged` says.

  Raises:
    CheckpointError: if no checkpoint is whole, or one was made with another config.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def read(step):
    path = directory / str(step)
    _check_same(path, info, checkpoint.read_info_together(path))
    return checkpoint.restore(path, state)

  return _newest_whole(state, _agreed(checkpoint.steps_in(directory)), read, workdir, damaged)


def resume_population(state: TrainState, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | os.PathLike,
                      damaged: str = 'skip') -> TrainState:
  """Returns the state of the latest step that all members under a study's workdir have saved whole, or `state` itself
  if there is none; as `resume` else.

  Raises:
    CheckpointError: if the workdir holds other members, no step that all have is whole, or one was made with another
      config.
  """
  directories = {name: storage.to_path(workdir) / 'members' / name / 'checkpoints' for name in infos}
  hosts.first_does(lambda: _keep_members(storage.to_path(workdir), list(infos)), ValueError)
  saved = [set(checkpoint.steps_in(directory)) for directory in directories.values()]
  steps = _agreed(sorted(set.intersection(*saved)))
  hosts.first_does(lambda: _check_later(directories, infos, max(steps, default=-1)), ValueError)
  target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(lambda: population.member(state, 0)))

  def read(step):
    paths = [directory / str(step) for directory in directories.values()]
    for path, info in zip(paths, infos.values()):
      _check_same(path, info, checkpoint.read_info_together(path))
    return population.stack([checkpoint.restore(path, target) for path in paths])

  found = _newest_whole(None, steps, read, workdir, damaged)
  if found is None:
    return state
  own = state.replace(ref_params=None, ensemble=())
  placed = sharding.put(found.replace(ref_params=None, ensemble=()), jax.tree.map(lambda x: x.sharding, own))
  return placed.replace(ref_params=state.ref_params, ensemble=state.ensemble)


def _agreed(steps: list[int]) -> list[int]:
  """Returns the steps that the first host sees, on a file system that others may see later."""
  number = hosts.as_first_says(len(steps))
  return [hosts.as_first_says(step) for step in [*steps, *[0] * number][:number]]


def _newest_whole(start, steps, read, workdir, damaged):
  """Returns what is read of the newest step that is whole, `start` if there are no steps."""
  if not steps:
    return start
  found, damages = checkpoint.newest_whole(steps, read)
  if found is None:
    raise checkpoint.CheckpointError(f'{damages[0]} No other checkpoint is whole; another --workdir begins anew.')
  if damages:
    whole = steps[-1 - len(damages)]
    if damaged == 'refuse':
      raise checkpoint.CheckpointError(f'{damages[0]} Step {whole} is whole; --damaged=skip goes on from there.')
    hosts.say(' '.join([*map(str, damages), f'Going on from step {whole}, the newest whole one.']))
  return found


def check_members(workdir: storage.Path, names: list[str]) -> None:
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


def _check_later(directories: dict[str, storage.Path], infos: dict[str, checkpoint.CheckpointInfo], step: int) -> None:
  """Says what some members have saved beyond the step that all have: it is made again, and replaced then. A stop amid a
  save leaves one such step at most, and directories of all members; where it is otherwise, and no member went back
  behind a damaged step, somebody removed a member's checkpoints, and the run is refused."""
  later = {name: [n for n in checkpoint.steps_in(directory) if n > step] for name, directory in directories.items()}
  newest = max((n for steps in later.values() for n in steps), default=step)
  lacking = [name for name, steps in later.items() if newest not in steps]
  missing = any(newest > step and not directories[name].is_dir() for name in lacking)
  went_back = any(any(directory.glob('*.replaced-*')) for directory in directories.values())
  if missing or (max(map(len, later.values())) > 1 and not went_back):
    raise WorkdirError(f'{directories[lacking[0]]} lacks step {newest}, which other members have; restore it, or give '
                       'another --workdir to begin again.')
  for name, path in ((name, directories[name] / str(n)) for name, steps in later.items() for n in steps):
    with contextlib.suppress(checkpoint.DamagedError):  # it is replaced
      _check_same(path, infos[name], checkpoint.read_info(path))
    hosts.say(f'Step {path.name} of {name} is made again: not all members had saved it.')


# Fields that may differ between a run and its continuation: they change no update.
FREE_FIELDS = frozenset({'num_iterations', 'save_every', 'max_to_keep'})


def _check_same(path: storage.Path, info: checkpoint.CheckpointInfo, saved: checkpoint.CheckpointInfo) -> None:
  different = _differences(saved, info)
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')


def _differences(old: checkpoint.CheckpointInfo, new: checkpoint.CheckpointInfo) -> list[str]:
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(info), sep='/') for info in (old, new))
  return [f'{name}: {old.get(name)!r} then, {new.get(name)!r} now' for name in sorted(old.keys() | new.keys())
          if old.get(name) != new.get(name) and name.split('/')[-1] not in FREE_FIELDS]
