"""Resumes a run: finds and reads the newest whole checkpoint, and checks that its settings are the same."""

import contextlib
import dataclasses
import os

import flax.traverse_util
import jax
import numpy as np

from critkl_jax import sharding
from critkl_jax.config import flat_fields
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.runtime.storage import WorkdirError
from critkl_jax.training import population
from critkl_jax.training.config import MachineConfig, RunConfig

# Config fields that may differ when a run is resumed: they change no update, or change it by rounding alone.
FREE_FIELDS = frozenset({'num_iterations', 'reward_workers', 'reward_seconds', *flat_fields(RunConfig)})
ROUNDING_FIELDS = frozenset(flat_fields(MachineConfig)) - FREE_FIELDS


def check_workdir(workdir: str | os.PathLike, info: checkpoint.CheckpointInfo) -> int:
  """Checks a workdir's newest config and returns its step, 0 without a checkpoint.

  Skips damaged configs. Reads no arrays: `resume` checks whether they are whole.

  Raises:
    CheckpointError: if the workdir holds a run with another config.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def check(step):
    check_same(directory / str(step), info, checkpoint.read_info_together(directory / str(step)))
    return step

  return checkpoint.newest_whole(_steps_of_first(checkpoint.steps_in(directory)), check)[0] or 0


def resume(state: TrainState, info: checkpoint.CheckpointInfo, workdir: str | os.PathLike, damaged: str = 'skip'
           ) -> TrainState:
  """Returns the state of the workdir's newest whole checkpoint, or `state` itself if it has no checkpoint.

  Args:
    state: the initial state, whose shardings the restored arrays get.
    info: settings of the run, which the checkpoint must share.
    workdir: directory of the run.
    damaged: if the newest checkpoint is damaged, `skip` prints a note and takes the newest whole one, `refuse` raises.

  Raises:
    CheckpointError: if no checkpoint is whole, one was made with another config, or a damaged one is refused.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def read(step):
    path = directory / str(step)
    saved = checkpoint.read_info_together(path)
    check_same(path, info, saved)
    found = checkpoint.restore(path, state)
    _print_rounding(saved, info)
    return found

  return _newest_whole(state, _steps_of_first(checkpoint.steps_in(directory)), read, workdir, damaged)


def resume_population(state: TrainState, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | os.PathLike,
                      damaged: str = 'skip') -> TrainState:
  """Like `resume`, for a population: reads the newest step that is whole for all members in a study's workdir.

  Returns `state` itself if the members have no step in common.

  Raises:
    CheckpointError: as `resume`, or if the workdir holds other members.
    WorkdirError: if checkpoints of a member were removed, or the list of members cannot be read.
  """
  directories = {name: storage.to_path(workdir) / 'members' / name / 'checkpoints' for name in infos}
  hosts.first_does(lambda: _keep_members(storage.to_path(workdir), list(infos)),
                   checkpoint.CheckpointError, WorkdirError, OSError)
  saved = [set(checkpoint.steps_in(directory)) for directory in directories.values()]
  steps = _steps_of_first(sorted(set.intersection(*saved)))
  hosts.first_does(lambda: _check_later(directories, infos, max(steps, default=-1)),
                   checkpoint.CheckpointError, WorkdirError)
  target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(lambda: population.member(state, 0)))

  def read(step):
    paths = [directory / str(step) for directory in directories.values()]
    saved = [checkpoint.read_info_together(path) for path in paths]
    for path, info, own in zip(paths, infos.values(), saved):
      check_same(path, info, own)
    found = population.stack([checkpoint.restore(path, target) for path in paths])
    _print_rounding(saved[0], next(iter(infos.values())))
    return found

  found = _newest_whole(None, steps, read, workdir, damaged)
  if found is None:
    return state
  own = state.replace(ref_params=None, ensemble=())
  placed = sharding.put(found.replace(ref_params=None, ensemble=()), jax.tree.map(lambda x: x.sharding, own))
  return placed.replace(ref_params=state.ref_params, ensemble=state.ensemble)


def _steps_of_first(steps: list[int]) -> list[int]:
  """Returns the first host's list of steps; on a shared file system other hosts may see new steps later."""
  number = hosts.broadcast_from_first(len(steps))
  return [hosts.broadcast_from_first(step) for step in [*steps, *[0] * number][:number]]


