"""Orbax checkpoints: arrays, and beside them the config that says what they are.

    DIR/STEP/params      the policy's parameters
    DIR/STEP/opt_state   the optimizer's state (absent where a checkpoint is only to be read)
    DIR/STEP/config      JSON: format, kind, known_digits, model, training, checksums of itself and of each array
    DIR/STEP/rows        JSON: the lines of metrics.jsonl up to this step, compressed (absent where there are none)

A step directory gets its name when all of it is written; what a killed process leaves has another name and is ignored.
A step that is saved again is set aside as STEP.replaced-N until the new one is whole.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from critkl_jax import finite, hosts, managers, sharding, storage
from critkl_jax.checksums import checksums
from critkl_jax.config import FinetuneConfig, GPT2Config, PretrainConfig, from_dict
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.managers import open_manager as open_manager
from critkl_jax.records import TrainState

FORMAT = 1
SHIPPED_REFERENCE = pathlib.Path(__file__).parent / 'checkpoints' / 'addition_n5'
_TRAINING = {'pretrain': PretrainConfig, 'finetune': FinetuneConfig}


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message is one line that says why and what to do."""


class DamagedError(CheckpointError):
  """A checkpoint of which a part is missing or is not what was saved."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
  """What a checkpoint's arrays are.

  Attributes:
    model: sizes of the model.
    known_digits: N of its pre-training.
    training: the config of the run that made it.
  """

  model: GPT2Config
  known_digits: int
  training: PretrainConfig | FinetuneConfig

  @property
  def kind(self) -> str:
    """`pretrain` or `finetune`."""
    return next(kind for kind, config in _TRAINING.items() if isinstance(self.training, config))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint read for use: a model's parameters and what they are.

  Attributes:
    params: nested dict of float32 arrays, for `GPT2(info.model).apply({'params': params}, tokens)`.
    info: the model's config, N and the training config.
    step: number of finished steps.
    path: the step directory it was read from.
  """

  params: Any
  info: CheckpointInfo
  step: int
  path: storage.Path


def save(manager: ocp.CheckpointManager, state: TrainState, info: CheckpointInfo, with_optimizer: bool = True,
         wait: bool = True, rows: Any = None, after: int | None = None) -> None:
  """Saves a state under its step number; the reference's parameters are not part of it.

  A checkpoint of this step that is there already is replaced: it is set aside, and removed once the new one is whole.

  Args:
    manager: from `open_manager`.
    state: `params`, `opt_state` and `step` are read.
    info: what the arrays are.
    with_optimizer: whether training can be taken up again from it.
    wait: whether to return only when all is written; else call `managers.finish` before the arrays change.
    rows: what JSON can hold, the metrics up to this step, as the first host has them; None for none.
    after: the step that the run saved before or went on from; later ones, which it went back behind, are replaced too.

  Raises:
    OSError: if it cannot be written; the error names what was to be written.
  """
  trees = {'params': state.params} | ({'opt_state': state.opt_state} if with_optimizer else {})
  config = _config(info, trees)
  items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()} | {'config': ocp.args.JsonSave(config)}
  if rows is not None:
    items['rows'] = ocp.args.JsonSave(rows)
  step = int(state.step)
  with managers.writing(manager.directory / str(step)):
    managers.set_aside(manager, [n for n in manager.all_steps() if n == step or (after is not None and n > after)])
    manager.save(step, args=ocp.args.Composite(**items), force=True)
  if wait:
    managers.finish(manager)  # the next step is given these very arrays to write over


def _config(info: CheckpointInfo, trees: dict[str, Any]) -> dict[str, Any]:
  config = {'format': FORMAT, 'kind': info.kind, 'known_digits': info.known_digits,
            'model': dataclasses.asdict(info.model), 'training': dataclasses.asdict(info.training),
            'checksums': {item: checksums(tree) for item, tree in trees.items()}}
  config['checksums']['config'] = _config_checksum(config)
  return config


