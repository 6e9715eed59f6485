"""Tables as the binaries print them."""

import math
from collections.abc import Sequence
from typing import Any

from critkl_jax.analysis.page import Table
from critkl_jax.analysis.summary import METRICS

PLACES = {'critical': 'critical tokens', 'other': 'other tokens', 'after_error': 'after the first error'}
AGREEMENT = {'precision': 'precision', 'recall': 'recall', 'auroc': 'AUROC', 'average_precision': 'average precision',
             'base_rate': 'base rate'}


def accuracy_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats the rows of `evaluate.accuracy_table`: a line for each number of digits, a column for each distribution."""
  distributions = list(dict.fromkeys(row['distribution'] for row in rows))
  cells = {(row['digits'], row['distribution']): row for row in rows}
  lines = [f'{"digits":>8}' + ''.join(f'{name:>22}' for name in distributions)]
  for digits in dict.fromkeys(row['digits'] for row in rows):
    found = [cells[digits, name] for name in distributions]
    lines.append(f'{digits:>8}' + ''.join(
        f'{100 * r["accuracy"]:>8.1f}% [{100 * r["low"]:>5.1f},{100 * r["high"]:>5.1f}]'.rjust(22) for r in found))
  return '\n'.join(lines)


def before_after_rows(accuracy: dict[str, dict[str, float]], meaning: dict[str, str]) -> str:
  """Formats accuracies before and after fine-tuning: `accuracy[when][name]` with `meaning[name]` to explain it."""
  lines = [f'{"problems":<34}{"before":>9}{"after":>9}']
  for name, text in meaning.items():
    before, after = (f'{100 * accuracy[when][name]:.1f}%' for when in ('before', 'after'))
    lines.append(f'{f"{name}  ({text})":<34}{before:>9}{after:>9}')
  return '\n'.join(lines)


def study_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats the groups of a study: mean accuracy, and the paired difference from the standard penalty where there is
  one."""
  width = max(len('group'), *(len(row['group']) for row in rows)) + 2
  lines = [f'{"group":<{width}}{"members":>8}{"accuracy":>10}  difference from the standard penalty [95% interval]']
  for row in rows:
    difference = ''
    if 'difference' in row:
      difference = (f'{100 * row["difference"]:+6.1f} points [{100 * row["low"]:+.1f}, {100 * row["high"]:+.1f}]')
    lines.append(f'{row["group"]:<{width}}{row["members"]:>8}{100 * row["accuracy"]:>9.1f}%  {difference}'.rstrip())
  return '\n'.join(lines)


def summary_tables(summaries: dict[str, dict[str, Any]]) -> list[Table]:
  """Formats summaries of checkpoints as tables: a column for each checkpoint where there are several.

  Args:
    summaries: name of a checkpoint -> what `analysis.summary.summarize` returns of it.
  """
  return [*_accuracy_tables(summaries), *_place_tables(summaries), _reference_table(summaries),
          *_detector_tables(summaries)]


def text_of(tables: Sequence[Table]) -> str:
  """Formats tables for a terminal, without their notes."""
  lines = []
  for table in tables:
    rows = [list(map(str, row)) for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(table.columns))]
    lines += ['', table.title, *(''.join(f'{cell:<{width}}' for cell, width in zip(row, widths)).rstrip()
                                 for row in rows)]
  return '\n'.join(lines)


def _accuracy_tables(summaries):
  shared = next(iter(summaries.values()))['accuracy']  # all are read with the same problems
  rows = [[f'{digits} digits, {row["num_problems"]} problems',
           *(_percent(summary['accuracy'][digits]) for summary in summaries.values())]
          for digits, row in shared.items()]
  return [Table('Accuracy [95% interval]', ('', *summaries), rows)] if rows else []


def _place_tables(summaries):
  names = {'number': 'tokens'} | METRICS
  note = 'Critical by the oracle. The right token is known only up to the first wrong one.'
  if len(summaries) == 1:
    places, = (summary['places'] for summary in summaries.values())
    rows = [[name, *(_number(places[place][metric]) for place in PLACES)] for metric, name in names.items()]
    return [Table('Means over tokens', ('', *PLACES.values()), rows, note)]
  return [Table(f'Means over tokens: {title}', ('', *summaries), [
      [name, *(_number(summary['places'][place][metric]) for summary in summaries.values())]
      for metric, name in names.items()], note * (place == 'critical')) for place, title in PLACES.items()]


def _reference_table(summaries):
  read = {'certainty at critical tokens minus elsewhere [95% interval]': lambda s: _interval(s['certainty_gap']),
          'lowest certainty elsewhere': lambda s: _number(s['lowest_other_certainty']),
          'tokens where it gives a wrong one more than 0.9': lambda s: f'{_number(100 * s["certain_and_wrong"])}%'}
  return Table('The reference', ('', *summaries), [[name, *map(value, summaries.values())]
                                                   for name, value in read.items()])


def _detector_tables(summaries):
  note = ('Precision: the share of the tokens it calls critical that are. Recall: the share of the critical tokens '
          'that it finds. AUROC: the chance that it scores a critical token above another one; 0.5 is a guess. Average '
          'precision of a guess: the base rate, the share of critical tokens.')
  tables = []
  for target, detectors in next(iter(summaries.values()))['agreement'].items():
    found = [summary['agreement'][target] for summary in summaries.values()]
    if len(found) == 1:
      columns, rows = AGREEMENT.values(), [[name, *(_interval(found[0][name][metric]) for metric in AGREEMENT)]
                                           for name in detectors]
    else:
      columns, rows = summaries, [[f'{name}: {title}', *(_interval(some[name][metric]) for some in found)]
                                  for name in detectors for metric, title in AGREEMENT.items()]
    tables.append(Table(f'Detectors of critical tokens against {target} [95% interval]', ('', *columns), rows,
                        note))
  return tables


def _number(value: float | None) -> str:
  """Formats a number with three significant digits; near 1 with as many as tell it from 1."""
  if value is None or isinstance(value, int):
    return 'none' if value is None else str(value)
  if 0.9 < value < 1 - 5e-8:
    return f'{value:.{max(3, -math.floor(math.log10(1 - value)))}f}'
  return f'{value:.3g}'


def _percent(row: dict[str, float]) -> str:
  return f'{100 * row["accuracy"]:.1f}% [{100 * row["low"]:.1f}, {100 * row["high"]:.1f}]'


def _interval(value: float | Sequence[float] | None) -> str:
  """Formats a number, or one with an interval as `(value, low, high)`."""
  if value is None or isinstance(value, float):
    return _number(value)
  return f'{_number(value[0])} [{_number(value[1])}, {_number(value[2])}]'
