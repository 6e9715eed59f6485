"""Tests the sections on references on made-up results."""

import json

import numpy as np

from critkl_jax.studies import files, references_page


def cells(lines):
  return {(row[0], row[1]): row for row in ([cell.strip() for cell in line.strip('|').split('|')] for line in lines
                                            if line.startswith('|'))}


def level(digits, accuracy):
  return [{'digits': digits, 'accuracy': a, 'low': a - 0.01, 'high': a + 0.01} for a in accuracy]


def test_levels_stand_by_n_above_the_papers():
  levels = {'known_digits=6': [*level(6, (1.0, 0.9)), *level(7, (0.5, 0.6))],  # N + 2 does not fit
            '': [*level(5, (0.99, 0.98)), *level(6, (0.18, 0.775)), *level(7, (0.0, 0.1)), *level(8, (0.0, 0.0))]}
  found = cells(references_page.levels_lines(levels))
  papers = [('the paper', str(n)) for n in (7, 9, 11, 13)]
  assert list(found)[2:] == [('base', '5'), ('known_digits=6', '6'), *papers]
  assert found['base', '5'][3] == '18.0 [17.0, 19.0] / 77.5 [76.5, 78.5]'
  assert found['known_digits=6', '6'][2:] == [
      '100.0 [99.0, 101.0] / 90.0 [89.0, 91.0]', '50.0 [49.0, 51.0] / 60.0 [59.0, 61.0]', '', '']
  assert found['the paper', '9'][3] == '78.9 / 89.4'
  assert {len(row) for row in found.values()} == {6}


def test_levels_are_drawn(tmp_path):
  levels = {name: [row | {'distribution': lengths} for digits in (n, n + 1) for lengths, row in zip(
      ('identical', 'varying'), level(digits, (0.5, 0.6)))] for name, n in (('', 5), ('known_digits=6', 6))}
  references_page.plot_levels(levels, tmp_path / 'levels.png')
  assert (tmp_path / 'levels.png').read_bytes().startswith(b'\x89PNG')


def test_certainty_stands_above_the_papers(tmp_path):
  detector = {'auroc': (0.9, 0.8, 0.95)}
  one = {'known_digits': 5, 'generations': 256, 'critical_tokens': 600, 'certain_and_wrong': 0.015,
         'first_wrong': {'generations': 100, 'critical': (0.27, 0.2, 0.3)},
         'kinds': {'negentropy': {'gap': (-0.03, -0.04, -0.02), 'gap_deviation': 0.05, 'lowest_other': 0.5,
                                  'detector': detector, 'error_correlation': (np.nan, np.nan, np.nan)}}}
  none = one | {'known_digits': 3, 'critical_tokens': 0, 'first_wrong': None, 'kinds': {'negentropy': {
      'gap': None, 'gap_deviation': None, 'lowest_other': 0.1, 'detector': {'auroc': None}}}}
  files.write_json(tmp_path / 'a' / 'b.json', {'': one, 'known_digits=3': none})  # as stored
  kept = json.loads((tmp_path / 'a' / 'b.json').read_text())
  assert kept['']['kinds']['negentropy']['error_correlation'] == [None] * 3
  found = cells(references_page.certainty_lines(kept, 1))
  assert list(found)[2:] == [('known_digits=3', '3'), ('base', '5'), *(('the paper', n) for n in '357')]
  assert found['base', '5'][2:] == ['-0.030 [-0.040, -0.020]', '0.050', '0.5000', '600', '0.900 [0.800, 0.950]', '1.5',
                                    '100 of 256', '27 [20, 30]']
  assert found['known_digits=3', '3'][2:] == ['none', 'none', '0.1000', '0', 'none', '1.5', '0 of 256', 'none']
  assert found['the paper', '3'][2:4] == ['-0.33', '0.01']


def test_overconfidence_has_a_row_for_each_reference_and_their_mean():
  found = {'critical_tokens': 90, 'references': [(0.02, 0.01, 0.03), (0.04, 0.02, 0.05)], 'together': (0.0, 0.0, 0.01)}
  lines = references_page.overconfidence_lines(found)
  assert lines[0].startswith('Of 90 critical tokens')
  assert lines[4:] == ['| the reference | 2.00 [1.00, 3.00] |', '| another one, 1 | 4.00 [2.00, 5.00] |',
                       '| the mean of all | 0.00 [0.00, 1.00] |']