def _config_checksum(values: dict[str, Any]) -> int:
  """Returns a checksum of a config as JSON: a changed digit can fit the arrays, the number of heads for one."""
  others = {name: value for name, value in values.get('checksums', {}).items() if name != 'config'}
  own = values | {'checksums': others}
  return zlib.crc32(json.dumps(own, sort_keys=True, allow_nan=False).encode())


def same_params(path: storage.Path, other: storage.Path) -> bool:
  """Returns whether two step directories hold the same parameters and say the same of them, by their configs."""
  one, two = _stored_config(path), _stored_config(other)
  sums = [values.get('checksums', {}).get('params') for values in (one, two)]
  return path.name == other.name and None not in sums and sums[0] == sums[1] and read_info(path) == read_info(other)


def _stored_config(path):
  read_info(path)  # raises if it cannot be read
  return _read_config(path)


def save_params(directory: str | os.PathLike, params: Any, info: CheckpointInfo, step: int) -> None:
  """Saves parameters alone in a directory of their own, from where `load_checkpoint` reads them; all hosts call it.

  If the step is there already with the same parameters, by their checksums, it is kept as it is.

  Args:
    directory: made if needed.
    params: of the model.
    info: what they are.
    step: number of finished steps, under which they are saved.

  Raises:
    CheckpointError: if the step is there and holds something else.
  """
  if hosts.as_first_says(step in steps_in(directory)):
    sums = checksums(params)
    hosts.first_does(lambda: _check_equal(storage.to_path(directory) / str(step), info, sums), CheckpointError)
    return
  with managers.ONE_SAVE, managers.opened(directory) as manager:
    save(manager, TrainState(params, None, np.int32(step)), info, with_optimizer=False)


def _check_equal(path: storage.Path, info: CheckpointInfo, sums: dict[str, int]) -> None:
  """Refuses a step directory that holds something else than what is to be saved under its number."""
  old = read_info(path)
  different = [name for name in ('kind', 'known_digits') if getattr(old, name) != getattr(info, name)]
  if _stored_config(path).get('checksums', {}).get('params', sums) != sums:  # an older version kept none
    different.append('parameters')
  if different:
    raise CheckpointError(f'{path} is there already and holds something else ({", ".join(different)} differ); it is '
                          'kept, and nothing was saved over it: move it away, or give another directory.')
  if old != info:
    hosts.say(f'{path} is there already with the same arrays; it keeps the settings that it was saved with.')


def restore(path: storage.Path, state: TrainState) -> TrainState:
  """Returns `state` with parameters, optimizer state and step of a step directory, placed as the arrays of `state` are:
  NumPy arrays on the host, or on the devices of its JAX arrays, on however many the checkpoint was made.

  Raises:
    CheckpointError: if it holds arrays of another shape; a `DamagedError` if an item is missing or damaged.
  """
  step = np.int32(path.name)
  return state.replace(params=_read(path, 'params', state.params), opt_state=_read(path, 'opt_state', state.opt_state),
                       step=sharding.put(step, state.step.sharding) if isinstance(state.step, jax.Array) else step)


def latest(directory: str | os.PathLike) -> storage.Path | None:
  """Returns the step directory with the greatest step in `directory`, or None if there is none."""
  steps = steps_in(directory)
  return storage.to_path(directory) / str(steps[-1]) if steps else None


