"""Tests that studies recover the results that were put into made-up records."""

import json
import math
import re

import jax
import numpy as np
import pytest
from checkpoints import SMOKE, write

from critkl_jax.models.gpt2 import gpt2
from critkl_jax.studies import catalog, page, results
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.records import Record, RecordError, read_record, run_name, write_record
from critkl_jax.studies.study_runs import next_group, record_path
from critkl_jax.training.presets import FINETUNE_PRESETS

BASE = FINETUNE_PRESETS['smoke']
STUDY = catalog.STUDIES['matched_weight']
MATCHED = 'uniform, of equal mean weight'
PROBLEMS = 64


def made_up(config, greedy, sampled, weight=0.8, lifted=0.1, paid=0.4, critical=0.9, kl_critical=0.1):
  rng = np.random.default_rng(config.seed)
  rewards = lambda p: rng.permutation(PROBLEMS) < p * PROBLEMS
  own = {'greedy': rewards(greedy), 'sampled': rewards(sampled), 'format_errors': 0.0,
         'kl_critical': kl_critical,
         'kl_other': 0.01, 'critical_probability': np.full(PROBLEMS, critical)}
  known = {name: value for name, value in own.items() if name != 'critical_probability'}
  known |= {'greedy': rewards(1.0), 'kl_critical': float('nan')}
  metrics = [{'step': i + 1, 'accuracy': a, 'kl': 0.01, 'weighted_kl': paid * 0.01,
              'weight': weight, 'weight_critical': weight - lifted * (i + 1),
              'critical/first_comma': 0.9 + 0.02 * i, 'critical/probability': 0.5}
             for i, a in enumerate((0.25, 0.75, 0.75))]
  about = {'seconds': 10.0, 'test_seconds': 5.0, 'commit': 'abc', 'device': 'cpu'}
  return Record(run_name(config, BASE), config, 1, metrics, {'N': known, 'N+1': own}, about)


@pytest.fixture
def plan(tmp_path):
  return Plan(BASE, tmp_path)


def make(plan, label, seeds, **values):
  arm = next(arm for arm in STUDY.arms if arm.label == label)
  for seed in seeds:
    config = plan.config(STUDY, arm, seed)
    record = made_up(config, **values)
    write_record(record_path(plan.workdir, record.name), record)


def references():
  return {'': Record('base', None, 1, [], made_up(BASE, 0.5, 0.5).test, {})}


def test_what_is_missing_and_what_follows_from_it(plan):
  assert plan.number_missing(STUDY) == 40
  assert [run_name(c, BASE) for c in plan.missing([STUDY])][:4] == ['seed=0', 'kl=standard-seed=0', 'kl=none-seed=0',
                                                                   'seed=1']
  assert len(plan.missing([STUDY])) == 24  # configs of matched arms are not known yet
  make(plan, 'prioritized', [0], greedy=0.75, sampled=0.75)
  assert 'kl=standard-kl_coefficient=0.4-seed=0' in [run_name(c, BASE) for c in plan.missing([STUDY])]  # 0.5 x 0.8
  assert plan.number_missing(STUDY) == 39
  assert len(plan.missing([STUDY, catalog.STUDIES['drift']])) == 24  # the studies share their runs
  make(plan, 'standard', [0], greedy=0.75, sampled=0.75, weight=1.0, paid=1.25)
  assert 'kl=standard-kl_coefficient=0.16-seed=0' in [run_name(c, BASE) for c in plan.missing([STUDY])]  # 0.4 / 1.25
  assert plan.seconds_per_run() == 15


def test_what_follows_from_a_run_that_paid_nothing_is_not_known(plan):
  make(plan, 'prioritized', [0], greedy=0.75, sampled=0.75, paid=0.0)
  make(plan, 'standard', [0], greedy=0.75, sampled=0.75, paid=0.0)
  arm = next(arm for arm in STUDY.arms if arm.by == 'penalty')
  assert plan.config(STUDY, arm, 0) is None
  assert plan.number_missing(STUDY) == 38


def test_a_record_of_another_run_is_refused(plan):
  make(plan, 'prioritized', [0], greedy=0.75, sampled=0.75)
  (plan.workdir / 'runs' / 'seed=0.json').rename(plan.workdir / 'runs' / 'seed=1.json')
  with pytest.raises(RecordError, match=r'seed=1\.json: of another run \(seed=0\)'):
    plan.missing([STUDY])


