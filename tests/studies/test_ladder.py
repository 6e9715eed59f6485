"""Tests climbs on made-up records."""

import json
import shutil

import jax
import numpy as np
import pytest
from checkpoints import SMOKE, noisy, write

from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.checkpoint import CheckpointError
from critkl_jax.studies import catalog, ladder, ladder_page
from critkl_jax.studies.files import interval_text
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.records import Record, run_name, write_record
from critkl_jax.studies.references import references_path
from critkl_jax.studies.study_runs import record_path, run_path
from critkl_jax.training.presets import FINETUNE_PRESETS

BASE = FINETUNE_PRESETS['smoke']
STUDY = catalog.STUDIES['ladder']
PRIORITIZED, STANDARD, _ = STUDY.arms


@pytest.fixture
def plan(tmp_path):
  return Plan(BASE, tmp_path, num_seeds=2)


def finish(plan, arm, seed, accuracy):
  """Writes a record for the next run of a climb."""
  *below, (config, record) = ladder.climb(plan, STUDY, arm, seed)
  assert record is None
  rewards = np.arange(100) < 100 * accuracy
  number = 1 + sum(ladder.reached(record) for _, record in below)
  test = {'N': {'greedy': np.ones(100, bool)}, 'N+1': {'greedy': rewards}}
  about = {'seconds': 60.0, 'test_seconds': 0.0, 'commit': 'abc'}
  record = Record(run_name(config, BASE), config, number, [], test, about)
  write_record(record_path(plan.workdir, record.name), record)
  return record


def keep_params(plan, record):
  params = noisy(gpt2(SMOKE.model).init(jax.random.key(0)), 0.1)
  write(run_path(plan.workdir, record.name) / 'checkpoints', params, 2, training=record.config, known_digits=1)
  return params


def test_what_is_climbed_from_is_made_again_where_its_parameters_are_gone(plan):
  first, second = finish(plan, PRIORITIZED, 0, 0.9), finish(plan, PRIORITIZED, 0, 0.8)
  rungs = [config.reference for config, _ in ladder.climb(plan, STUDY, PRIORITIZED, 0)]
  wanted = lambda: ladder.missing_runs(plan, STUDY)[0].reference
  assert wanted() == rungs[0] == ''
  keep_params(plan, first)
  assert wanted() == rungs[1]  # its reference can be made
  ladder.promote(plan, STUDY, rungs[1])
  shutil.rmtree(run_path(plan.workdir, first.name))
  assert wanted() == rungs[1]  # it is there
  keep_params(plan, second)
  assert wanted() == rungs[2]


def test_a_climb_goes_on_from_its_own_result_until_it_fails(plan):
  assert len(ladder.missing_runs(plan, STUDY)) == 6
  first = finish(plan, PRIORITIZED, 0, 0.9)
  assert first.config.reference == ''
  (_, record), (config, missing) = ladder.climb(plan, STUDY, PRIORITIZED, 0)
  assert record.name == first.name
  assert missing is None
  assert config.reference == 'ladder-prioritized-seed=0-rung=1'
  finish(plan, PRIORITIZED, 0, 0.04)
  assert len(ladder.climb(plan, STUDY, PRIORITIZED, 0)) == 2
  assert len(ladder.missing_runs(plan, STUDY)) == 5
  for _ in range(STUDY.rungs):
    finish(plan, STANDARD, 1, 0.5)
  assert len(ladder.climb(plan, STUDY, STANDARD, 1)) == STUDY.rungs
  assert len(ladder.missing_runs(plan, STUDY)) == 4
  names = [config.reference for config, _ in ladder.climb(plan, STUDY, STANDARD, 1)]
  assert len(set(names)) == STUDY.rungs


