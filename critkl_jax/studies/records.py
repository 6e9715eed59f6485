"""Runs of a study: named by their config, and kept as one file of JSON each."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from critkl_jax import storage
from critkl_jax.checkpoint import CheckpointError
from critkl_jax.config import FinetuneConfig, flat_values, from_dict


class RecordError(CheckpointError):
  """A record that cannot be used; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Record:
  """What is kept of a finished run, enough for every study.

  Attributes:
    name: `run_name` of its config; of a reference, its own name.
    config: what it was trained with; None of a reference.
    known_digits: N of its reference.
    metrics: rows of `make_train_step`'s metrics, with the probe's, an iteration each; of a reference none.
    test: of `measures.make_test`: for `N` and `N+k` a dict of rewards (`greedy`, `sampled`, NumPy bool `[B]`), of
      numbers, and for `N+k` of `critical_probability`, NumPy float64 `[B]`.
    about: how it came about: `seconds` of training and `test_seconds` (a member's share of the program's time),
      `commit`, `device`, `versions`.
  """

  name: str
  config: FinetuneConfig | None
  known_digits: int
  metrics: list[dict[str, float]]
  test: dict[str, dict[str, Any]]
  about: dict[str, Any]

  @property
  def longer(self) -> dict[str, Any]:
    """The test of N + k digits."""
    return next(own for name, own in self.test.items() if name != 'N')

  @property
  def paid(self) -> float:
    """The penalty before its coefficient over the exact KL, both summed over iterations: what is paid for a nat; not a
    number if the policy never left its reference."""
    with np.errstate(divide='ignore', invalid='ignore'):
      return float(np.sum(self.column('weighted_kl')) / np.sum(self.column('kl')))

  def column(self, metric: str) -> np.ndarray:
    """Returns a metric over the iterations, float64; NaN where it is missing or was not a number."""
    return np.array([np.nan if row.get(metric) is None else row[metric] for row in self.metrics], np.float64)


def run_name(config: FinetuneConfig, base: FinetuneConfig) -> str:
  """Returns the name of a run: what differs from `base`, and the seed, as in `kl=standard-seed=0`.

  Fields that change no number have no part in it: how often is saved, problems of a test that is another's.
  """
  own, usual = flat_values(config), flat_values(base)
  if own['kl'] != 'prioritized':  # its weight is not looked at
    own |= {name: usual[name] for name in ('certainty_exponent', 'certainty_intercept', 'certainty')}
  if own['kl'] == 'none':
    own['kl_coefficient'] = usual['kl_coefficient']
  ignored = ('seed', 'save_every', 'eval_problems')
  parts = [f'{name}={_text(value)}' for name, value in own.items() if value != usual[name] and name not in ignored]
  return '-'.join([*parts, f'seed={config.seed}'])


def _text(value):
  return f'{value:.6g}' if isinstance(value, float) else str(value).replace('/', '.')


def write_record(path: pathlib.Path, record: Record) -> None:
  """Writes a record as JSON: numbers with six digits, rewards as text of 0 and 1, probabilities with four decimals."""
  values = {
      'name': record.name, 'known_digits': record.known_digits, 'about': record.about,
      'config': None if record.config is None else dataclasses.asdict(record.config),
      'test': {digits: {name: _plain(x) for name, x in own.items()} for digits, own in record.test.items()},
      'metrics': {name: [_number(row.get(name)) for row in record.metrics] for name in _names(record.metrics)}}
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, values, indent=1)


def read_record(path: pathlib.Path) -> Record:
  """Reads what `write_record` wrote.

  Raises:
    RecordError: if the file is missing or is no record.
  """
  try:
    values = json.loads(path.read_text())
    config = None if values['config'] is None else from_dict(FinetuneConfig, values['config'])
    columns = values['metrics']
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    test = {digits: {name: _array(x) for name, x in own.items()} for digits, own in values['test'].items()}
    return Record(values['name'], config, values['known_digits'], rows, test, values['about'])
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
