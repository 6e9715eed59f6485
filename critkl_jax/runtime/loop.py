"""Runs the host loop: dispatches steps, logs the metrics of the previous step, saves, and stops on signals."""

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

from critkl_jax import sharding
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, hosts, interruption, locks, managers, storage
from critkl_jax.runtime.compilation import compilation_seconds
from critkl_jax.runtime.metrics import MetricsWriter, mend_metrics
from critkl_jax.runtime.metrics import read_metrics as read_metrics
from critkl_jax.runtime.resuming import resume, resume_population
from critkl_jax.runtime.samples import SamplesFile
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.tasks.rewards import RewardError
from critkl_jax.training import finite, population

# Names of metrics in the progress bar.
_SHORT = {'accuracy': 'acc', 'entropy': 'ent', 'weight': 'w'}


def run(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
        num_steps: int, info: checkpoint.CheckpointInfo, workdir: str | os.PathLike, save_every: int,
        show: tuple[str, ...] = ('loss',), track: Callable | None = None, damaged: str = 'skip',
        samples: Callable[[], list[dict[str, Any]]] | None = None) -> TrainState:
  """Trains a state up to step `num_steps`, resuming from the newest whole checkpoint of the workdir if there is one.

  Writes `checkpoints/` (every `save_every` steps, at the end and on SIGINT or SIGTERM), `metrics.jsonl` and TensorBoard
  events into the workdir. The step's arrays are donated; while the device computes a step, the host logs the previous
  one.

  Args:
    step: (state, number of finished steps) -> (state, metrics); the metrics include `num_tokens` and, if the step skips
      updates that are not finite, the metrics of `finite.counted`.
    state: initial state, used if there is no checkpoint.
    num_steps: number of finished steps at which the run ends.
    info: saved with the arrays; a checkpoint with other settings is refused.
    workdir: directory of the run.
    save_every: steps between checkpoints.
    show: metrics in the progress bar.
    track: (workdir, number of finished steps) -> trackers of the metrics; `trackers.open_trackers` if None.
    damaged: if the newest checkpoint is damaged, `skip` resumes from the newest whole one, `refuse` raises.
    samples: returns responses of the last step, which are written to `samples.jsonl` with each save.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir's checkpoint has another config, or all its checkpoints are damaged.
    WorkdirError: if another run writes into the workdir, or a file in it is damaged or was not written by a run.
    OSError: if a file cannot be written; a note of the error names the last saved step.
    RewardError: from a step; a note of the error names the last saved step.
    Interrupted: after a signal on any host, once the state is saved.
    NonFinite: after the config's `max_skipped` consecutive steps without an update, or if the last step made none; the
      state after the last update has been saved.
  """
  workdir = storage.to_path(workdir)
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume(state, info, workdir, damaged))
    first = int(state.step)
    stack.enter_context(_noting_saved_step(workdir, [workdir]))
    _mend([workdir], first, known)
    _print_start(first, num_steps, workdir)
    if first >= num_steps:
      return state
    writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first, track)))
    manager = stack.enter_context(managers.opened(workdir / 'checkpoints', info.training.max_to_keep))
    texts = SamplesFile(workdir, first) if samples else None

    def save(state, after):
      writer.flush()
      if texts:
        texts.write(int(state.step), samples())
      checkpoint.save(manager, state, info, rows=writer.packed(), after=after)

    return _advance(step, state, num_steps, workdir, save_every, show, writer.write, save,
                    finite.Watch(state.params, info.training))


