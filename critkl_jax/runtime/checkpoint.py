"""Saves and loads Orbax checkpoints: arrays, and a config that describes them.

    DIR/STEP/params      the policy's parameters
    DIR/STEP/opt_state   the optimizer's state (absent if training cannot resume from the checkpoint)
    DIR/STEP/config      JSON: format, kind, architecture, model, task, training, checksums of itself and of each array
    DIR/STEP/rows        JSON: the lines of metrics.jsonl up to this step, compressed (absent where there are none)

A directory is renamed to STEP once all of it is written; an unfinished one, left by a killed process, has another name
and is ignored. When a step is saved again, its old directory becomes STEP.replaced-NUMBER, which is removed once the
new directory is complete.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.architectures import ARCHITECTURES, make_model
from critkl_jax.models.language_model import LanguageModel, as_language_model
from critkl_jax.records import TrainState
from critkl_jax.runtime import hosts, managers, storage
from critkl_jax.runtime.checkpoint_info import CheckpointInfo, read_config, read_info, to_config
from critkl_jax.runtime.checkpoint_info import read_info_together as read_info_together
from critkl_jax.runtime.checksums import array_checksums
from critkl_jax.runtime.managers import open_manager as open_manager
from critkl_jax.runtime.restoring import CheckpointError, DamagedError, newest_whole, read_arrays
from critkl_jax.tasks import known_tasks
from critkl_jax.training.config import FinetuneConfig

_SHIPPED = pathlib.Path(__file__).parents[1] / 'checkpoints'
SHIPPED_REFERENCES = {'addition': _SHIPPED / 'addition_n5', 'stories': _SHIPPED / 'stories_n4'}  # task -> directory
SHIPPED_REFERENCE = SHIPPED_REFERENCES['addition']


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A loaded checkpoint: the parameters of a model and their description.

  Attributes:
    params: PyTree of float32 arrays, for `model.apply(params, tokens)`.
    info: the model's config, the task's settings and the training config.
    step: number of finished steps.
    path: the step directory it was read from.
    model: the model that the caller passed to `load_checkpoint`; None if none was passed.
  """

  params: Any
  info: CheckpointInfo
  step: int
  path: storage.Path
  model: LanguageModel | None = None


def save(manager: ocp.CheckpointManager, state: TrainState, info: CheckpointInfo, with_optimizer: bool = True,
         wait: bool = True, rows: Any = None, after: int | None = None) -> None:
  """Saves a state, without the reference's parameters, under its step number.

  Replaces an existing checkpoint of this step, which is removed once the new one is complete.

  Args:
    manager: from `open_manager`.
    state: `params`, `opt_state` and `step` are read.
    info: description of the arrays.
    with_optimizer: whether to save the optimizer's state, without which training cannot resume.
    wait: whether to return only when everything is written; otherwise call `managers.finish` before the arrays change.
    rows: JSON value with the metrics up to this step, which the first host writes; None for no metrics.
    after: the last step that the run saved or resumed from. Checkpoints of later steps, which the run skipped as
      damaged, are removed too.

  Raises:
    OSError: if the checkpoint cannot be written; the error names the path.
  """
  trees = {'params': state.params} | ({'opt_state': state.opt_state} if with_optimizer else {})
  config = to_config(info, trees)
  items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()} | {'config': ocp.args.JsonSave(config)}
  if rows is not None:
    items['rows'] = ocp.args.JsonSave(rows)
  step = int(state.step)
  with managers.writing(manager.directory / str(step)):
    managers.set_aside(manager, [n for n in manager.all_steps() if n == step or (after is not None and n > after)])
    manager.save(step, args=ocp.args.Composite(**items), force=True)
  if wait:
    managers.finish(manager)  # the next step is given these arrays as donated buffers


def same_params(path: storage.Path, other: storage.Path) -> bool:
  """Returns whether two step directories have the same step, description and (by their checksums) parameters."""
  one, two = _stored_config(path), _stored_config(other)
  sums = [values.get('checksums', {}).get('params') for values in (one, two)]
  return path.name == other.name and None not in sums and sums[0] == sums[1] and read_info(path) == read_info(other)


