import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from critkl_jax.config import replace
from critkl_jax.runtime import storage
from critkl_jax.studies import catalog
from critkl_jax.studies.records import Record, RecordError, read_record, run_name, write_record
from critkl_jax.training.presets import FINETUNE_PRESETS

BASE = FINETUNE_PRESETS['smoke']
ROOT = pathlib.Path(__file__).parents[2]


def record(config=BASE, **changes):
  values = {'name': run_name(config, BASE), 'config': config, 'known': 1,
            'metrics': [{'step': 1, 'accuracy': 0.25, 'kl_critical': math.nan}, {'step': 2, 'accuracy': 1 / 3}],
            'test': {'N': {'greedy': np.array([True, False, True]), 'format_errors': 0.5, 'kl_critical': math.nan,
                           'critical_probability': np.array([1.0, 0.12345, math.nan])}},
            'about': {'seconds': 1.5, 'commit': 'abc', 'signatures': ['drift']}}
  return Record(**(values | changes))


def test_a_record_is_read_as_it_was_written(tmp_path):
  path = tmp_path / 'runs' / 'one.json'
  write_record(path, record())
  found = read_record(path)
  assert (found.name, found.config, found.known, found.about) == (
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


def test_a_record_has_a_line_for_each_metric(tmp_path):
  rows = [{'step': i, 'accuracy': i / 3, 'kl': 1e-7 * i} for i in range(40)]
  write_record(tmp_path / 'one.json', record(metrics=rows))
  lines = (tmp_path / 'one.json').read_text().splitlines()
  assert [line.split(':')[0] for line in lines[-6:-2]] == [' "metrics"', '  "step"', '  "accuracy"', '  "kl"']
  assert lines[-4].startswith('  "accuracy": [0.0, 0.333333, 0.666667, 1.0, ')
  assert len(lines) < 40
  # Records that differ in one number differ in one line.
  rows[7]['kl'] = 0.5
  write_record(tmp_path / 'two.json', record(metrics=rows))
  changed = [one != two for one, two in zip(lines, (tmp_path / 'two.json').read_text().splitlines(), strict=True)]
  assert sum(changed) == 1


def test_a_record_of_an_older_layout_is_read(tmp_path):
  write_record(tmp_path / 'new.json', record())
  values = json.loads((tmp_path / 'new.json').read_text())
  values['known_digits'] = values.pop('known')  # its older name
  (tmp_path / 'old.json').write_text(json.dumps(values, indent=1) + '\n')  # one number per line, the older format
  new, old = (read_record(tmp_path / name) for name in ('new.json', 'old.json'))
  assert (old.name, old.config, old.known, old.about) == (new.name, new.config, new.known, new.about)
  np.testing.assert_equal((old.metrics, old.test), (new.metrics, new.test))


def test_the_results_in_the_repository_have_the_layout_in_which_they_are_written():
  files = list((pathlib.Path(__file__).parents[2] / 'results').glob('**/*.json'))
  for path in files:
    text = path.read_text()
    assert text == storage.to_json_text(json.loads(text)) + '\n', path


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
  for same in ({'save_every': 9}, {'eval_problems': 7}):
    assert run_name(replace(BASE, kl='standard', **same), BASE) == 'kl=standard-seed=0'
  for base in (replace(BASE, certainty_exponent=10.0), replace(BASE, certainty='max_prob')):
    assert run_name(replace(base, kl='standard'), base) == 'kl=standard-seed=0'
  base = replace(BASE, kl_coefficient=9.0)
  assert run_name(replace(base, kl='none'), base) == 'kl=none-seed=0'
  assert run_name(replace(BASE, kl='standard', kl_coefficient=0.48912345), BASE) == (
      'kl=standard-kl_coefficient=0.489123-seed=0')


def test_every_kept_run_is_found_by_the_name_of_its_config():
  base, names = FINETUNE_PRESETS['tiny'], set()
  for path in sorted((ROOT / 'results' / 'tiny' / 'runs').glob('*.json')):
    found = read_record(path)
    names.add(path.stem)
    assert path.stem == found.name == run_name(found.config, base)
  assert len(names) > 300


def test_every_arm_has_the_runs_that_were_made_for_it():
  for study in catalog.STUDIES.values():
    preset = {'addition': 'tiny', 'stories': 'stories'}[study.task]
    base, kept = FINETUNE_PRESETS[preset], {path.stem for path in (ROOT / 'results' / preset / 'runs').glob('*.json')}
    for arm in study.arms:
      if not arm.matches and study.reads == 'runs' and study.name != 'large_steps':
        assert run_name(catalog.arm_config(base, arm, 0), base) in kept, (study.name, arm.label)