def run_population(step: Callable[[TrainState, int], tuple[TrainState, dict[str, chex.Array]]], state: TrainState,
                   num_steps: int, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | os.PathLike,
                   save_every: int, show: tuple[str, ...] = ('loss',), track: Callable | None = None,
                   damaged: str = 'skip') -> TrainState:
  """Trains a population up to step `num_steps`, resuming from the newest step that all members have saved whole.

  Each member has its own workdir, `members/NAME` in the study's workdir, with the same files as a workdir of `run`;
  `seconds` in its metrics is its share of the program's time. A workdir with other members is refused.

  Args:
    step: (state, number of finished steps) -> (state, metrics `[P]`).
    state: initial state of P members, see `population.init_population`.
    num_steps, save_every, damaged: as in `run`.
    infos: name of a member -> description of its checkpoints, in the order of the members.
    workdir: directory of the study.
    show: metrics in the progress bar, as means over the members.
    track: as in `run`, called for each member's workdir.

  Returns:
    The last state.

  Raises:
    CheckpointError: if the workdir holds other members, a checkpoint has another config, or no step is whole for all
      members.
    WorkdirError, OSError: as `run`.
    Interrupted: after a signal on any host, once the members are saved.
    NonFinite: as `run`, if no member makes updates any more; as long as one does, the run continues.
  """
  workdir = storage.to_path(workdir)
  homes = {name: workdir / 'members' / name for name in infos}
  with contextlib.ExitStack() as stack:
    known = stack.enter_context(locks.hold(workdir))
    state = sharding.bound(resume_population(state, infos, workdir, damaged))
    first = int(state.step)
    stack.enter_context(_noting_saved_step(workdir, list(homes.values())))
    _mend(list(homes.values()), first, known)
    _print_start(first, num_steps, workdir)
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
        # With several hosts each save waits: a host that already saved the next member would mix up Orbax's messages.
        checkpoint.save(manager, member.replace(step=state.step), info, wait=jax.process_count() > 1,
                        rows=writer.packed(), after=after)
      for manager in opened:
        managers.finish(manager)

    params = jax.eval_shape(lambda: population.member(state, 0).params)
    idle = finite.Watch(params, next(iter(infos.values())).training, list(infos))
    return _advance(step, state, num_steps, workdir, save_every, show, write, save, idle)


@contextlib.contextmanager
def _noting_saved_step(workdir: storage.Path, homes: list[storage.Path]) -> Iterator[None]:
  """Adds a note with the last saved step to an error of a file or of a reward function."""
  try:
    yield
  except (OSError, RewardError) as error:
    steps = set.intersection(*(set(checkpoint.steps_in(home / 'checkpoints')) for home in homes))
    error.add_note(f'the last whole checkpoint in {workdir} is step {max(steps)}' if steps else
                   f'no checkpoint is in {workdir} yet')
    raise


def _mend(homes: list[storage.Path], step: int, known: bool) -> None:
  """Restores the metrics of a resumed run, or of its members; see `mend_metrics`."""

  def mend():
    for home in homes:
      mend_metrics(home, step, known)

  hosts.first_does(mend, WorkdirError, OSError)


def _print_start(first: int, num_steps: int, workdir: storage.Path) -> None:
  """Prints the step from which a run resumes, if it does."""
  interruption.tell(_last_save(workdir, first))
  if first >= num_steps:
    hosts.say(f'Step {first} of {num_steps} is already saved in {workdir}: there is nothing to train.')
  elif first:
    hosts.say(f'Resuming from step {first} of {num_steps} in {workdir}.')


def _advance(step, state, num_steps, workdir, save_every, show, write, save, idle) -> TrainState:
  """Dispatches steps until `num_steps` are done.

  Trailing steps that made no update are not saved: the state is saved under the number of its last update.

  Args:
    step, state, num_steps, workdir, save_every, show: as in `run`.
    write: takes the number and the metrics of each step.
    save: (state, last saved step) -> None; saves the state.
    idle: counts the steps without an update.
  """
  first = number = saved = int(state.step)
  signalled, stop = hosts.any_host_before(), 0
  next(signalled)
  with interruption.watch(_last_save(workdir, first)) as watch, _Bar(first, num_steps, show) as bar:
    log = _Log(lambda number, metrics: write(number, idle.take(number, metrics)), bar)
    try:
      while number < num_steps and not stop:
        state, metrics = step(state, number)
        watch.deferring = True  # not earlier: the first step may compile, and a signal must not wait for that
        number += 1
        log.add(number, metrics)
        stop = signalled.send(watch.caught)
        if stop or idle.tripped() or number % save_every == 0 or number == num_steps:
          log.flush()  # before the save, so that a resumed run has a line for every step
          saved = _save_last_update(save, state, number, idle.steps, saved)
          watch.text = _last_save(workdir, saved)
          if idle.tripped(last=number == num_steps):
            raise finite.NonFinite(idle.reason(number, num_steps) + _advice(workdir, saved))
          if number == num_steps:
            watch.end_deferring()
          # Obeys a signal that came during the save; another host's signal arrives one round later.
          stop = stop or signalled.send(watch.caught) or signalled.send(watch.caught)
    finally:
      watch.end_deferring()
  if stop:
    raise interruption.Interrupted(
        f'stopped by {signal.Signals(stop).name} after step {number} of {num_steps}{_last_save(workdir, saved)}')
  return state


