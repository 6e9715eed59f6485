"""Tables as the binaries print them."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from critkl_jax import hosts
from critkl_jax.analysis.page import Table
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.analysis.summary import FIGURES

LENGTHS = {'identical': 'as many', 'varying': '1 to as many',
           'plus': '1..N or, as often, more, as in fine-tuning'}  # digits of the shorter operand


def command(binary: str, *flags: str) -> str:
  """Returns the command that starts another binary, as text to be shown."""
  return shlex.join(['python', '-m', f'{__package__}.{binary}', *flags])


def print_accuracies(rows: Iterable[dict[str, Any]], digits: Sequence[int], distributions: Sequence[str],
                     known_digits: int, num_problems: int, whose: str = 'greedy answers') -> list[dict[str, Any]]:
  """Prints the table of `evaluate.accuracies`, each line as soon as its cells are tested, and a bar meanwhile.

  Args:
    rows: of `evaluate.accuracies`; all hosts go through them, and the first one prints.
    digits: of the lines.
    distributions: of the columns.
    known_digits: N.
    num_problems: in a cell.
    whose: what the accuracies are of.

  Returns:
    The rows.
  """
  lengths = '; '.join(f'{name}: {LENGTHS[name]}' for name in distributions)
  hosts.say(f'Accuracy of {whose} with 95% intervals, {num_problems} problems in each cell.\n'
            f'Lines: digits of the longer operand; the model was pre-trained on 1..{known_digits}. '
            f'Columns: digits of the other one ({lengths}).\n'
            f'{"digits":>8}' + ''.join(f'{name:>22}' for name in distributions))
  found = []
  bar = tqdm.tqdm(rows, 'tests', len(digits) * len(distributions), unit='cell', leave=False,
                  disable=not hosts.is_first())
  for row in bar:
    found.append(row)
    if len(found) % len(distributions) == 0 and hosts.is_first():
      tqdm.tqdm.write(accuracy_rows(found[-len(distributions):]))
      sys.stdout.flush()
  return found


def accuracy_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats the rows of `evaluate.accuracies`: a line for each number of digits, a column for each distribution."""
  cells = {}
  for row in rows:
    cells.setdefault(row['digits'], []).append(
        f'{100 * row["accuracy"]:>8.1f}% [{100 * row["low"]:>5.1f},{100 * row["high"]:>5.1f}]'.rjust(22))
  return '\n'.join(f'{digits:>8}' + ''.join(own) for digits, own in cells.items())


def before_after_rows(accuracy: dict[str, dict[str, float]], meaning: dict[str, str]) -> str:
  """Formats accuracies before and after fine-tuning: `accuracy[when][name]` with `meaning[name]` to explain it."""
  lines = [f'{"problems":<34}{"before":>9}{"after":>9}']
  for name, text in meaning.items():
    before, after = (f'{100 * accuracy[when][name]:.1f}%' for when in ('before', 'after'))
    lines.append(f'{f"{name}  ({text})":<34}{before:>9}{after:>9}')
  return '\n'.join(lines)


def study_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats the groups of a study: mean accuracy, and the paired difference from the standard penalty where there is
  one, with their intervals, or where there are none what each run or pair of runs has."""
  texts = []
  for row in rows:
    accuracy = _mean_text(row['accuracy'], row['accuracy_interval'], row['accuracies'], '.1f', '%')
    difference = 'differences' in row and _mean_text(
        row['difference'], (row['low'], row['high']), row['differences'], '+.1f', ' points')
    texts.append([row['group'], str(row['members']), accuracy, difference or ''])
  heads = ['group', 'runs', 'mean accuracy', 'difference from the standard penalty, same seeds']
  widths = [max(len(line[i]) for line in (heads, *texts)) + 2 for i in range(len(heads))]
  lines = [f'{line[0]:<{widths[0]}}{line[1]:>{widths[1] - 2}}  {line[2]:<{widths[2]}}{line[3]}'.rstrip()
           for line in (heads, *texts)]
  few = any(row['members'] < FEWEST_SEEDS for row in rows)
  return '\n'.join([*lines, 'In brackets: 95% intervals over seeds and problems.' if not few else
                    f'In parentheses: each run, or pair of runs, by seed; fewer than {FEWEST_SEEDS} seeds do not show '
                    'how much runs differ, and have no interval.'])


def _mean_text(mean, interval, each, form, unit):
  few = interval[0] is None
  texts = [format(100 * x, form) for x in (each if few else interval)]
  return f'{100 * mean:{form}}{unit} ' + (f'({", ".join(texts)})' if few else f'[{", ".join(texts)}]')


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
