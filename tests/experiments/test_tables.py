"""Tables of checkpoints: numbers, columns and layout."""

import pytest

from critkl_jax.analysis.summary import METRICS
from experiments import tables


def summary(scale):
  place = {'number': 1200} | dict.fromkeys(METRICS, scale * 0.123456)
  row = {'precision': (0.25, 0.125, 0.5), 'recall': None, 'auroc': (0.99987, 0.9, 1.0),
         'average_precision': (0.1, 0.05, 0.2), 'base_rate': 0.00361234}
  return {'accuracy': {'6': {'accuracy': 0.5, 'low': 0.25, 'high': 0.75, 'num_problems': 8}},
          'places': {'critical': place, 'other': place, 'after_error': place | {'right_prob': None}},
          'certainty_gap': (-0.0212, -0.03, -0.0134), 'lowest_other_certainty': 0.7371,
          'certain_and_wrong': 0.000246, 'agreement': {'oracle': {'threshold': row}}}


@pytest.mark.parametrize(('value', 'text'), [
    (0.974321, '0.974'), (0.99962, '0.9996'), (0.9999512, '0.99995'), (1.0, '1'), (0.123456, '0.123'), (7, '7'),
    (12345, '12345'), (0.00234567, '0.00235'), (-0.02229, '-0.0223'), (None, 'none'), (0.0, '0')])
def test_three_digits_and_near_one_those_that_tell_it_from_one(value, text):
  assert tables._number(value) == text


def test_one_checkpoint_has_places_as_columns():
  accuracy, places, reference, detectors = tables.summary_tables({'a': summary(1)}, 'digits')
  assert list(accuracy.columns) == ['', 'a']
  assert accuracy.rows == [['6 digits, 8 problems', '50.0% [25.0, 75.0]']]
  assert list(places.columns) == ['', 'critical tokens', 'other tokens', 'after the first error']
  rows = {row[0]: row[1:] for row in places.rows}
  assert rows['tokens'] == ['1200'] * 3
  assert rows["policy's probability of the right token"] == ['0.123', '0.123', 'none']
  assert rows["reference's probability of the right token"] == rows['KL (nats)'] == ['0.123'] * 3
  assert ['lowest certainty elsewhere', '0.737'] in reference.rows
  assert detectors.title == 'Detectors of critical tokens against oracle [95% interval]'
  assert detectors.rows == [['threshold', '0.25 [0.125, 0.5]', 'none', '0.9999 [0.9, 1]', '0.1 [0.05, 0.2]',
                             '0.00361']]


def test_checkpoints_are_columns():
  found = tables.summary_tables({'a': summary(1), 'b': summary(2)}, 'digits')
  assert all(list(table.columns) == ['', 'a', 'b'] for table in found)
  assert all(len(row) == 3 for table in found for row in table.rows)
  titles = [table.title for table in found]
  assert [title.split(': ')[1] for title in titles if title.startswith('Means')] == list(tables.PLACES.values())
  means = found[titles.index('Means over tokens: critical tokens')]
  assert ['KL (nats)', '0.123', '0.247'] in means.rows
  assert ['threshold: AUROC', *['0.9999 [0.9, 1]'] * 2] in found[-1].rows


def test_columns_line_up_in_a_terminal():
  text = tables.text_of(tables.summary_tables({'a': summary(1), 'much longer': summary(2)}, 'digits'))
  lines = text.split('\n')
  start = lines.index('Means over tokens: critical tokens') + 1
  where = lines[start].index('much longer')
  assert lines[start + 1][where:] == '1200'
  assert all(line[where - 2:where] == '  ' for line in lines[start:start + 8])
