"""Formats and prints the tables of the binaries."""

import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import tqdm

from critkl_jax.analysis.evaluation import accuracy_interval
from critkl_jax.analysis.page import Table
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.analysis.summary import METRICS
from critkl_jax.runtime import hosts
from critkl_jax.tasks.known_tasks import known_task_of
from critkl_jax.tasks.task import NamedSet, ProblemSet

PLACES = {'critical': 'critical tokens', 'other': 'other tokens', 'after_error': 'after the first error'}
AGREEMENT = {'precision': 'precision', 'recall': 'recall', 'auroc': 'AUROC', 'average_precision': 'average precision',
             'base_rate': 'base rate'}
LENGTHS = {'identical': 'as many', 'varying': '1 to as many',
           'plus': '1..N or, as often, more, as in fine-tuning'}  # digits of the shorter operand


def command(binary: str, *flags: str) -> str:
  """Returns the command line that starts another binary, as text."""
  return shlex.join(['python', '-m', f'{__package__}.{binary}', *flags])


def print_accuracies(rows: Iterable[dict[str, Any]], digits: Sequence[int], distributions: Sequence[str],
                     known_digits: int, num_problems: int, whose: str = 'greedy answers') -> list[dict[str, Any]]:
  """Prints the table of `evaluation.accuracies` line by line while the tests run, with a progress bar.

  Args:
    rows: iterator of `evaluation.accuracies`; all hosts consume it, and the first one prints.
    digits: numbers of digits, one for each line.
    distributions: distributions of operands, one for each column.
    known_digits: N.
    num_problems: number of problems of each cell.
    whose: describes the tested answers.

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


def sets_of(settings: Any, names: Sequence[Any] | None, num_problems: int, seed: int) -> Iterator[ProblemSet]:
  """Yields the problem sets of a task's tests, labelled `set`, of up to `num_problems` each."""
  task, draw = known_task_of(settings).tests(settings, names)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  for name, problems in draw(problem_key, num_problems).items():
    yield ProblemSet(task, problems, answer_key, {'set': name})


def print_sets(rows: Iterable[dict[str, Any]], whose: str) -> list[dict[str, Any]]:
  """Prints a line for each problem set as soon as it is tested; returns the rows."""
  hosts.say(f'Accuracy of {whose} with 95% intervals.\n{"set":>10}{"problems":>10}{"accuracy":>22}')
  found = []
  for row in tqdm.tqdm(rows, 'tests', unit='set', leave=False, disable=not hosts.is_first()):
    found.append(row)
    if hosts.is_first():
      tqdm.tqdm.write(f'{row["set"]:>10}{row["num_problems"]:>10}{percent_of(row):>22}')
  return found


def accuracy_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats rows of `evaluation.accuracies`: a line for each number of digits, a column for each distribution."""
  cells = {}
  for row in rows:
    cells.setdefault(row['digits'], []).append(
        f'{100 * row["accuracy"]:>8.1f}% [{100 * row["low"]:>5.1f},{100 * row["high"]:>5.1f}]'.rjust(22))
  return '\n'.join(f'{digits:>8}' + ''.join(own) for digits, own in cells.items())


def before_after_rows(accuracy: dict[str, dict[str, float]], sets: dict[str, NamedSet], num_problems: int) -> str:
  """Formats the accuracies of a fine-tuning run, before and after, with 95% intervals.

  Args:
    accuracy: `before` and `after` -> name of a problem set -> share of right answers.
    sets: the problem sets by name.
    num_problems: number of problems of each set that has as many.
  """
  numbers = {name: size_of(one, num_problems) for name, one in sets.items()}
  each = f'{num_problems} fixed problems each' if len(set(numbers.values())) == 1 else ' and '.join(
      f'{number} fixed {sets[name].meaning}' for name, number in numbers.items())
  lines = [f'Accuracy: right answers to {each}, greedy decoding [95% interval]', '',
           f'{"":<42}{"reference":<22}{"fine-tuned"}']
  for name, one in sets.items():
    cells = [share_text(accuracy[when][name], numbers[name]) for when in ('before', 'after')]
    lines.append(f'{one.meaning:<42}{cells[0]:<22}{cells[1]}')
  return '\n'.join(lines)


def size_of(one: NamedSet, num_problems: int) -> int:
  """Returns the number of problems of a set, of which a test takes at most `num_problems`."""
  return num_problems if one.most is None else min(num_problems, one.most)


def share_text(share: float | None, num_problems: int) -> str:
  """Formats a share of problems with its 95% interval; `none` if the share is NaN or None."""
  if share is None or math.isnan(share):
    return 'none'
  low, high = accuracy_interval(share, num_problems)
  return f'{100 * share:5.1f}% [{100 * low:.1f}, {100 * high:.1f}]'


def study_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Formats the groups of a sweep: mean accuracy and paired difference from the standard penalty.

  Both are shown with their interval or, with too few seeds for an interval, with the value of each run or pair of runs.

  Args:
    rows: from `groups.compare`.
  """
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


def summary_tables(summaries: dict[str, dict[str, Any]], unit: str) -> list[Table]:
  """Formats summaries of checkpoints as tables, which have a column for each checkpoint if there are several.

  Args:
    summaries: name of a checkpoint -> its summary from `analysis.summary.summarize`.
    unit: word after the names of problem sets, `digits` for example; may be empty.
  """
  known = all('places' in summary for summary in summaries.values())  # critical tokens
  return [*_accuracy_tables(summaries, unit), *(_place_tables(summaries) if known else ()),
          *([_reference_table(summaries)] if known else ()), *_detector_tables(summaries)]


def text_of(tables: Sequence[Table]) -> str:
  """Formats tables for a terminal, without their notes."""
  lines = []
  for table in tables:
    rows = [list(map(str, row)) for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(table.columns))]
    lines += ['', table.title, *(''.join(f'{cell:<{width}}' for cell, width in zip(row, widths)).rstrip()
                                 for row in rows)]
  return '\n'.join(lines)


def _accuracy_tables(summaries, unit):
  shared = next(iter(summaries.values()))['accuracy']  # all checkpoints have the same problems
  rows = [[f'{" ".join(filter(None, (name, unit)))}, {row["num_problems"]} problems',
           *(percent_of(summary['accuracy'][name]) for summary in summaries.values())]
          for name, row in shared.items()]
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
      columns, rows = summaries, [[f'{name}: {title}', *(_interval(own[name][metric]) for own in found)]
                                  for name in detectors for metric, title in AGREEMENT.items()]
    tables.append(Table(f'Detectors of critical tokens against {target} [95% interval]', ('', *columns), rows,
                        note))
  return tables


def _number(value: float | None) -> str:
  """Formats a number with three significant digits, or as many as distinguish it from 1."""
  if value is None or isinstance(value, int):
    return 'none' if value is None else str(value)
  if 0.9 < value < 1 - 5e-8:
    return f'{value:.{max(3, -math.floor(math.log10(1 - value)))}f}'
  return f'{value:.3g}'


def percent_of(row: dict[str, float]) -> str:
  """Formats an accuracy with its interval."""
  return f'{100 * row["accuracy"]:.1f}% [{100 * row["low"]:.1f}, {100 * row["high"]:.1f}]'


def _interval(value: float | Sequence[float] | None) -> str:
  """Formats a number, or a tuple `(value, low, high)` as a number with its interval."""
  if value is None or isinstance(value, float):
    return _number(value)
  return f'{_number(value[0])} [{_number(value[1])}, {_number(value[2])}]'