def steps_in(directory: str | os.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints in a directory, in ascending order."""
  directory = storage.resolve(directory)
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir()
                if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(epath.Path(path)))


def newest_whole(steps: Sequence[int], read: Callable[[int], Any]) -> tuple[Any, list[DamagedError]]:
  """Reads the newest checkpoint that is whole; all hosts call it.

  Args:
    steps: of the checkpoints, in ascending order.
    read: reads one by its step.

  Returns:
    What was read, None if none is whole; and what is wrong with the newer ones, the newest first.

  Raises:
    CheckpointError: what `read` raises that is not a `DamagedError`.
  """
  damages = []
  for step in reversed(steps):
    try:
      return read(step), damages
    except DamagedError as error:
      damages.append(error)
  return None, damages


def read_info(path: str | os.PathLike) -> CheckpointInfo:
  """Reads the config of a step directory.

  Raises:
    CheckpointError: if it is of another version of the project; the message names the field. A `DamagedError` if it is
      missing or damaged.
  """
  values = _read_config(storage.to_path(path))
  try:
    if values.get('checksums', {}).get('config', _config_checksum(values)) != _config_checksum(values):
      raise DamagedError(f'{path}: its config is damaged: it is not what was saved.')
    if values['format'] != FORMAT:
      raise CheckpointError(f'{path}: format {values["format"]}, but this version reads format {FORMAT}.')
    return CheckpointInfo(model=from_dict(GPT2Config, values['model']), known_digits=int(values['known_digits']),
                          training=from_dict(_TRAINING[values['kind']], values['training']))
  except CheckpointError:
    raise
  except KeyError as error:
    raise CheckpointError(f'{path}: its config lacks the field or has an unknown kind {error}.') from error
  except (AttributeError, TypeError, ValueError) as error:
    raise CheckpointError(f'{path}: its config cannot be read: {error}') from error


def read_info_together(path: storage.Path) -> CheckpointInfo:
  """Reads the config of a step directory on all hosts; all raise if one of them finds it damaged."""
  info, error = None, None
  try:
    info = read_info(path)
  except CheckpointError as found:
    error = found
  _raise_together(path, error)
  return info


def newest_info(directory: str | os.PathLike) -> CheckpointInfo | None:
  """Reads the config of the newest checkpoint in a directory whose config is whole; None if there is none.

  Raises:
    CheckpointError: as `read_info`, but for what is missing or damaged.
  """
  path = storage.to_path(directory)
  return newest_whole(steps_in(path), lambda step: read_info(path / str(step)))[0]


def _read_config(path):
  file = path / 'config' / 'metadata'
  if not file.is_file():
    raise DamagedError(f'{path}: no config in it; it is half written or not a checkpoint of this project.')
  try:
    return json.loads(file.read_text())
  except ValueError as error:  # not JSON, or not even text
    raise DamagedError(f'{path}: its config cannot be read: {error}') from error


def load_checkpoint(path: str | os.PathLike = SHIPPED_REFERENCE, step: int | None = None, mesh: Mesh | None = None
                    ) -> Checkpoint:
  """Reads a checkpoint's parameters and config, on any number of devices.

  Args:
    path: a directory of step directories, a workdir that holds one under `checkpoints`, or a step directory; the
      reference that comes with the package if not given.
    step: which step; the latest if None.
    mesh: the devices over which the parameters are spread, as `sharding.shardings` says; the first device of this host
      if None.

  Returns:
    A `Checkpoint`.

  Raises:
    CheckpointError: if there is nothing at the path, no such step, or what is there is damaged. No other step is taken
      for a damaged one, but the message names the newest that is whole.
  """
  found = _locate(path, step)
  try:
    return _load(found, mesh)
  except DamagedError as error:
    before = [n for n in steps_in(found.parent) if n < int(found.name)]
    whole, _ = newest_whole(before, lambda step: _load(found.parent / str(step), mesh))
    if whole is None:
      raise
    raise DamagedError(f'{error} The newest whole checkpoint before it is {whole.path}.') from error


def _load(path, mesh):
  info = read_info_together(path)
  # Of any attention, which has no parameters: the one that trained the model may not be there.
  model = GPT2(dataclasses.replace(info.model, attention='auto'))
  shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = sharding.shardings(shapes, mesh) if mesh else jax.tree.map(lambda _: here, shapes)
  target = sharding.shapes(shapes, places)
  return Checkpoint(params=_read(path, 'params', target), info=info, step=int(path.name), path=path)


def find_checkpoint(path: str | os.PathLike = SHIPPED_REFERENCE, step: int | None = None) -> Checkpoint:
  """Returns the checkpoint that `load_checkpoint` would read, without its parameters (None), and starts no device.

  Raises:
    CheckpointError: if there is nothing at the path, no such step, or its config cannot be read.
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


def _read(path: storage.Path, item: str, target: Any) -> Any:
  """Restores an item into arrays like `target`, after a look at the shapes that were stored; all hosts call it, and all
  raise if one of them finds damage: none goes on to what it has to do together with the others."""
  directory, restored, error = epath.Path(storage.resolve(path) / item), None, None
  abstract = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else ocp.utils.to_shape_dtype_struct(x), target)
  try:
    restored = _restore(path, item, directory, abstract)
  except CheckpointError as found:
    error = found
  _raise_together(path, error)
  errors = _compare_sums(path, item, restored), _not_finite(path, item, restored)  # both, as on the other hosts
  _raise_together(path, errors[0] or errors[1])
  return restored