def test_groups_share_a_program_and_those_under_way_come_first(plan):
  study = catalog.STUDIES['ablation']
  missing = plan.missing([study])
  group = next_group(missing, BASE, plan.workdir, 5, 2)
  assert [run_name(c, BASE) for c in group] == ['seed=0', 'kl=standard-seed=0', 'seed=1', 'kl=standard-seed=1']
  assert {c.kl_gate for c in next_group(missing, BASE, plan.workdir, 100, 1)} == {'none'}
  assert len(next_group(missing[:1], BASE, plan.workdir, 16, 2)) == 1  # one is left for two devices
  under_way = plan.workdir / 'working' / 'groups' / 'a' / 'members.json'
  under_way.parent.mkdir(parents=True)
  under_way.write_text(json.dumps(['kl=standard-kl_gate=random-seed=3']))
  assert [c.kl_gate for c in next_group(missing, BASE, plan.workdir, 5, 2)] == ['random']
  under_way.write_text(json.dumps(['of another study-seed=3']))
  assert len(next_group(missing, BASE, plan.workdir, 5, 2)) == 4


def test_a_group_that_was_stopped_goes_on_whole_if_one_of_its_runs_is_asked_for(plan):
  missing = plan.missing([catalog.STUDIES['ablation']])
  group = next_group(missing, BASE, plan.workdir, 4, 2)
  names = [run_name(config, BASE) for config in group]
  home = plan.workdir / 'working' / 'groups' / 'a'
  home.mkdir(parents=True)
  (home / 'members.json').write_text(json.dumps(names))
  others = [config for config in missing if config not in group]
  asked = others + group[:1]
  elsewhere = next_group(asked, BASE, plan.workdir / 'elsewhere', 4, 2)
  assert next_group(asked, BASE, plan.workdir, 4, 2) == elsewhere != group  # the group has no checkpoint
  params = gpt2(SMOKE.model).init(jax.random.key(0))
  for name, config in zip(names, group):
    write(home / 'members' / name / 'checkpoints', params, 1, training=config)
  assert next_group(asked, BASE, plan.workdir, 4, 2) == group
  assert next_group(others, BASE, plan.workdir, 4, 2) != group


def test_results_say_what_was_put_in(plan):
  make(plan, 'prioritized', range(8), greedy=0.75, sampled=0.9375, critical=0.97)
  make(plan, 'standard', range(8), greedy=0.5, sampled=0.5, weight=1.0, lifted=-0.1, paid=1.25)
  make(plan, MATCHED, range(8), greedy=0.5, sampled=0.5, weight=1.0)
  found = results.study_results(STUDY, plan, references())
  assert 'fine-tuned on N + 1 (seeds of each arm: 8);' in page.page_of(found)
  assert found['num_missing'] == 16  # the arms of equal penalty and of no penalty
  assert found['references']['']['num_problems'] == PROBLEMS
  assert found['arms']['prioritized']['gain']['difference'][0] == 0.25
  arm = found['arms']['prioritized']
  assert arm['figures']['greedy']['mean'][0] == arm['figures']['greedy']['iqm'][0] == 0.75
  assert arm['figures']['area']['mean'][0] == pytest.approx((0.25 / 2 + 0.75 + 0.75 + 0.9375 / 2) / 3)
  # points of the smoothed curve: the reference's test, two means of three, the run's own test
  curve = [0.5, (0.5 + 0.75 + 0.75) / 3, (0.75 + 0.75 + 0.9375) / 3, 0.9375]
  assert arm['figures']['episodes_to_50']['mean'][0] == 0
  assert arm['figures']['episodes_to_80']['mean'][0] == pytest.approx(
      BASE.episodes * (1 + (0.8 - curve[1]) / (curve[2] - curve[1])))
  assert arm['figures']['episodes_to_90']['mean'][0] == pytest.approx(
      BASE.episodes * (2 + (0.9 - curve[2]) / (curve[3] - curve[2])))
  assert arm['reached'] == {'50': 8, '80': 8, '90': 8}
  assert found['arms']['standard']['reached'] == {'50': 8, '80': 0, '90': 0}
  assert arm['mean_weight'] == pytest.approx(0.8)
  paid = [found['arms'][label]['figures']['paid']['mean'][0] for label in ('prioritized', 'standard')]
  assert paid == pytest.approx([0.4 * BASE.loss.kl_coefficient, 1.25 * BASE.loss.kl_coefficient])
  assert found['arms']['standard']['signatures'] == {'no_exploration': 8, 'blind_detector': 8}
  assert arm['signatures'] == {}  # 0.97 where the reference has 0.9
  row = next(row for row in found['contrasts'] if row['arm'] == MATCHED)
  assert row['against'] == 'prioritized'
  value, low, high = row['figures']['greedy']['difference']
  assert value == -0.25
  assert -0.5 < low < -0.25 < high < 0
  assert row['figures']['greedy']['improvement'][0] == 0
  assert found['seconds'] == 24 * 15
  assert {run['name'] for run in found['runs']} >= {'seed=7', 'kl=standard-kl_coefficient=0.4-seed=7'}


