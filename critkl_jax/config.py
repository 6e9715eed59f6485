"""Checks configs, which are frozen dataclasses, reads their fields by name, and converts them to and from JSON.

Errors name the field, the expected values and the value given.

The table `COUNTS_WITH` of a config class lists fields that have an effect only with certain values of other fields:
`{'clip_ratio': {'algorithm': ('ppo',)}}`. Such a field counts if at least one of the other fields has a listed value.
Otherwise it is switched off: it must have its default, and comparisons of configs ignore it.
"""

import dataclasses
import difflib
import json
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

ConfigT = TypeVar('ConfigT')

LARGEST_INT = 2**31 - 1  # the largest int32
LARGEST_SEED = 2**32 - 1  # JAX's keys ignore higher bits, so two larger seeds could give the same run
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # float32: largest, and smallest normal number
_KINDS = {int: 'a whole number', float: 'a real number', bool: 'True or False', str: 'text'}

_LEFT_LOSS = ('kl_placement', 'kl_gate', 'gate_threshold', 'gate_fraction')  # fields of `loss` in older checkpoints
_ADDED = {'rollout', 'window', 'scan_layers', 'kl_gate', 'gate_threshold', 'gate_fraction', 'wrong_reward',
          'certainty_ensemble', 'max_skipped', 'bootstrap_truncated', 'hidden_only',
          'max_to_keep', 'task', 'pad_vocabulary', 'clip_ratio_high', 'dual_clip', 'ratio', 'aggregation',
          'aggregation_length', 'architecture', 'addition', 'text', 'stories', 'reward', 'reward_weights',
          'reward_workers', 'reward_seconds', 'success', 'dataset_options', 'asks'}  # older checkpoints lack these
_OLDER = {'hidden_only': False}  # values for older checkpoints that are not today's defaults
_MOVED = ('known_digits', 'extra_digits', 'wrong_reward')  # fields of older checkpoints that are in `addition` now


# Checks.


def convert_fields(config: Any, **most: int) -> None:
  """Converts the values of a frozen config, such as NumPy and JAX scalars and paths, to the types of their fields.

  Args:
    config: converted in place; call this in its `__post_init__`.
    **most: the greatest whole number allowed, by field name; `LARGEST_INT` for the other fields.

  Raises:
    ValueError: if a value has another type (a bool or a float is no whole number), is not finite, or does not fit
      int32 or float32.
  """
  for field in dataclasses.fields(config):
    value = _convert(field.name, field.type, getattr(config, field.name), most.get(field.name, LARGEST_INT))
    object.__setattr__(config, field.name, value)


def _convert(name, kind, value, most):
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, kind):
      raise ValueError(f'{name}: expected a {kind.__name__}, got {value!r}.')
    return value
  found = _as_python(value)
  wanted = (float, int) if kind is float else kind
  if not isinstance(found, wanted) or (isinstance(found, bool) and kind is not bool):
    raise ValueError(f'{name}: expected {_KINDS[kind]}, got {value!r}.')
  if kind is int and abs(found) > most:
    raise ValueError(f'{name}: expected a whole number up to {most}, got {_shown(found)}.')
  if kind is float and not (found == 0 or SMALLEST_FLOAT <= abs(found) <= LARGEST_FLOAT):
    raise ValueError(f'{name}: expected a finite number that float32 holds (0, or {SMALLEST_FLOAT:g} to '
                     f'{LARGEST_FLOAT:g} in size), got {_shown(found)}.')
  return kind.__str__(found) if kind is str else kind(found)  # the value of a subclass, such as an enumeration


def _as_python(value):
  """Converts a NumPy or JAX scalar, or a path, to a Python type; returns anything else unchanged."""
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if getattr(value, 'ndim', None) != 0 or not hasattr(value, 'item'):
    return value
  try:
    found = value.item()
  except (TypeError, ValueError):  # a key, or an array that is being traced
    return value
  return float(found) if isinstance(found, numbers.Real) and not isinstance(found, int) else found


def _shown(number):
  return f'a number of {number.bit_length()} bits' if isinstance(number, int) and number.bit_length() > 128 else number


def one_of(config: Any, name: str, *options: str) -> None:
  """Raises ValueError unless the field's value is in `options`; the message suggests the nearest option."""
  value = getattr(config, name)
  if value not in options:
    raise ValueError(f'{name}: expected one of {options}, got {value!r}; the nearest is {nearest(value, options)!r}.')