def _raise_together(path, error):
  if error is None and not hosts.least(1):
    error = DamagedError(f'{path}: another host found it damaged.')
  elif error is not None:
    hosts.least(0)
  if error is not None:
    raise error


def _restore(path, item, directory, abstract):
  if not directory.is_dir():
    raise DamagedError(f'{path}: no {item} in it; it is half written, or was saved without.')
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    try:
      _check_shapes(path, item, handler.metadata(directory).tree, abstract)
      return handler.restore(directory, args=ocp.args.StandardRestore(abstract))
    except (CheckpointError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
      logging.debug('restoring %s', directory, exc_info=True)
      raise DamagedError(f'{path}: {item} is damaged or half written ({_reason(path, error)}).') from error


def _compare_sums(path, item, restored):
  """Returns an error if arrays are not those whose checksums were saved with them, else None."""
  wanted = _read_config(path).get('checksums', {}).get(item)
  if wanted is None:  # of an older version
    return None
  found = checksums(restored)
  damaged = sorted(name for name in wanted if found.get(name) != wanted[name])
  names = ', '.join(damaged[:3]) + (', ...' if damaged[3:] else '')
  return DamagedError(f'{path}: {item} is damaged: {names} is not what was saved.') if damaged else None


def _not_finite(path, item, restored):
  """Returns an error if an array has a number that is not finite, else None."""
  broken = finite.not_finite_in(restored)
  names = ', '.join(broken[:3]) + (', ...' if broken[3:] else '')
  return DamagedError(f'{path}: {item} is not finite: {names}; it was saved by an older version, or by another '
                      'program.') if broken else None


def _reason(path, error):
  """Returns in a few words what is wrong with which file: TensorStore names it last, after the arrays in it."""
  chain = [error]
  while chain[-1].__cause__ is not None:
    chain.append(chain[-1].__cause__)
  text = ' '.join(' '.join(map(str, chain[::-1])).split()) or type(error).__name__
  files = [name for name in re.findall(r'local file "([^"]+)"', text) if not name.endswith('/')]
  what = re.match(r'[A-Z_]+(?=: )', text)
  if not files:
    return text[:200]
  return f'{pathlib.Path(files[-1]).relative_to(path) if files[-1].startswith(str(path)) else files[-1]}: ' + (
      what[0] if what else text.rpartition('": ')[2][:100])


def _check_shapes(path, item, stored, target):
  stored, wanted = ({jax.tree_util.keystr(key, simple=True, separator='/'): tuple(leaf.shape)
                     for key, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, target))
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise CheckpointError(
          f'{path}: {item} is of another shape: {name} has {stored.get(name, "nothing")}, expected '
          f'{wanted.get(name, "nothing")}; it does not belong to this config.')
