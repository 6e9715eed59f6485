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
