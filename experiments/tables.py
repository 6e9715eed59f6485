"""Tables as the binaries print them."""

from collections.abc import Sequence
from typing import Any


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