def test_intervals_stay_where_figures_can_be(plan):
  make(plan, 'prioritized', range(4), greedy=1.0, sampled=1.0)  # for four seeds intervals are almost twice as wide
  make(plan, 'standard', [0, 1, 2], greedy=1 / PROBLEMS, sampled=1.0)
  make(plan, 'standard', [3], greedy=1 / 4, sampled=0.0)  # never reaches the target
  found = results.study_results(catalog.STUDIES['prioritized_vs_standard'], plan, references())
  value, low, high = found['contrasts'][0]['figures']['greedy']['difference']
  assert value == 1 - (3 / PROBLEMS + 1 / 4) / 4
  assert low < value < high == 1
  value, low, high = found['arms']['standard']['figures']['greedy']['mean']
  assert low == 0 < value < high
  value, low, high = found['arms']['standard']['gain']['difference']
  assert -1 <= low < value < high
  value, low, high = found['arms']['standard']['figures']['episodes_to_80']['mean']
  assert 0 <= low < value < high == 3 * BASE.episodes


def test_other_temperatures_do_not_compare(plan):
  study = catalog.STUDIES['released_code']
  for arm in study.arms:
    for seed in range(2):
      record = made_up(plan.config(study, arm, seed), greedy=0.5, sampled=0.25, critical=0.5)
      write_record(record_path(plan.workdir, record.name), record)
  found = results.study_results(study, plan, references())
  within, across = found['contrasts'][1], found['contrasts'][2]
  assert (within['arm'], across['against']) == ('released, prioritized', "the paper's, prioritized")
  assert within['figures']['area']['difference'][0] == 0
  assert math.isnan(across['figures']['area']['difference'][0])
  assert across['figures']['greedy']['difference'][0] == 0
  arms = found['arms']
  assert arms["the paper's, standard"]['signatures']['no_exploration'] == 2  # 0.5 where the reference has 0.9
  assert 'no_exploration' not in arms['released, standard']['signatures']  # the reference has another temperature
  assert arms["the paper's, standard"]['figures']['episodes_to_50']['mean'][0] == 0  # the reference already has 0.5
  assert arms['released, standard']['figures']['episodes_to_50']['mean'][0] > 0
  assert '| none |' in page.page_of(found)


def test_a_run_without_critical_tokens_leaves_no_comparison(plan):
  make(plan, 'prioritized', [0, 2, 3], greedy=0.5, sampled=0.5)
  make(plan, 'prioritized', [1], greedy=0.5, sampled=0.5, kl_critical=float('nan'))
  make(plan, 'standard', range(4), greedy=0.5, sampled=0.5)
  study = catalog.STUDIES['drift']
  found = results.study_results(study, plan, references())
  compared = dict(found['contrasts'][0]['figures']['kl_critical'])
  assert compared.pop('pairs') == {'higher': 0, 'equal': 3, 'lower': 0}
  assert all(math.isnan(x) for values in compared.values() for x in values)
  assert '| prioritized minus standard | none | ' in page.page_of(found)
  assert page.verdicts(found)[0].endswith(': KL at critical tokens, N+1 cannot be compared.')


