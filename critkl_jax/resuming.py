"""Resumes a run: finds and reads the newest whole checkpoint, and checks that its settings are the same."""

import contextlib
import dataclasses
import os

import flax.traverse_util
import jax
import numpy as np

from critkl_jax import checkpoint, hosts, population, sharding, storage
from critkl_jax.records import TrainState
from critkl_jax.storage import WorkdirError

# Config fields that may differ when a run is resumed: they change no update, or change it by rounding alone.
FREE_FIELDS = frozenset({'num_iterations', 'save_every', 'max_to_keep', 'max_skipped', 'eval_problems'})
ROUNDING_FIELDS = frozenset({'attention', 'remat', 'rollout', 'scan_layers', 'window'})


def check_workdir(workdir: str | os.PathLike, info: checkpoint.CheckpointInfo) -> int:
  """Returns the step of a workdir's newest checkpoint whose config is whole, 0 if there is none.

  Reads no arrays: `resume` finds out whether they are whole.

  Raises:
    CheckpointError: if the workdir holds the run of another config.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def check(step):
    check_same(directory / str(step), info, checkpoint.read_info_together(directory / str(step)))
    return step

  return checkpoint.newest_whole(_agreed(checkpoint.steps_in(directory)), check)[0] or 0


def resume(state: TrainState, info: checkpoint.CheckpointInfo, workdir: str | os.PathLike, damaged: str = 'skip'
           ) -> TrainState:
  """Returns the state of the workdir's newest whole checkpoint, or `state` itself if it has no checkpoint.

  Args:
    state: the initial state; its arrays say where the read ones are placed.
    info: settings of the run, with which those of the checkpoint must agree.
    workdir: of the run.
    damaged: if newer checkpoints are damaged, `skip` prints a note and takes the newest whole one, `refuse` raises.

  Raises:
    CheckpointError: if no checkpoint is whole, one was made with another config, or a damaged one is refused.
  """
  directory = storage.to_path(workdir) / 'checkpoints'

  def read(step):
    path = directory / str(step)
    saved = checkpoint.read_info_together(path)
    check_same(path, info, saved)
    found = checkpoint.restore(path, state)
    _say_rounding(saved, info)
    return found

  return _newest_whole(state, _agreed(checkpoint.steps_in(directory)), read, workdir, damaged)


def resume_population(state: TrainState, infos: dict[str, checkpoint.CheckpointInfo], workdir: str | os.PathLike,
                      damaged: str = 'skip') -> TrainState:
  """Like `resume`, for a population: reads the newest step that all members under a study's workdir have saved whole.

  Returns `state` itself if the members have no step in common.

  Raises:
    CheckpointError: as `resume`, or if the workdir holds other members.
    WorkdirError: if checkpoints of a member were removed, or the list of members cannot be read.
  """
  directories = {name: storage.to_path(workdir) / 'members' / name / 'checkpoints' for name in infos}
  hosts.first_does(lambda: _keep_members(storage.to_path(workdir), list(infos)),
                   checkpoint.CheckpointError, WorkdirError, OSError)
  saved = [set(checkpoint.steps_in(directory)) for directory in directories.values()]
  steps = _agreed(sorted(set.intersection(*saved)))
  hosts.first_does(lambda: _check_later(directories, infos, max(steps, default=-1)),
                   checkpoint.CheckpointError, WorkdirError)
  target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(lambda: population.member(state, 0)))

  def read(step):
    paths = [directory / str(step) for directory in directories.values()]
    saved = [checkpoint.read_info_together(path) for path in paths]
    for path, info, own in zip(paths, infos.values(), saved):
      check_same(path, info, own)
    found = population.stack([checkpoint.restore(path, target) for path in paths])
    _say_rounding(saved[0], next(iter(infos.values())))
    return found

  found = _newest_whole(None, steps, read, workdir, damaged)
  if found is None:
    return state
  own = state.replace(ref_params=None, ensemble=())
  placed = sharding.put(found.replace(ref_params=None, ensemble=()), jax.tree.map(lambda x: x.sharding, own))
  return placed.replace(ref_params=state.ref_params, ensemble=state.ensemble)


def _agreed(steps: list[int]) -> list[int]:
  """Returns the steps that the first host sees; on a shared file system other hosts may see new ones later."""
  number = hosts.as_first_says(len(steps))
  return [hosts.as_first_says(step) for step in [*steps, *[0] * number][:number]]


def _newest_whole(start, steps, read, workdir, damaged):
  """Reads the newest step that is whole; returns `start` if there are no steps."""
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
  """Checks that a study's workdir holds these members or no checkpoint yet; changes nothing.

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
  """Writes the names of a study's members into its workdir, after `check_members`."""
  check_members(workdir, names)
  workdir.mkdir(parents=True, exist_ok=True)
  storage.write_json(workdir / 'members.json', names, indent=None)


def _check_later(directories: dict[str, storage.Path], infos: dict[str, checkpoint.CheckpointInfo], step: int) -> None:
  """Checks the steps that some members have saved beyond the last step that all have; the run repeats them.

  A run that is stopped during a save leaves at most one such step, and directories of all members. Anything else means
  that a member's checkpoints were removed, and is refused, unless a member went back behind a damaged step.
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
    with contextlib.suppress(checkpoint.DamagedError):  # it is replaced
      check_same(path, infos[name], checkpoint.read_info(path))
    hosts.say(f'Step {path.name} of {name} is made again: not all members had saved it.')


def check_same(path: storage.Path, info: checkpoint.CheckpointInfo, saved: checkpoint.CheckpointInfo) -> None:
  """Checks that a step directory was saved with settings that a run may go on with.

  Args:
    path: the step directory.
    info: of the run that goes on.
    saved: what the step directory says.

  Raises:
    CheckpointError: if it was saved with others.
  """
  reference = getattr(info.training, 'reference', None)  # a pre-training has none
  different = [said for name, said in _differences(saved, info).items()
               if name not in FREE_FIELDS | ROUNDING_FIELDS and not (
                   name == 'reference' and reference is not None and _is_kept(path, reference))]
  if different:
    raise checkpoint.CheckpointError(
        f'{path}: made with other settings ({"; ".join(different)}); give the same ones, or another --workdir.')


def _say_rounding(saved: checkpoint.CheckpointInfo, info: checkpoint.CheckpointInfo) -> None:
  """Prints the settings of a resumed run that differ from before and change numbers by rounding."""
  different = [said for name, said in _differences(saved, info).items() if name in ROUNDING_FIELDS]
  if different:
    hosts.say(f'Other settings than before ({"; ".join(different)}): updates are the same up to rounding.')


def _differences(old: checkpoint.CheckpointInfo, new: checkpoint.CheckpointInfo) -> dict[str, str]:
  """Describes the differences between the settings of two checkpoints: name of the field -> text."""
  old, new = (flax.traverse_util.flatten_dict(dataclasses.asdict(one), sep='/') for one in (old, new))
  return {name.split('/')[-1]: f'{name}: {old.get(name)!r} then, {new.get(name)!r} now'
          for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)}


def _is_kept(path: storage.Path, reference: str) -> bool:
  """Returns whether a reference at another path than before has the parameters that the run of a checkpoint keeps."""
  kept = checkpoint.latest(path.parent.parent / 'reference')
  given = checkpoint.find_checkpoint(reference or checkpoint.SHIPPED_REFERENCE).path
  return kept is not None and checkpoint.same_params(kept, given)
