import dataclasses
import json
import math

import numpy as np
import pytest

from critkl_jax.config import replace
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.studies.records import Record, RecordError, read_record, run_name, write_record

BASE = FINETUNE_PRESETS['smoke']


def record(config=BASE, **changes):
  values = {'name': run_name(config, BASE), 'config': config, 'known_digits': 1,
            'metrics': [{'step': 1, 'accuracy': 0.25, 'kl_critical': math.nan}, {'step': 2, 'accuracy': 1 / 3}],
            'test': {'N': {'greedy': np.array([True, False, True]), 'format_errors': 0.5, 'kl_critical': math.nan,
                           'critical_probability': np.array([1.0, 0.12345, math.nan])}},
            'about': {'seconds': 1.5, 'commit': 'abc', 'signatures': ['drift']}}
  return Record(**(values | changes))


def test_a_record_is_read_as_it_was_written(tmp_path):
  path = tmp_path / 'runs' / 'one.json'
  write_record(path, record())
  found = read_record(path)
  assert (found.name, found.config, found.known_digits, found.about) == (
      'seed=0', BASE, 1, record().about)
  np.testing.assert_array_equal(found.test['N']['greedy'], [True, False, True])
  np.testing.assert_allclose(found.test['N']['critical_probability'], [1, 0.1234, math.nan], atol=1e-4)
  assert found.test['N']['format_errors'] == 0.5
  assert math.isnan(found.test['N']['kl_critical'])
  np.testing.assert_allclose(found.column('accuracy'), [0.25, 0.333333])
  assert np.isnan(found.column('kl_critical')).all()
  assert np.isnan(found.column('unknown')).all()
  json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
  write_record(path, dataclasses.replace(record(), config=None, name='base'))
  assert read_record(path).config is None


@pytest.mark.parametrize('text', ['', '{', '[]', '{"name": "x"}', 'null'])
def test_damaged_records_are_named(tmp_path, text):
  path = tmp_path / 'one.json'
  path.write_text(text)
  with pytest.raises(RecordError, match=r'one\.json: not a record of a run'):
    read_record(path)


def test_names_say_what_differs():
  assert run_name(BASE, BASE) == 'seed=0'
  assert run_name(replace(BASE, certainty_exponent=10.0, seed=3), BASE) == 'certainty_exponent=10-seed=3'
  assert run_name(replace(BASE, reference='known_digits=3', kl_gate='oracle'), BASE) == (
      'kl_gate=oracle-reference=known_digits=3-seed=0')
  for same in ({'certainty_exponent': 10.0}, {'certainty': 'max_prob'}, {'save_every': 9}, {'eval_problems': 7}):
    assert run_name(replace(BASE, kl='standard', **same), BASE) == 'kl=standard-seed=0'
  assert run_name(replace(BASE, kl='none', kl_coefficient=9.0), BASE) == 'kl=none-seed=0'
  assert run_name(replace(BASE, kl='standard', kl_coefficient=0.48912345), BASE) == (
      'kl=standard-kl_coefficient=0.489123-seed=0')
