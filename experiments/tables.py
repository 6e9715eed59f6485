"""Tables as the binaries print them."""

from collections.abc import Sequence
from typing import Any

from critkl_jax.analysis.page import Table
from critkl_jax.analysis.statistics import share_interval
from critkl_jax.analysis.summary import FIGURES


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


def before_after_rows(accuracy: dict[str, dict[str, float]], known: int, extra: int, num_problems: int) -> str:
  """Formats a fine-tuning run's test: accuracies with 95% intervals, before and after.

  Args:
    accuracy: `before` and `after` -> `N` and `N+k` -> share of right answers.
    known: N of pre-training.
    extra: k.
    num_problems: behind each accuracy.
  """
  lines = [f'Accuracy: right answers to {num_problems} fixed problems each, greedy decoding [95% interval]', '',
           f'{"":<42}{"reference":<22}{"fine-tuned"}']
  meanings = {'N': f'N = {known} digits (known from pre-training)',
              f'N+{extra}': f'N + {extra} = {known + extra} digits (trained here)'}
  for name, meaning in meanings.items():
    cells = []
    for when in ('before', 'after'):
      share = accuracy[when][name]
      _, low, high = share_interval(share * num_problems, num_problems)
      cells.append(f'{100 * share:5.1f}% [{100 * low:.1f}, {100 * high:.1f}]')
    lines.append(f'{meaning:<42}{cells[0]:<22}{cells[1]}')
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


def summary_tables(summary: dict[str, Any]) -> list[Table]:
  """Returns what `analysis.summary.summarize` found as tables of text."""
  accuracy = [[number, f'{100 * row["accuracy"]:.1f}% [{100 * row["low"]:.1f}, {100 * row["high"]:.1f}]',
               str(row['num_problems'])] for number, row in summary['accuracy'].items()]
  titles = {'critical': 'critical', 'other': 'others', 'after_error': 'after the first error'}
  places = [[name, *(_number(summary['places'][place][name]) for place in titles)] for name in ('number', *FIGURES)]
  gap = summary['certainty_gap']
  certainty = [['certainty at critical tokens minus elsewhere', 'none' if gap is None else _interval(gap)],
               ['lowest certainty elsewhere', _number(summary['lowest_other_certainty'])],
               ['tokens at which the reference is sure of a wrong one', f'{100 * summary["certain_and_wrong"]:.2f}%']]
  figures = ('precision', 'recall', 'auroc', 'average_precision')
  detectors = {target: [[name, *('none' if row[figure] is None else _interval(row[figure]) for figure in figures),
                         _number(row['base_rate'])] for name, row in rows.items()]
               for target, rows in summary['agreement'].items()}
  whole = [Table('Accuracy', ('digits', 'accuracy [95% interval]', 'problems'), accuracy)] if accuracy else []
  return [*whole,
          Table('Means over tokens', ('', *titles.values()), places),
          Table('The reference', ('', '[95% interval]'), certainty),
          *(Table(f'Detectors against {target} [95% interval]', ('', *figures, 'base rate'), rows)
            for target, rows in detectors.items())]


def text_of(tables: Sequence[Table]) -> str:
  """Formats tables for a terminal."""
  lines = []
  for table in tables:
    rows = [list(map(str, row)) for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(table.columns))]
    lines += ['', table.title, *(''.join(f'{cell:<{width}}' for cell, width in zip(row, widths)).rstrip()
                                 for row in rows)]
  return '\n'.join(lines)


def _number(value: float | None) -> str:
  return 'none' if value is None else str(value) if isinstance(value, int) else f'{value:.4g}'


def _interval(value: Sequence[float]) -> str:
  return f'{value[0]:.4g} [{value[1]:.4g}, {value[2]:.4g}]'
