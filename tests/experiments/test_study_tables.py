"""Tables of a sweep: values, intervals and layout."""

import numpy as np

from critkl_jax.analysis.evaluation import accuracy_interval
from critkl_jax.analysis.intervals import share_interval
from critkl_jax.config import replace
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.addition.wording import named_sets
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from experiments import tables
from experiments.groups import Group, baseline_of, compare, groups_of


def compared(rewards):
  """Compares two groups, prioritized and standard, with rewards `[2, num_seeds, num_problems]`."""
  seeds = rewards.shape[1]
  groups = [Group('prioritized', FinetuneConfig(), tuple(range(seeds))),
            Group('standard', replace(FinetuneConfig(), kl='standard'), tuple(range(seeds, 2 * seeds)))]
  tests = [({}, {'N': own}) for own in rewards.reshape(2 * seeds, -1)]
  return compare(groups, tests, 'N')


def test_differences_of_a_sweep_stay_where_they_can_be():
  rewards = np.zeros((2, 4, 16), np.float32)
  rewards[0] = [[1] * 16, [1] * 16, [1] * 16, [0] * 16]
  row, standard = compared(rewards)
  assert row['difference'] == row['accuracy'] == 0.75
  assert row['low'] < 0.75 < row['high'] == row['accuracy_interval'][1] == 1.0
  assert standard['accuracy_interval'] == list(share_interval(0, 16)[1:])  # not 0 to 0: 16 problems leave some open
  text = tables.study_rows([row, standard])
  assert '  75.0% [' in text
  assert ', 100.0]  +75.0 points [' in text
  assert text.splitlines()[-1].startswith('In brackets: 95% intervals over seeds and problems')


def test_where_no_answer_differs_intervals_have_a_width():
  row, standard = compared(np.ones((2, 4, 20), np.float32))
  assert row['accuracy'] == standard['accuracy'] == 1
  assert (row['difference'], -row['low']) == (0, row['high'])
  assert 0.05 < row['high'] < 0.2
  assert '  100.0% [83.2, 100.0]  +0.0 points [-12.6, +12.6]' in tables.study_rows([row, standard])


def test_few_seeds_of_a_sweep_are_shown_one_by_one():
  rewards = np.zeros((2, 2, 16), np.float32)
  rewards[0, 0, :8] = rewards[1, 1, :4] = 1
  rows = compared(rewards)
  assert (rows[0]['low'], rows[0]['high'], rows[0]['accuracy_interval']) == (None, None, [None, None])
  first, second, note = tables.study_rows(rows).splitlines()[1:]
  assert first.split() == ['prioritized', '2', '25.0%', '(50.0,', '0.0)', '+12.5', 'points', '(+50.0,', '-25.0)']
  assert second.split() == ['standard', '2', '12.5%', '(0.0,', '25.0)']
  assert 'fewer than 4 seeds' in note


def test_the_table_of_accuracies_comes_line_by_line_and_says_what_it_is_of(capsys):
  rows = [{'digits': n, 'distribution': name, 'accuracy': 0.5, 'low': 0.25, 'high': 0.75, 'num_problems': 8}
          for n in (5, 6) for name in ('varying', 'plus')]
  seen = []

  def tested():
    for row in rows:
      seen.append(capsys.readouterr().out)
      yield row

  found = tables.print_accuracies(tested(), [5, 6], ['varying', 'plus'], 5, 8)
  assert found == rows
  assert seen[0].startswith('Accuracy of greedy answers with 95% intervals, 8 problems in each cell.\nLines: digits')
  assert 'varying: 1 to as many; plus: 1..N or' in seen[0]
  assert seen[1] == ''
  assert seen[2] == '       5' + 2 * '    50.0% [ 25.0, 75.0]' + '\n'
  assert capsys.readouterr().out.startswith('       6')


def test_twenty_of_twenty_have_an_interval():
  low, high = accuracy_interval(1.0, 20)
  row = {'digits': 5, 'distribution': 'plus', 'accuracy': 1.0, 'low': low, 'high': high, 'num_problems': 20}
  assert tables.accuracy_rows([row]) == '       5   100.0% [ 83.2,100.0]'
  text = tables.before_after_rows({when: {'N': 1.0, 'N+1': 0.0} for when in ('before', 'after')},
                                  named_sets(Addition(5, 1)), 20)
  assert text.count('100.0% [83.2, 100.0]') == 2
  assert text.count('0.0% [0.0, 16.8]') == 2


def test_commands_are_those_of_this_package():
  assert tables.command('analyze', '--checkpoints=a b') == "python -m experiments.analyze '--checkpoints=a b'"


def test_the_baseline_of_a_group_is_the_standard_penalty_that_is_else_the_same():
  base = replace(FinetuneConfig(), kl_coefficient=5.0, certainty='min_entropy', kl_estimator='k3')
  groups = groups_of(population.product(base, kl=('prioritized', 'standard', 'none'), temperature=(1.0, 2.0)))
  found = {group.label: baseline_of(group, groups) for group in groups}
  assert {label: baseline and baseline.label for label, baseline in found.items()} == {
      f'kl={kl} temperature={t}': None if kl == 'standard' else f'kl=standard temperature={t}'
      for kl in ('prioritized', 'standard', 'none') for t in (1.0, 2.0)}
