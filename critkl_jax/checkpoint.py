"""Orbax checkpoints: arrays, and beside them the config that says what they are.

    DIR/STEP/params      the policy's parameters
    DIR/STEP/opt_state   the optimizer's state (absent where a checkpoint is only to be read)
    DIR/STEP/config      JSON: format, kind, known_digits, model, training, checksums of itself and of each array
    DIR/STEP/rows        JSON: the lines of metrics.jsonl up to this step, compressed (absent where there are none)

A step directory gets its name when all of it is written; what a killed process leaves has another name and is ignored.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import threading
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import finite, hosts, sharding, storage
from critkl_jax.config import FinetuneConfig, GPT2Config, PretrainConfig, from_dict
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.records import TrainState

FORMAT = 1
SHIPPED_REFERENCE = pathlib.Path(__file__).parent / 'checkpoints' / 'addition_n5'
_ITEMS = ('params', 'opt_state', 'config', 'rows')  # Orbax keeps the name metrics to itself
ONE_SAVE = threading.RLock()  # held while a thread saves: two saves at once would take each other's messages in Orbax
_TRAINING = {'pretrain': PretrainConfig, 'finetune': FinetuneConfig}


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message is one line that says why and what to do."""


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
  path: pathlib.Path


def open_manager(directory: str | pathlib.Path, max_to_keep: int | None = None) -> ocp.CheckpointManager:
  """Opens a directory for saving, making it if needed; close it at the end."""
  options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
  return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options, item_names=_ITEMS)


def save(manager: ocp.CheckpointManager, state: TrainState, info: CheckpointInfo, with_optimizer: bool = True,
         wait: bool = True, rows: Any = None) -> None:
  """Saves a state under its step number, unless that step is there; the reference's parameters are not part of it.

  Args:
    manager: from `open_manager`.
    state: `params`, `opt_state` and `step` are read.
    info: what the arrays are.
    with_optimizer: whether training can be taken up again from it.
    wait: whether to return only when all is written; else call `manager.wait_until_finished` before the arrays change.
    rows: what JSON can hold, the metrics up to this step, as the first host has them; None for none.
  """
  if hosts.as_first_says(int(state.step) in manager.all_steps()):
    return
  trees = {'params': state.params} | ({'opt_state': state.opt_state} if with_optimizer else {})
  config = _config(info, trees)
  items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()} | {'config': ocp.args.JsonSave(config)}
  if rows is not None:
    items['rows'] = ocp.args.JsonSave(rows)
  manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)
  if wait:
    manager.wait_until_finished()  # the next step is given these very arrays to write over


def _config(info: CheckpointInfo, trees: dict[str, Any]) -> dict[str, Any]:
  config = {'format': FORMAT, 'kind': info.kind, 'known_digits': info.known_digits,
            'model': dataclasses.asdict(info.model), 'training': dataclasses.asdict(info.training),
            'checksums': {item: checksums(tree) for item, tree in trees.items()}}
  config['checksums']['config'] = _config_checksum(config)
  return config


def same_params(path: pathlib.Path, other: pathlib.Path) -> bool:
  """Returns whether two step directories hold the same parameters and say the same of them, by their configs."""
  one, two = _stored_config(path), _stored_config(other)
  sums = [values.get('checksums', {}).get('params') for values in (one, two)]
  return (path.name == other.name and None not in sums and sums[0] == sums[1] and
          all(one.get(name) == two.get(name) for name in ('kind', 'known_digits', 'model', 'training')))


def _stored_config(path: pathlib.Path) -> dict[str, Any]:
  read_info(path)  # raises if it cannot be read
  return json.loads((path / 'config' / 'metadata').read_text())


def save_params(directory: str | pathlib.Path, params: Any, info: CheckpointInfo, step: int) -> None:
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
    config = _config(info, {'params': params})
    hosts.first_does(lambda: _check_equal(storage.to_path(directory) / str(step), config), CheckpointError)
    return
  with ONE_SAVE, contextlib.closing(open_manager(directory)) as manager:
    save(manager, TrainState(params, None, np.int32(step)), info, with_optimizer=False)