def _save_last_update(save, state, number: int, idle: int, saved: int) -> int:
  """Saves a state under the step of its last update, if it is not saved yet; returns the last saved step.

  Args:
    save: as in `_advance`.
    state: state after step `number`.
    number: number of finished steps.
    idle: how many of the last steps made no update.
    saved: last saved step.
  """
  if number - idle <= saved:
    return saved
  with managers.ONE_SAVE:
    save(state.replace(step=state.step - np.int32(idle)) if idle else state, saved)
  return number - idle


def _advice(workdir: storage.Path, saved: int) -> str:
  """Completes the error of a run that makes no more updates: the saved step, and what to do."""
  kept = f'step {saved} is saved in {workdir}' if saved else 'nothing is saved'
  return (f'; {kept}. The same command would come to the same end; other settings, such as a smaller learning rate, '
          'need a workdir of their own.')


def _last_save(workdir: storage.Path, step: int) -> str:
  """Completes the message `Stopped by SIGINT` with the last saved step."""
  if not step:
    return ' before the first step was saved: there is nothing to resume from.'
  return f'; step {step} is saved in {workdir}, and the same command resumes from there.'


class _Bar:
  """Shows a progress bar of at most 80 columns, whose time estimate excludes compilation."""

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
    """Advances the bar by a step and shows its metrics, as means over the members of a population."""
    compiled = compilation_seconds()
    self._bar.start_t = getattr(self._bar, 'start_t', 0.0) + compiled - self._compiled
    self._compiled = compiled
    shown = [f'{_SHORT.get(name, name)} {_number(np.mean(metrics[name]))}' for name in self._show]
    rate = np.sum(metrics['num_tokens']) / np.sum(metrics['seconds'])
    self._bar.set_postfix_str('  '.join([*shown, f'{_number(rate)} tok/s']), refresh=False)
    self._bar.update()


def _number(value: float) -> str:
  """Formats a number in about five characters: 0.54, .0043, 2.8k."""
  if not np.isfinite(value):
    return str(value)
  if abs(value) >= 1000:
    return f'{value / 1000:.1f}k' if abs(value) < 1e6 else f'{value / 1e6:.1f}M'
  text = f'{value:.2g}' if abs(value) < 0.1 else f'{value:.2f}' if abs(value) < 10 else f'{value:.0f}'
  return text.replace('0.0', '.0', 1) if text.startswith('0.0') and text != '0.00' else text


class _Log:
  """Logs the metrics of a step after the next step is dispatched, so that the device never waits."""

  def __init__(self, write: Callable[[int, dict[str, Any]], None], bar: _Bar):
    self._write, self._bar = write, bar
    self._pending: tuple[int, dict[str, chex.Array]] | None = None
    self._time, self._compiled = time.monotonic(), compilation_seconds()

  def add(self, number: int, metrics: dict[str, chex.Array]) -> None:
    """Logs the pending metrics; the given ones, of the step that was just dispatched, become pending."""
    self.flush()
    self._pending = (number, metrics)

  def flush(self) -> None:
    """Waits for the pending metrics and logs them: scalars for a single run, arrays `[P]` for a population."""
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
    """Returns the seconds since the last call, without compilation."""
    before, self._time = self._time, time.monotonic()
    compiled_before, self._compiled = self._compiled, compilation_seconds()
    return max(self._time - before - (self._compiled - compiled_before), 1e-9)
