"""Tables as the binaries print them."""

import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from critkl_jax import hosts
from critkl_jax.analysis.page import Table
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.analysis.summary import METRICS
from critkl_jax.evaluate import accuracy_interval

PLACES = {'critical': 'critical tokens', 'other': 'other tokens', 'after_error': 'after the first error'}
AGREEMENT = {'precision': 'precision', 'recall': 'recall', 'auroc': 'AUROC', 'average_precision': 'average precision',
             'base_rate': 'base rate'}
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
    cells = [share_text(accuracy[when][name], num_problems) for when in ('before', 'after')]
    lines.append(f'{meaning:<42}{cells[0]:<22}{cells[1]}')
  return '\n'.join(lines)


def share_text(share: float | None, num_problems: int) -> str:
  """Formats a share of problems with its 95% interval; `none` where there is no number, as null in a file."""
  if share is None or math.isnan(share):
    return 'none'
  low, high = accuracy_interval(share, num_problems)
  return f'{100 * share:5.1f}% [{100 * low:.1f}, {100 * high:.1f}]'


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
  if mean is None:
    return 'none'
  few = interval[0] is None
  texts = [format(100 * x, form) for x in (each if few else interval)]
  return f'{100 * mean:{form}}{unit} ' + (f'({", ".join(texts)})' if few else f'[{", ".join(texts)}]')


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