def _check_equal(path: epath.Path, config: dict[str, Any]) -> None:
  """Refuses a step directory that holds something else than what is to be saved under its number."""
  old, new = _stored_config(path), json.loads(storage.to_json(config))
  sums = old.get('checksums', new['checksums'])  # an older version kept none
  different = [name for name in ('kind', 'known_digits') if old.get(name) != new[name]]
  different += ['parameters'] if sums.get('params') != new['checksums']['params'] else []
  if different:
    raise CheckpointError(f'{path} is there already and holds something else ({", ".join(different)} differ); it is '
                          'kept, and nothing was saved over it: move it away, or give another directory.')
  if (old['model'], old['training']) != (new['model'], new['training']):
    hosts.say(f'{path} is there already with the same arrays; it keeps the settings that it was saved with.')


def restore(path: pathlib.Path, state: TrainState) -> TrainState:
  """Returns `state` with parameters, optimizer state and step of a step directory, placed as the arrays of `state` are:
  NumPy arrays on the host, or on the devices of its JAX arrays, on however many the checkpoint was made.

  Raises:
    CheckpointError: if the directory lacks an item, is damaged, or holds arrays of another shape.
  """
  step = np.int32(path.name)
  return state.replace(params=_read(path, 'params', state.params), opt_state=_read(path, 'opt_state', state.opt_state),
                       step=sharding.put(step, state.step.sharding) if isinstance(state.step, jax.Array) else step)


def latest(directory: str | pathlib.Path) -> pathlib.Path | None:
  """Returns the step directory with the greatest step in `directory`, or None if there is none."""
  steps = steps_in(directory)
  return pathlib.Path(directory) / str(steps[-1]) if steps else None


def steps_in(directory: str | pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a directory, in ascending order."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir()
                if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(epath.Path(path.absolute())))


def read_info(path: str | pathlib.Path) -> CheckpointInfo:
  """Reads the config of a step directory.

  Raises:
    CheckpointError: if it is missing, damaged, or of another version of the project; the message names the field.
  """
  file = pathlib.Path(path) / 'config' / 'metadata'
  if not file.is_file():
    raise CheckpointError(f'{path}: no config in it; it is half written or not a checkpoint of this project.')
  try:
    values = json.loads(file.read_text())
    if values['format'] != FORMAT:
      raise CheckpointError(f'{path}: format {values["format"]}, but this version reads format {FORMAT}.')
    if values.get('checksums', {}).get('config', _config_checksum(values)) != _config_checksum(values):
      raise CheckpointError(f'{path}: its config is damaged: it is not what was saved; take another step.')
    return CheckpointInfo(model=from_dict(GPT2Config, values['model']), known_digits=int(values['known_digits']),
                          training=from_dict(_TRAINING[values['kind']], values['training']))
  except CheckpointError:
    raise
  except KeyError as error:
    raise CheckpointError(f'{path}: its config lacks the field or has an unknown kind {error}.') from error
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{path}: its config cannot be read: {error}') from error