def test_a_rung_is_tried_again_as_long_as_it_helps(plan):
  references = lambda: [config.reference.removeprefix('ladder-standard-seed=0-')
                        for config, _ in ladder.climb(plan, STUDY, STANDARD, 0)]
  for accuracy in (0.9, 0.2, 0.26, 0.5):
    finish(plan, STANDARD, 0, accuracy)
  assert references() == ['', 'rung=1', 'rung=2-try=1', 'rung=2-try=2', 'rung=2']
  assert ladder.top(ladder.climb(plan, STUDY, STANDARD, 0)).known == 2
  finish(plan, STANDARD, 0, 0.2)
  keep_params(plan, finish(plan, STANDARD, 0, 0.3))
  assert references()[5:] == ['rung=3-try=1', 'rung=3-try=2']
  ladder.promote(plan, STUDY, 'ladder-standard-seed=0-rung=3-try=2')
  home = references_path(plan.workdir, 'ladder-standard-seed=0-rung=3-try=2') / 'reference'
  assert checkpoint.load_checkpoint(home).info.task.known_digits == 3  # unchanged: the rung was not reached
  finish(plan, STANDARD, 0, 0.34)
  assert len(references()) == 7  # a gain of less than five points
  assert ladder.top(ladder.climb(plan, STUDY, STANDARD, 0)).known == 2


def test_a_result_becomes_a_reference_that_knows_more(plan):
  record = finish(plan, PRIORITIZED, 0, 0.9)
  ladder.promote(plan, STUDY, '')  # not a rung's reference
  with pytest.raises(CheckpointError, match='the parameters of a run are gone'):
    ladder.promote(plan, STUDY, 'ladder-prioritized-seed=0-rung=1')
  params = keep_params(plan, record)
  for _ in range(2):  # the second time it is there
    ladder.promote(plan, STUDY, 'ladder-prioritized-seed=0-rung=1')
  found = checkpoint.load_checkpoint(references_path(plan.workdir, 'ladder-prioritized-seed=0-rung=1') / 'reference')
  assert found.info.task.known_digits == 2
  np.testing.assert_array_equal(found.params['wte']['embedding'], params['wte']['embedding'])


def test_results_and_page(plan):
  for seed in (0, 1):
    finish(plan, PRIORITIZED, seed, 0.9)
    finish(plan, PRIORITIZED, seed, 0.6 - 0.4 * seed)
    finish(plan, STANDARD, seed, 0.02)
  finish(plan, PRIORITIZED, 1, 0.22)  # the second seed ends here
  kept = {ladder.climb(plan, STUDY, PRIORITIZED, 1)[0][1].name: [
      {'digits': 1, 'accuracy': 0.75, 'num_problems': 8}, {'digits': 2, 'accuracy': 0.0, 'num_problems': 8}]}
  found = ladder.ladder_results(plan, STUDY, kept)
  assert found['num_missing'] == 3  # one prioritized climb continues; those without a penalty have not begun
  assert found['arms']['prioritized']['reached'][0] == pytest.approx((3 + 2) / 2)
  assert found['arms']['standard']['reached'][0] == 1
  assert found['arms']['prioritized']['retained'][0] == 0.75
  assert found['arms']['standard']['retained'] is None
  (row,) = found['contrasts']
  assert (row['arm'], row['against'], row['difference'][0]) == ('prioritized', 'standard', 1.5)
  (rung,) = row['rungs']  # standard climbs did not try the second rung
  assert (rung['digits'], rung['seeds']) == (2, [0, 1])
  assert rung['difference'][0] == pytest.approx(0.88)
  assert ladder_page.ladder_verdict(row).startswith(  # two pairs are too few
      '**prioritized** is not shown to climb higher than **standard**: +1.50 digits, 2 pairs; on 2 digits, ')
  assert ladder_page.ladder_verdict(row | {'difference': (1.5, 0.5, 2.5)}) == (
      '**prioritized** climbs higher than **standard**: +1.50 [+0.50, +2.50] digits, 2 pairs; on 2 digits, the most '
      f'that both tried, {interval_text(rung["difference"], "+.1f", 100)} points, 2 pairs.')
  assert ladder_page.ladder_verdict(row | {'difference': (0.5, -0.5, 1.0)}).startswith(
      '**prioritized** is not shown to climb higher than **standard**')
  home = ladder_page.write_ladder(STUDY, plan, found)
  text = (home / 'README.md').read_text()
  assert '3 climbs are not at their end' in text
  assert '2: 90 3: 60; 2: 90 3: 20 3: 22' in text
  assert '| prioritized | standard | 2 | 2 | +88.0 |' in text
  assert 'Fewer than 4 seeds have no interval' in text
  assert (home / 'climbs.png').read_bytes().startswith(b'\x89PNG')
  json.loads((home / 'results.json').read_text())