def _newest_whole(start, steps, read, workdir, damaged):
  """Reads the newest whole step, and prints a note about skipped damage; returns `start` if there are no steps."""
  if not steps:
    return start
  found, damages = checkpoint.newest_whole(steps, read)
  if found is None:
    raise checkpoint.CheckpointError(f'{damages[0]} No other checkpoint is whole; another --workdir begins anew.')
  if damages:
    whole = steps[-1 - len(damages)]
    if damaged == 'refuse':
      raise checkpoint.CheckpointError(f'{damages[0]} Step {whole} is whole; --damaged=skip resumes from there.')
    hosts.say(' '.join([*map(str, damages), f'Resuming from step {whole}, the newest whole one.']))
  return found


def check_members(workdir: storage.Path, names: list[str]) -> None:
  """Checks that a study's workdir holds these members or no checkpoint yet; writes nothing.

  Raises:
    CheckpointError: if it holds other members.
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
  """Checks the members of a study's workdir with `check_members`, then saves their names."""
  check_members(workdir, names)
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(workdir / 'members.json', names)


def _check_later(directories: dict[str, storage.Path], infos: dict[str, checkpoint.CheckpointInfo], step: int) -> None:
  """Checks the checkpoints after the last step that all members have saved; the run repeats these steps.

  A run that is stopped during a save leaves at most one such step, and a directory for every member. Anything else
  means that checkpoints of a member were removed, and is refused, unless the study had resumed from a step before a
  damaged one.
  """
  later = {name: [n for n in checkpoint.steps_in(directory) if n > step] for name, directory in directories.items()}
  newest = max((n for steps in later.values() for n in steps), default=step)
  lacking = [name for name, steps in later.items() if newest not in steps]
  missing = any(newest > step and not directories[name].is_dir() for name in lacking)
  went_back = any(any(directory.glob('*.replaced-*')) for directory in directories.values())
  if missing or (max(map(len, later.values())) > 1 and not went_back):
    raise WorkdirError(f'{directories[lacking[0]]} lacks step {newest}, which other members have; restore it, or give '
                       'another --workdir to begin again.')
  for name, path in ((name, directories[name] / str(n)) for name, steps in later.items() for n in steps):
    with contextlib.suppress(checkpoint.DamagedError):  # a damaged one is replaced
      check_same(path, infos[name], checkpoint.read_info(path))
    hosts.say(f'Step {path.name} of {name} is repeated: not all members had saved it.')


def check_same(path: storage.Path, info: checkpoint.CheckpointInfo, saved: checkpoint.CheckpointInfo) -> None:
  """Checks that a run may resume from a step directory, by its settings.

  Args:
    path: the step directory.
    info: settings of the resuming run.
    saved: settings in the step directory.

  Raises:
    CheckpointError: if the two differ in a field that may not change.
  """
  reference = getattr(info.training, 'reference', None)  # a pre-training has none
  different = [said for name, said in _differences(saved, info).items()
               if name not in FREE_FIELDS | ROUNDING_FIELDS and not (
                   name == 'reference' and reference is not None and
                   _equals_kept(path, checkpoint.reference_of(info.training)))]
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')


def _print_rounding(saved: checkpoint.CheckpointInfo, info: checkpoint.CheckpointInfo) -> None:
  """Prints the settings of a resumed run that have changed and affect numbers by rounding only."""
  different = [said for name, said in _differences(saved, info).items() if name in ROUNDING_FIELDS]
  if different:
    hosts.say(f'Other settings than before ({"; ".join(different)}): updates are the same up to rounding.')


def _differences(old: checkpoint.CheckpointInfo, new: checkpoint.CheckpointInfo) -> dict[str, str]:
  """Returns the fields that differ between the settings of two checkpoints: name -> description."""
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(one), sep='/') for one in (old, new))
  return {name.split('/')[-1]: f'{name}: {old.get(name)!r} then, {new.get(name)!r} now'
          for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)}


def _equals_kept(path: storage.Path, reference: str | os.PathLike) -> bool:
  """Returns whether a reference equals the copy in the workdir of the checkpoint at `path`."""
  kept = checkpoint.latest(path.parent.parent / 'reference')
  given = checkpoint.find_checkpoint(reference).path
  return kept is not None and checkpoint.same_params(kept, given)
