"""The host loop: it dispatches steps, looks at the metrics of the step before, logs, saves, and obeys signals."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import numpy as np
import tqdm

from critkl_jax import checkpoint, finite, hosts, interruption, locks, managers, population, sharding, storage
from critkl_jax.compilation import compilation_seconds
from critkl_jax.metrics import MetricsWriter, mend_metrics
from critkl_jax.metrics import read_metrics as read_metrics
from critkl_jax.records import TrainState
from critkl_jax.resuming import resume, resume_population
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
    step: (state, number of finished steps) -> (state, metrics); the metrics have `num_tokens` among them, and, if it
      leaves out updates that are not finite, those of `finite.counted`.
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
    NonFinite: after the config's `max_skipped` steps in a row without an update, or if the last step made none, once
      the state after the last update is saved.
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

    return _advance(step, state, num_steps, workdir, save_every, show, writer.write, save,
                    finite.Watch(state.params, info.training))


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
    num_steps, save_every, damaged: as in `run`.
    infos: of the members in their order, by name.
    workdir: directory of the study.
    show: metrics whose means over the members the progress bar shows.
    track: as in `run`, called for each member's workdir.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir holds other members, or a checkpoint belongs to another config, or no step that all
      have is whole.
    WorkdirError, OSError: as `run`.
    Interrupted: after a signal on any host, once the members are saved.
    NonFinite: as in `run`, if it holds for all members; others go on without those that make no update.
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

    params = jax.eval_shape(lambda: population.member(state, 0).params)
    idle = finite.Watch(params, next(iter(infos.values())).training, list(infos))
    return _advance(step, state, num_steps, workdir, save_every, show, write, save, idle)


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

  hosts.first_does(mend, WorkdirError, OSError)


def _say_where(first: int, num_steps: int, workdir: storage.Path) -> None:
  """Says from which step a run goes on, if it does."""
  interruption.tell(_last_save(workdir, first))
  if first >= num_steps:
    hosts.say(f'Step {first} of {num_steps} is in {workdir} already: there is nothing to train.')
  elif first:
    hosts.say(f'Going on from step {first} of {num_steps} in {workdir}.')


def _advance(step, state, num_steps, workdir, save_every, show, write, save, idle) -> TrainState:
  """Dispatches steps until `num_steps` are done; `write` takes the metrics of a step, `save` the state and the step
  that was saved before.

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
          saved = _save_last_update(save, state, number, idle.steps, saved)
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


def _save_last_update(save, state, number: int, idle: int, saved: int) -> int:
  """Saves the state of step `number`, of which the last `idle` made no update, under the number of its last update,
  unless that is saved; returns the step that is saved then."""
  if number - idle <= saved:
    return saved
  with managers.ONE_SAVE:
    save(state.replace(step=state.step - np.int32(idle)) if idle else state, saved)
  return number - idle


def _left(workdir: storage.Path, saved: int) -> str:
  """Completes the reason for which a run ends that makes no more updates."""
  kept = f'step {saved} is saved in {workdir}' if saved else 'nothing is saved'
  return (f'; {kept}. The same command would come to the same end; other settings, such as a smaller learning rate, '
          'need a workdir of their own.')


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