def at_least(config: Any, least: float, *names: str) -> None:
  """Raises ValueError unless each named field is at least `least`."""
  for name in names:
    if not getattr(config, name) >= least:
      raise ValueError(f'{name}: expected {least} or more, got {getattr(config, name)}.')


def positive(config: Any, *names: str) -> None:
  """Raises ValueError unless each named field is greater than 0."""
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}: expected a positive number, got {getattr(config, name)}.')


def other_than(config: Any, name: str, refused: float, reason: str) -> None:
  """Raises ValueError if the field equals `refused`; the message gives the reason."""
  if getattr(config, name) == refused:
    raise ValueError(f'{name}: expected another number than {refused}: {reason}.')


def between(config: Any, least: float, most: float, *names: str) -> None:
  """Raises ValueError unless each named field lies in `least` to `most`, both included."""
  for name in names:
    if not least <= getattr(config, name) <= most:
      raise ValueError(f'{name}: expected {least} to {most}, got {getattr(config, name)}.')


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns the entry of `names` with the initials `name` (`lr` finds `learning_rate`), else the nearest spelling."""
  names = list(names)
  initials = [other for other in names if '_' in other and name == ''.join(word[:1] for word in other.split('_'))]
  return (initials or difflib.get_close_matches(name, names, 1, 0.0))[0]


def refuse_switched_off(config: Any) -> None:
  """Raises ValueError if a field that another field switches off differs from its default.

  Call it last in `__post_init__`, after the checks of single values.
  """
  fields, values = flat_fields(type(config)), flat_values(config)
  for name, reason in switched_off(type(config), values).items():
    if values[name] != fields[name].default:
      raise ValueError(_not_read(name, values[name], reason))


def _not_read(name, value, reason):
  return f'{name}: has no effect with {reason[0]}, got {value!r}; leave it out, or set {reason[1]}.'


# Views and JSON.


def rules_of(config_class: type) -> dict[str, dict[str, tuple[Any, ...]]]:
  """Merges the `COUNTS_WITH` tables of a config, its bases and its nested configs; outer rules replace nested ones."""
  table = {}
  for field in dataclasses.fields(config_class):
    table |= rules_of(field.type) if dataclasses.is_dataclass(field.type) else {}
  for owner in reversed(config_class.__mro__):
    table |= vars(owner).get('COUNTS_WITH', {})
  return table


def switched_off(config_class: type, values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
  """Finds the fields that other fields switch off.

  Args:
    config_class: the config class.
    values: the value of each field, nested fields included; a switched-off field is treated as if it had its default.

  Returns:
    For each such field, name -> (current settings that switch it off, settings that would switch it on), as text.
  """
  table, defaults = rules_of(config_class), flat_fields(config_class)

  def effective(name):
    return values[name] if counts(name) else defaults[name].default

  def counts(name):
    return name not in table or any(effective(other) in allowed for other, allowed in table[name].items())

  def reason(name):
    now = ' and '.join(f'{other}={effective(other)!r}' for other in table[name])
    wanted = ' or '.join(f'{other}={value!r}' for other, allowed in table[name].items() for value in allowed)
    return now, wanted

  return {name: reason(name) for name in table if not counts(name)}


def counting_values(config: Any) -> dict[str, Any]:
  """Returns the values of all fields that are not switched off, nested configs included."""
  values = flat_values(config)
  off = switched_off(type(config), values)
  return {name: value for name, value in values.items() if name not in off}


def differences(config: ConfigT, usual: ConfigT) -> dict[str, Any]:
  """Returns the values in `config` of the fields that are not switched off and differ from `usual`."""
  others = flat_values(usual)
  return {name: value for name, value in counting_values(config).items() if value != others[name]}


def flat_fields(config_class: type) -> dict[str, dataclasses.Field]:
  """Returns the fields of a config class and its nested configs, by name.

  Raises:
    ValueError: if two fields share a name.
  """
  fields = {}
  for field in dataclasses.fields(config_class):
    nested = flat_fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    shared = sorted(fields.keys() & nested.keys())
    if shared:
      raise ValueError(f'{config_class.__name__}: fields {shared} are defined in more than one config.')
    fields |= nested
  return fields


def classes_of(config_class: type) -> list[type]:
  """Returns a config class, its bases and the config classes of its fields, outermost first."""
  inner = [classes_of(f.type) for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(f.type)]
  own = [owner for owner in config_class.__mro__ if dataclasses.is_dataclass(owner)]
  return [*own, *(c for classes in inner for c in classes)]


def flat_values(config: Any) -> dict[str, Any]:
  """Returns the field values of a config and its nested configs, by name."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    values |= flat_values(value) if dataclasses.is_dataclass(field.type) else {field.name: value}
  return values