def load_checkpoint(path: str | pathlib.Path = SHIPPED_REFERENCE, step: int | None = None, mesh: Mesh | None = None
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
    CheckpointError: if there is nothing at the path, no such step, or what is there is damaged.
  """
  found = find_checkpoint(path, step)
  path, info = found.path, found.info
  # Of any attention, which has no parameters: the one that trained the model may not be there.
  model = GPT2(dataclasses.replace(info.model, attention='auto'))
  shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = sharding.shardings(shapes, mesh) if mesh else jax.tree.map(lambda _: here, shapes)
  target = sharding.shapes(shapes, places)
  return Checkpoint(params=_read(path, 'params', target), info=info, step=int(path.name), path=path)


def find_checkpoint(path: str | pathlib.Path = SHIPPED_REFERENCE, step: int | None = None) -> Checkpoint:
  """Returns the checkpoint that `load_checkpoint` would read, without its parameters (None), and starts no device.

  Raises:
    CheckpointError: if there is nothing at the path, no such step, or its config cannot be read.
  """
  try:
    found = _find(pathlib.Path(path), step)
    return Checkpoint(params=None, info=read_info(found), step=int(found.name), path=found)
  except OSError as error:
    raise CheckpointError(f'{str(path)[:200]}: cannot be read ({error.strerror}); give another path.') from error


def _find(path: pathlib.Path, step: int | None) -> pathlib.Path:
  if not path.is_dir():
    raise CheckpointError(f'{path}: no such directory; give a checkpoint directory, or a workdir that holds one.')
  path = path.resolve()
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


def _read(path: pathlib.Path, item: str, target: Any) -> Any:
  """Restores an item into arrays like `target`, after a look at the shapes that were stored."""
  directory = epath.Path(path / item).absolute()
  if not directory.is_dir():
    raise CheckpointError(f'{path}: no {item} in it; it is half written, or was saved without.')
  abstract = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else ocp.utils.to_shape_dtype_struct(x), target)
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    try:
      _check_shapes(path, item, handler.metadata(directory).tree, abstract)
      restored = handler.restore(directory, args=ocp.args.StandardRestore(abstract))
    except (CheckpointError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
      logging.debug('restoring %s', directory, exc_info=True)
      raise CheckpointError(f'{path}: {item} is damaged or half written ({_reason(path, error)}); remove this step '
                            'directory or take another one.') from error
  _check_sums(path, item, restored)
  broken = finite.not_finite_in(restored)
  if broken:
    names = ', '.join(broken[:3]) + (', ...' if broken[3:] else '')
    raise CheckpointError(f'{path}: {item} is not finite: {names}; it was saved by an older version, or by another '
                          'program; take an earlier step.')
  return restored


def checksums(tree: Any) -> dict[str, int]:
  """Returns a checksum of each array of a PyTree, by its path, wherever the arrays lie: TensorStore keeps none of them.

  It is the sum of the elements' bits, each times an odd number of its own, modulo 2^32, so that no single changed
  element goes unseen.
  """
  return {jax.tree_util.keystr(key, simple=True, separator='/'): _checksum(x)
          for key, x in jax.tree_util.tree_leaves_with_path(tree)}


def _config_checksum(values: dict[str, Any]) -> int:
  """Returns a checksum of a config as JSON: a changed digit can fit the arrays, the number of heads for one."""
  others = {name: value for name, value in values.get('checksums', {}).items() if name != 'config'}
  own = values | {'checksums': others}
  return zlib.crc32(json.dumps(own, sort_keys=True, allow_nan=False).encode())


def _checksum(x) -> int:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return int(jax.jit(_spread_checksum, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x))
  bits = np.ascontiguousarray(x).reshape(-1)
  bits = bits.view(f'u{bits.dtype.itemsize}').astype(np.uint32)
  return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


def _spread_checksum(x):
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  index, size = jnp.uint32(0), 1
  for axis in reversed(range(x.ndim)):
    index, size = index + jnp.uint32(size) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis), size * x.shape[axis]
  return jnp.sum(bits * (jnp.uint32(2) * index + jnp.uint32(1)), dtype=jnp.uint32)


def _check_sums(path, item, restored):
  wanted = json.loads((path / 'config' / 'metadata').read_text()).get('checksums', {}).get(item)
  if wanted is None:  # of an older version
    return
  found = checksums(restored)
  damaged = sorted(name for name in wanted if found.get(name) != wanted[name])
  if damaged:
    names = ', '.join(damaged[:3]) + (', ...' if damaged[3:] else '')
    raise CheckpointError(f'{path}: {item} is damaged: {names} is not what was saved; remove this step directory or '
                          'take another one.')


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