def test_marks_say_which_means_tell_arms_apart(plan):
  def marked(values):
    for seed, value in enumerate(values):
      make(plan, 'prioritized', [seed], greedy=value, sampled=0.5)
      make(plan, 'standard', [seed], greedy=0.0, sampled=0.5)
    found = results.study_results(catalog.STUDIES['prioritized_vs_standard'], plan, references())
    row = next(line for line in page.page_of(found).splitlines() if line.startswith('| prioritized minus standard | '))
    return row.split(' | ')[1], page.verdicts(found)[0]

  for few in ([0.5], [0.5] * 2, [0.5] * 3):  # equal values do not show how much runs vary
    cell, sentence = marked(few)
    assert cell == f'+50.0; {len(few)} of {len(few)}'
    assert 'cannot be judged by so few pairs, +50.0 points; higher in ' in sentence
  cell, sentence = marked([0.5, 0.5, 0.5, 0.5])
  assert cell.startswith('**+50.0 [')
  assert 'is higher, +50.0' in sentence
  cell, sentence = marked([0.0, 0.0, 0.0, 0.0])
  assert cell.startswith('+0.0 [')
  cell, sentence = marked([0.12, 0.22, 0.4, 0.5])
  assert cell.startswith('*+')
  assert not cell.startswith('**')
  assert 'is higher by the mean, not by the interquartile mean, ' in sentence


def test_records_of_an_older_version_are_named(plan):
  make(plan, 'prioritized', [0], greedy=0.5, sampled=0.5)
  old = read_record(record_path(plan.workdir, 'seed=0'))
  del old.longer['critical_probability']
  with pytest.raises(RecordError, match='seed=0: its record is of an older version; remove it'):
    results.run_figures(old, references()[''])


def test_nothing_is_claimed_where_nothing_is_shown(plan):
  make(plan, 'prioritized', range(3), greedy=0.5, sampled=0.5)
  make(plan, 'prioritized', [3], greedy=0.75, sampled=0.5)
  make(plan, 'standard', range(4), greedy=0.5, sampled=0.5)
  study = catalog.STUDIES['prioritized_vs_standard']
  found = results.study_results(study, plan, references())
  assert page.verdicts(found)[0].startswith(
      '**prioritized** minus **standard**: greedy accuracy, N+1 is not shown to differ, +6.2 [')
  assert page.verdicts(found)[0].endswith('points; higher in 1 of 4 pairs, equal in 3.')  # ties do not count half
  assert '; 1 of 4, 3 ties | ' in page.page_of(found)
  assert [row['against'] for row in found['contrasts']] == ['standard']  # no run without a penalty


def test_pages_show_every_figure_and_what_is_missing(plan):
  make(plan, 'prioritized', range(4), greedy=0.75, sampled=0.75)
  make(plan, 'standard', range(4), greedy=0.25, sampled=0.25, lifted=-0.1, paid=1.25)
  make(plan, MATCHED, range(4), greedy=0.25, sampled=0.25)
  home = page.write_study(STUDY, plan, results.study_results(STUDY, plan, references()))
  text = (home / 'README.md').read_text()
  assert '**Not complete: 28 runs are missing.**' in text
  assert re.search(r'\n\| uniform, of equal mean weight minus prioritized \| \*\*-50\.0 \[[^|]*\*\*; 0 of 4 \| ', text)
  assert '- standard: `blind_detector` in 4 of 4 runs' in text
  assert '| arm | first comma | all |' in text
  assert '\n| standard | 90.0; 92.0 [88.0, 95.0]; 94.0 [90.3, 96.6] | 50.0; 50.0 [' in text  # as of 256 problems
  assert 'nan' not in text.lower()
  for name in ('arms.png', 'curves.png'):
    assert f']({name})' in text
    assert (home / name).read_bytes().startswith(b'\x89PNG')
  kept = json.loads((home / 'results.json').read_text(), parse_constant=lambda name: pytest.fail(name))
  assert kept['arms']['prioritized']['figures']['greedy']['iqm'][0] == 0.75
  assert len((home / 'results.csv').read_text().splitlines()) == 13
  # a study without runs has a page too
  empty = Plan(BASE, plan.workdir / 'empty')
  home = page.write_study(STUDY, empty, results.study_results(STUDY, empty, references()))
  assert 'Not complete: 40 runs are missing' in (home / 'README.md').read_text()
