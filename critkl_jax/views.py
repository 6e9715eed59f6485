"""Views of configs: the fields of a config and of its nested configs by name, and JSON."""

import dataclasses
import json
from typing import Any, TypeVar

ConfigT = TypeVar('ConfigT')

_ADDED = {'rollout', 'window', 'scan_layers', 'kl_gate', 'gate_threshold', 'gate_fraction', 'wrong_reward',
          'certainty_ensemble', 'max_skipped', 'bootstrap_truncated', 'hidden_only',
          'max_to_keep'}  # fields that older checkpoints lack
_OLDER = {'hidden_only': False}  # value for older checkpoints, where it is not the default


def flat_fields(config_class: type) -> dict[str, dataclasses.Field]:
  """Returns the fields of a config and of its nested configs, by name.

  Raises:
    ValueError: if two of them share a name.
  """
  fields = {}
  for field in dataclasses.fields(config_class):
    nested = flat_fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    shared = sorted(fields.keys() & nested.keys())
    if shared:
      raise ValueError(f'{config_class.__name__}: fields {shared} stand in more than one config.')
    fields |= nested
  return fields


def nested_classes(config_class: type) -> list[type]:
  """Returns a config class and the config classes of its fields, outermost first."""
  inner = [nested_classes(f.type) for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(f.type)]
  return [config_class, *(c for classes in inner for c in classes)]


def flat_values(config: Any) -> dict[str, Any]:
  """Returns the values of the fields of a config and of its nested configs, by name."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    values |= flat_values(value) if dataclasses.is_dataclass(field.type) else {field.name: value}
  return values


def replace(config: ConfigT, **values: Any) -> ConfigT:
  """Returns the config with fields replaced by name, those of nested configs too.

  Raises:
    ValueError: if no config has such a field, or a value is not allowed.
  """
  unknown = sorted(values.keys() - flat_fields(type(config)).keys())
  if unknown:
    raise ValueError(f'{type(config).__name__} has no fields {unknown}.')
  changes = {}
  for field in dataclasses.fields(config):
    if dataclasses.is_dataclass(field.type):
      inner = flat_fields(field.type)
      changes[field.name] = replace(getattr(config, field.name), **{k: v for k, v in values.items() if k in inner})
    elif field.name in values:
      changes[field.name] = values[field.name]
  return dataclasses.replace(config, **changes)


def to_json(config: Any) -> str:
  """Returns the config as JSON text."""
  return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False)


def from_json(config_class: type[ConfigT], text: str) -> ConfigT:
  """Reads the config that `to_json` wrote.

  Fields that older versions did not write take the values that reproduce those versions.

  Raises:
    ValueError: if the text is not JSON, a field is unknown, missing or of another type, or a value is not allowed.
  """
  try:
    values = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{config_class.__name__}: not JSON ({error}).') from error
  return from_dict(config_class, values)


def from_dict(config_class: type[ConfigT], values: Any) -> ConfigT:
  """Makes the config of a nested dict; raises as `from_json` does."""
  name = config_class.__name__
  if not isinstance(values, dict):
    raise ValueError(f'{name}: expected a JSON object, got {type(values).__name__}.')
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  missing = fields.keys() - values.keys() - _ADDED
  for problem, names in (('unknown', values.keys() - fields.keys()), ('missing', missing)):
    if names:
      raise ValueError(f'{name}: {problem} fields {sorted(names)}.')
  inner = {key: from_dict(fields[key].type, value) for key, value in values.items()
           if dataclasses.is_dataclass(fields[key].type)}
  older = {key: value for key, value in _OLDER.items() if key in fields}
  return config_class(**older | values | inner)