def _stored_config(path):
  read_info(path)  # raises if it cannot be read
  return read_config(path)


def save_params(directory: str | os.PathLike, params: Any, info: CheckpointInfo, step: int) -> None:
  """Saves parameters without an optimizer's state, for `load_checkpoint`; all hosts call it.

  A step that is already saved with the same parameters, by their checksums, is kept as it is.

  Args:
    directory: takes the step directory; made if needed.
    params: parameters of the model.
    info: description of the parameters.
    step: number of finished steps, under which they are saved.

  Raises:
    CheckpointError: if the step is already saved with other content.
  """
  if hosts.broadcast_from_first(step in steps_in(directory)):
    sums = array_checksums(params)
    hosts.first_does(lambda: _check_equal(storage.to_path(directory) / str(step), info, sums), CheckpointError)
    return
  with managers.ONE_SAVE, managers.opened(directory) as manager:
    save(manager, TrainState(params, None, np.int32(step)), info, with_optimizer=False)


def _check_equal(path: storage.Path, info: CheckpointInfo, sums: dict[str, int]) -> None:
  """Raises a CheckpointError if a step directory holds other parameters or settings than those to be saved."""
  old = read_info(path)
  different = ['kind'] if old.kind != info.kind else []
  different += known_tasks.differing_settings(old.task, info.task)
  if _stored_config(path).get('checksums', {}).get('params', sums) != sums:  # older versions saved none
    different.append('parameters')
  if different:
    raise CheckpointError(f'{path} already exists and holds something else ({", ".join(different)} differ); it is '
                          'kept, and nothing was saved over it: move it away, or give another directory.')
  if old != info:
    hosts.say(f'{path} already exists with the same arrays; it keeps the settings that it was saved with.')


def restore(path: storage.Path, state: TrainState) -> TrainState:
  """Returns `state` with the parameters, optimizer state and step of a step directory.

  The arrays become NumPy arrays, or get the shardings of the JAX arrays in `state`. The checkpoint may have been saved
  on another number of devices.

  Raises:
    CheckpointError: if an array has another shape; a `DamagedError` if an item is missing or damaged.
  """
  step = np.int32(path.name)
  return state.replace(params=_read(path, 'params', state.params), opt_state=_read(path, 'opt_state', state.opt_state),
                       step=sharding.put(step, state.step.sharding) if isinstance(state.step, jax.Array) else step)


def latest(directory: str | os.PathLike) -> storage.Path | None:
  """Returns the step directory of the latest step in `directory`, or None if it has no checkpoint."""
  steps = steps_in(directory)
  return storage.to_path(directory) / str(steps[-1]) if steps else None