def replace(config: ConfigT, **values: Any) -> ConfigT:
  """Returns the config with fields replaced by name, nested fields included.

  A field that the new values switch off is reset to its default.

  Raises:
    ValueError: if a field is unknown, a value is not allowed, or a named field is switched off.
  """
  fields = flat_fields(type(config))
  unknown = sorted(values.keys() - fields.keys())
  if unknown:
    raise ValueError(f'{type(config).__name__} has no fields {unknown}.')
  given = {name: _convert(name, fields[name].type, value, LARGEST_SEED) for name, value in values.items()}
  values = flat_values(config) | given
  found, off = _made_of(type(config), values)
  for name, reason in off.items():
    if name in given:
      raise ValueError(_not_read(name, values[name], reason))
  return found


def reset(config: ConfigT, *names: str) -> ConfigT:
  """Returns the config with the named fields, and all fields that are then switched off, reset to their defaults."""
  fields = flat_fields(type(config))
  return _made_of(type(config), flat_values(config) | {name: fields[name].default for name in names})[0]


def _made_of(config_class, values):
  """Builds a config from values by name, switched-off fields reset; returns it and the `switched_off` table."""
  off, fields = switched_off(config_class, values), flat_fields(config_class)

  def make(owner, values):
    return owner(**{f.name: make(f.type, values) if dataclasses.is_dataclass(f.type) else values[f.name]
                    for f in dataclasses.fields(owner)})

  return make(config_class, {**values, **{name: fields[name].default for name in off}}), off


def to_json(config: Any) -> str:
  """Serializes the config to JSON text."""
  return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False)


def from_json(config_class: type[ConfigT], text: str) -> ConfigT:
  """Parses the config that `to_json` wrote.

  Fields that an older version did not write get the values that reproduce its behaviour.

  Raises:
    ValueError: if the text is not JSON, a field is unknown, missing or of another type, or a value is not allowed.
  """
  try:
    values = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{config_class.__name__}: not JSON ({error}).') from error
  return from_dict(config_class, values)


def from_dict(config_class: type[ConfigT], values: Any) -> ConfigT:
  """Builds a config from a nested dict, resetting fields that are switched off; raises as `from_json` does."""
  return _made_of(config_class, _flat_dict(config_class, values))[0]


def _flat_dict(config_class, values):
  """Checks the keys of a nested dict and returns all its values by field name."""
  name = config_class.__name__
  if not isinstance(values, dict):
    raise ValueError(f'{name}: expected a JSON object, got {type(values).__name__}.')
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  values = _of_today(fields, values)
  for problem, names in (('unknown', values.keys() - fields.keys()), ('missing', fields.keys() - values.keys())):
    if names:
      raise ValueError(f'{name}: {problem} fields {sorted(names)}.')
  flat = {}
  for key, value in values.items():
    kind = fields[key].type
    flat |= _flat_dict(kind, value) if dataclasses.is_dataclass(kind) else {
        key: _convert(key, kind, value, LARGEST_SEED)}
  return flat


def _of_today(fields: dict[str, dataclasses.Field], values: dict[str, Any]) -> dict[str, Any]:
  """Upgrades the values of an older checkpoint to the current fields.

  Moves fields to their current config, and adds missing ones with the value that reproduces the older version.
  """
  values = _with_moved(dict(values)) if 'addition' in fields else dict(values)
  if isinstance(values.get('loss'), dict) and 'kl_gate' in fields:
    values['loss'] = dict(values['loss'])
    values |= {name: values['loss'].pop(name) for name in _LEFT_LOSS if name in values['loss']}
  added = {name: _OLDER.get(name, fields[name].default) for name in _ADDED & fields.keys()}
  return {name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x for name, x in added.items()} | values


def _with_moved(values):
  """Moves the settings of addition, in older checkpoints at the top or in `task`, into `addition`."""
  addition = {name: values.pop(name) for name in _MOVED if name in values}
  if isinstance(values.get('task'), dict):
    addition |= values.pop('task')
  return {'addition': addition} | values if addition else values
