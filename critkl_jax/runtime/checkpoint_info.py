"""Reads and writes the config of a checkpoint, which describes its arrays."""

import dataclasses
import json
import os
import zlib
from typing import Any

from critkl_jax.config import from_dict
from critkl_jax.models.architectures import OLDEST, config_of
from critkl_jax.runtime import storage
from critkl_jax.runtime.checksums import array_checksums
from critkl_jax.runtime.restoring import CheckpointError, DamagedError, raise_together
from critkl_jax.tasks import known_tasks
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.tokenizers import CharTokenizer
from critkl_jax.training.config import FinetuneConfig, ImportConfig, PretrainConfig

FORMAT = 1
_TRAINING = {'pretrain': PretrainConfig, 'finetune': FinetuneConfig, 'import': ImportConfig}


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
  """Describes the arrays of a checkpoint.

  Attributes:
    model: the config of the model; a dict of its fields if the architecture is not one of `ARCHITECTURES`.
    task: settings of a task in `known_tasks.KNOWN_TASKS`, or `OwnTask` for a user's own task.
    training: the config of the run that made it; where it came from if no run of this project did.
    architecture: name of the kind of model, `LanguageModel.name`.
  """

  model: Any
  task: Any
  training: PretrainConfig | FinetuneConfig | ImportConfig
  architecture: str = OLDEST

  @property
  def kind(self) -> str:
    """Kind of the run that made the checkpoint: `pretrain` or `finetune`, or `import` for a model that was read."""
    return next(kind for kind, config in _TRAINING.items() if isinstance(self.training, config))


def to_config(info: CheckpointInfo, trees: dict[str, Any]) -> dict[str, Any]:
  """Returns the config to save with the arrays `trees`, including their checksums."""
  config = {'format': FORMAT, 'kind': info.kind, 'architecture': info.architecture,
            'model': dataclasses.asdict(info.model), 'task': known_tasks.to_json_object(info.task),
            'training': dataclasses.asdict(info.training),
            'checksums': {item: array_checksums(tree) for item, tree in trees.items()}}
  config['checksums']['config'] = _config_checksum(config)
  return config


def _config_checksum(values: dict[str, Any]) -> int:
  """Returns a checksum of a config as JSON.

  The shapes of the arrays alone do not reveal a damaged config: another number of heads, for example, fits them too.
  """
  others = {name: value for name, value in values.get('checksums', {}).items() if name != 'config'}
  own = values | {'checksums': others}
  return zlib.crc32(json.dumps(own, sort_keys=True, allow_nan=False).encode())


def read_config(path: storage.Path) -> dict[str, Any]:
  """Reads the config of a step directory as a JSON object; raises `DamagedError` if it cannot be read."""
  file = path / 'config' / 'metadata'
  if not file.is_file():
    raise DamagedError(f'{path}: no config in it; it is half written or not a checkpoint of this project.')
  try:
    return json.loads(file.read_text())
  except ValueError as error:  # not JSON, or not even text
    raise DamagedError(f'{path}: its config cannot be read: {error}') from error


def read_info(path: str | os.PathLike) -> CheckpointInfo:
  """Reads the description of the arrays in a step directory.

  Raises:
    CheckpointError: if another version of the project wrote it; the message names the field. A `DamagedError` if it is
      missing or damaged.
  """
  values = read_config(storage.to_path(path))
  try:
    if values.get('checksums', {}).get('config', _config_checksum(values)) != _config_checksum(values):
      raise DamagedError(f'{path}: its config is damaged: it is not what was saved.')
    if values['format'] != FORMAT:
      raise CheckpointError(f'{path}: format {values["format"]}, but this version reads format {FORMAT}.')
    values = values if 'task' in values else _with_task(values)
    architecture = values.get('architecture', OLDEST)  # older versions did not write it
    return CheckpointInfo(model=config_of(architecture, values['model']), architecture=architecture,
                          task=known_tasks.from_json_object(values['task']),
                          training=from_dict(_TRAINING[values['kind']], values['training']))
  except CheckpointError:
    raise
  except KeyError as error:
    raise CheckpointError(f'{path}: its config lacks the field or has an unknown kind {error}.') from error
  except (AttributeError, TypeError, ValueError) as error:
    raise CheckpointError(f'{path}: its config cannot be read: {error}') from error


def _with_task(values):
  """Adds the task, in today's format, to the config of an older checkpoint, whose task was always addition."""
  training, vocab_size = values['training'], values['model']['vocab_size']
  padded = vocab_size > CharTokenizer().vocab_size  # the task had the model's larger vocabulary
  own = {name: training[name] for name in ('extra_digits', 'wrong_reward') if name in training}
  task = Addition(values['known_digits'], vocab_size=vocab_size if padded else 0, **own)
  if values['kind'] == 'pretrain':
    training = {**training, 'task': {'pad_vocabulary': padded}}
  return {**values, 'task': known_tasks.to_json_object(task), 'training': training}


def read_info_together(path: storage.Path) -> CheckpointInfo:
  """Like `read_info`, on all hosts; every host raises if one of them finds the config damaged."""
  info, error = None, None
  try:
    info = read_info(path)
  except CheckpointError as found:
    error = found
  raise_together(path, error)
  return info