def steps_in(directory: str | os.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints in a directory, in ascending order."""
  directory = storage.resolve(directory)
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir()
                if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(epath.Path(path)))


def settings_of(found: Checkpoint, kind: type) -> Any:
  """Returns the task settings of a checkpoint.

  Args:
    found: the checkpoint.
    kind: class of a known task's settings, for example `Addition`.

  Raises:
    CheckpointError: if the checkpoint is of another task.
  """
  if not isinstance(found.info.task, kind):
    raise CheckpointError(f'{found.path}: its task is {found.info.task.name!r}, expected {kind.name!r}.')
  return found.info.task


def newest_info(directory: str | os.PathLike) -> CheckpointInfo | None:
  """Reads the newest undamaged config in a directory of checkpoints; returns None if there is none.

  Raises:
    CheckpointError: as `read_info`, except for missing or damaged configs, which are skipped.
  """
  path = storage.to_path(directory)
  return newest_whole(steps_in(path), lambda step: read_info(path / str(step)))[0]


def reference_of(config: FinetuneConfig) -> str | pathlib.Path:
  """Returns the directory of the pre-trained model of a fine-tuning config: its `reference`, else the package's."""
  return config.reference or SHIPPED_REFERENCES.get(config.task, SHIPPED_REFERENCE)


def load_checkpoint(path: str | os.PathLike = SHIPPED_REFERENCE, step: int | None = None, mesh: Mesh | None = None,
                    model: LanguageModel | None = None) -> Checkpoint:
  """Reads a checkpoint's parameters and config, on any number of devices.

  Args:
    path: a directory of step directories, a workdir that holds one under `checkpoints`, or a step directory; the
      reference that comes with the package if not given.
    step: which step; the latest if None.
    mesh: the devices over which the parameters are sharded, by `sharding.shardings`; the first device of this host if
      None.
    model: the model of the checkpoint, needed if its architecture is not one of `ARCHITECTURES`.

  Returns:
    A `Checkpoint`.

  Raises:
    CheckpointError: if the path does not exist or has no such step, if the checkpoint is damaged, or if it needs
      another `model`. No other step is read instead of a damaged one, but the message names the newest whole step
      before it.
  """
  found = _locate(path, step)
  try:
    return _load(found, mesh, model)
  except DamagedError as error:
    before = [n for n in steps_in(found.parent) if n < int(found.name)]
    whole, _ = newest_whole(before, lambda step: _load(found.parent / str(step), mesh, model))
    if whole is None:
      raise
    raise DamagedError(f'{error} The newest whole checkpoint before it is {whole.path}.') from error


def _read(path, item, target):
  return read_arrays(path, item, target, read_config(path).get('checksums', {}).get(item))


def _load(path, mesh, given=None):
  info = read_info_together(path)
  model = model_of(path, info, given)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = sharding.shardings(shapes, mesh, model.partition) if mesh else jax.tree.map(lambda _: here, shapes)
  target = sharding.shapes(shapes, places)
  return Checkpoint(params=_read(path, 'params', target), info=info, step=int(path.name), path=path,
                    model=None if given is None else model)


def model_of(path: storage.Path, info: CheckpointInfo, given: LanguageModel | None) -> LanguageModel:
  """Returns the model of a checkpoint: the given model, or the known model of its architecture.

  Raises:
    CheckpointError: if the given model has another architecture, or none is given and the architecture is unknown.
  """
  if given is not None:
    given = as_language_model(given)
    if given.name != info.architecture:
      raise CheckpointError(f'{path}: holds a model of the architecture {info.architecture!r}, not {given.name!r}.')
    return given
  if info.architecture not in ARCHITECTURES:
    raise CheckpointError(f'{path}: holds a model of the architecture {info.architecture!r}, which is not one of '
                          f'{tuple(ARCHITECTURES)}; read it with model=, the LanguageModel that it was saved from.')
  # Attention has no parameters, and the implementation that trained the model may not be available here.
  return make_model(dataclasses.replace(info.model, attention='auto'))


def find_checkpoint(path: str | os.PathLike = SHIPPED_REFERENCE, step: int | None = None) -> Checkpoint:
  """Returns the checkpoint that `load_checkpoint` would read, with `params` None; starts no device.

  Raises:
    CheckpointError: if the path does not exist, has no such step, or its config cannot be read.
  """
  found = _locate(path, step)
  return Checkpoint(params=None, info=read_info(found), step=int(found.name), path=found)


def _locate(path, step):
  try:
    return _find(storage.to_path(path), step)
  except OSError as error:
    raise CheckpointError(f'{str(path)[:200]}: cannot be read ({error.strerror}); give another path.') from error


def _find(path: storage.Path, step: int | None) -> storage.Path:
  if not path.is_dir():
    raise CheckpointError(f'{path}: no such directory; give a checkpoint directory, or a workdir that holds one.')
  path = storage.resolve(path)
  if (path / 'params').is_dir() or (path / 'config').is_dir():
    if not path.name.isdigit():
      raise CheckpointError(f'{path}: a half-written checkpoint, or a renamed one: the name should be its step.')
    if step is not None and step != int(path.name):
      raise CheckpointError(f'{path}: no step {step} in it; it is the checkpoint of step {path.name}.')
    return path
  path = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
  steps = steps_in(path)
  if not steps:
    raise CheckpointError(f'{path}: no complete checkpoint in it; the run was stopped before it saved one.')
  if step is not None and step not in steps:
    raise CheckpointError(f'{path}: no step {step} in it; it holds steps {steps}.')
  return path / str(steps[-1] if step is None else step)


