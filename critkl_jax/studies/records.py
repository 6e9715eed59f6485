"""Records of a study's runs: named by their config, stored as one JSON file each."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from critkl_jax.config import differences, from_dict
from critkl_jax.runtime import storage
from critkl_jax.runtime.checkpoint import CheckpointError
from critkl_jax.training.config import FinetuneConfig

# Records are found by the names of their runs, so the order of the fields in a name is fixed, whatever their order in
# the config.
_ORDER = (
    'algorithm', 'clip_ratio', 'value_clip', 'value_coefficient', 'entropy_coefficient', 'temperature', 'kl',
    'kl_estimator', 'kl_placement', 'kl_coefficient', 'certainty', 'certainty_exponent', 'certainty_intercept',
    'certainty_temperature', 'kl_gate', 'gate_threshold', 'gate_fraction', 'reference', 'certainty_ensemble',
    'extra_digits', 'num_iterations', 'episodes', 'episodes_per_problem', 'epochs', 'minibatches', 'learning_rate',
    'max_grad_norm', 'max_skipped', 'wrong_reward', 'advantage', 'whiten_advantages', 'discount', 'gae_lambda',
    'bootstrap_truncated', 'critic_warmup', 'value_head', 'value_head_detached', 'dtype', 'attention', 'remat',
    'scan_layers', 'rollout', 'window')
_UNNAMED = ('seed', 'save_every', 'eval_problems')
_RELEASED = 'algorithm=a2c-entropy_coefficient=0.001-temperature=2-kl=standard{}-wrong_reward=-1-advantage=gae-' + (
    'gae_lambda=0.95-value_head=mlp')
# A name from the time when a standard penalty could have a certainty temperature.
_KEPT_NAMES = {_RELEASED.format(''): _RELEASED.format('-certainty_temperature=4')}


class RecordError(CheckpointError):
  """Raised for a record that cannot be used; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Record:
  """The stored results of a finished run, or of a reference.

  Attributes:
    name: `run_name` of its config; a reference's own name.
    config: config of its training; None for a reference.
    known: N of its reference.
    metrics: a row for each iteration with the metrics of `make_train_step` and of the probe; empty for a reference.
    test: a member's result of `measures.make_members_test`: for `N` and `N+k` a dict with `greedy` and `sampled` (NumPy
      bool `[B]`) and several numbers; for `N+k` also `critical_probability` (NumPy float64).
    about: how it was made: `seconds` of training and `test_seconds` (a member's share of the program's time), `commit`,
      `device`, `versions`.
  """

  name: str
  config: FinetuneConfig | None
  known: int
  metrics: list[dict[str, float]]
  test: dict[str, dict[str, Any]]
  about: dict[str, Any]

  @property
  def longer(self) -> dict[str, Any]:
    """The test on N + k."""
    return next(own for name, own in self.test.items() if name != 'N')

  @property
  def paid(self) -> float:
    """The weighted KL over the exact KL, both summed over iterations: the effective coefficient without
    `kl_coefficient`; NaN if the policy never left its reference."""
    with np.errstate(divide='ignore', invalid='ignore'):
      penalty = self.column('kl_penalty' if 'kl_penalty' in self.metrics[0] else 'weighted_kl')  # its older name
      return float(np.sum(penalty) / np.sum(self.column('kl')))

  def column(self, metric: str) -> np.ndarray:
    """Returns a metric over the iterations, float64; NaN where it is missing or not finite."""
    return np.array([np.nan if row.get(metric) is None else row[metric] for row in self.metrics], np.float64)


def run_name(config: FinetuneConfig, base: FinetuneConfig) -> str:
  """Names a run by its differences from `base` and its seed, as in `kl=standard-seed=0`.

  Fields without influence on the results are left out: how often to save, number of evaluation problems.
  """
  own = {name: value for name, value in differences(config, base).items() if name not in _UNNAMED}
  parts = [f'{name}={_text(own[name])}' for name in sorted(own, key=_place)]
  name = '-'.join(parts)
  return '-'.join([*filter(None, [_KEPT_NAMES.get(name, name)]), f'seed={config.seed}'])


def _place(name):
  return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _text(value):
  return f'{value:.6g}' if isinstance(value, float) else str(value).replace('/', '.')


def write_record(path: pathlib.Path, record: Record) -> None:
  """Writes a record as JSON: numbers with six digits, rewards as text of 0 and 1, probabilities with four decimals.

  Each metric is one line with its values over the iterations; see `storage.to_json_text`.
  """
  values = {
      'name': record.name, 'known': record.known, 'about': record.about,
      'config': None if record.config is None else dataclasses.asdict(record.config),
      'test': {digits: {name: _plain(x) for name, x in own.items()} for digits, own in record.test.items()},
      'metrics': {name: [_number(row.get(name)) for row in record.metrics] for name in _names(record.metrics)}}
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, values)


def read_record(path: pathlib.Path) -> Record:
  """Reads a record written by `write_record`.

  Raises:
    RecordError: if the file is missing or is not a record.
  """
  try:
    values = json.loads(path.read_text())
    config = None if values['config'] is None else from_dict(FinetuneConfig, values['config'])
    columns = values['metrics']
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    test = {digits: {name: _array(x) for name, x in own.items()} for digits, own in values['test'].items()}
    known = values['known'] if 'known' in values else values['known_digits']  # its older name
    return Record(values['name'], config, known, rows, test, values['about'])
  except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
    raise RecordError(f'{path}: not a record of a run ({error}); remove it, and the run is made again.') from error


def _names(rows):
  return list(dict.fromkeys(name for row in rows for name in row))


def _plain(value):
  if not isinstance(value, np.ndarray):
    return _number(value)
  if value.dtype == bool:
    return ''.join('1' if one else '0' for one in value)
  return ' '.join(f'{one:.4f}' for one in value)


def _array(value):
  if isinstance(value, str) and set(value) <= {'0', '1'}:
    return np.array([bit == '1' for bit in value])
  if isinstance(value, str):
    return np.array(value.split(), np.float64)
  return math.nan if value is None else value


def _number(value):
  if value is None or not math.isfinite(value):
    return None
  return value if isinstance(value, int) else float(f'{value:.6g}')
