"""Files and text shared by all pages of studies: JSON, CSV, Markdown tables, intervals as text."""

import csv
import io
import itertools
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.runtime import storage
from critkl_jax.runtime.failure_signatures import MEANING

TOLD_APART = ('in bold where the intervals of mean and interquartile mean both leave out zero, in italics where the '
              'first alone does')
FEW = f'Fewer than {FEWEST_SEEDS} seeds have no interval: so few runs do not show how much runs differ.'


def write_files(home: pathlib.Path, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
  """Writes `results.json`, and `results.csv` with a row for each run."""
  write_json(home / 'results.json', results)
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  storage.write_text(home / 'results.csv', file.getvalue())


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes nested values as JSON: floats with six digits, null if not finite."""
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, _plain(value))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Formats a Markdown table as lines."""
  return ['| ' + ' | '.join(row) + ' |' for row in (heads, ['---'] * len(heads), *rows)]


def signature_lines(found: Sequence[str]) -> list[str]:
  """Formats the failure signatures that were found, with the meaning of each signature."""
  return [*(found or ['None was seen.']), '', *(f'`{name}`: {text}.' for name, text in MEANING.items())]


def write_index(workdir: pathlib.Path) -> None:
  """Writes `WORKDIR/README.md` with the verdicts from each study's page."""
  lines = ['# Studies', '', 'What each asked and found; its page has more figures, pictures and how it was made. Of '
           f'runs these are mean differences with their 95 % interval, {TOLD_APART}, and the number of pairs of runs '
           f'in which they are above zero and, if there are any, in which they are zero (ties). {FEW}', '']
  for page in sorted((workdir / 'studies').glob('*/README.md')):
    text = page.read_text().splitlines()
    start = next((i for i, line in enumerate(text) if re.fullmatch(r'## What (it says|the \w+ say)', line)), len(text))
    said = [line for line in text if line.startswith('**Not')]
    found = itertools.dropwhile(lambda line: not line.startswith(('- ', '| ')), text[start + 1:])
    said += ['', *itertools.takewhile(bool, found)] if said else itertools.takewhile(bool, found)
    lines += [f'## [{page.parent.name}](studies/{page.parent.name}/README.md)', '', text[2], '', *said, '']
  storage.write_text(workdir / 'README.md', '\n'.join(lines))


def interval_text(value: Sequence[float] | None, form: str = '.3f', scale: float = 1.0) -> str:
  """Formats `(value, low, high)` as text, each number times `scale`.

  Without bounds (NaN, or null in a file) only the value is shown; without a value `none`.
  """
  value = [math.nan if x is None else x for x in value or (None,) * 3]
  if math.isnan(value[0]):
    return 'none'
  texts = [format(scale * x, form) for x in value]
  return texts[0] if math.isnan(value[1]) else f'{texts[0]} [{texts[1]}, {texts[2]}]'


def pairs_text(pairs: dict[str, int]) -> str:
  """Formats `count_pairs` as text: the number of pairs with a difference above zero, and the number of ties."""
  ties = pairs['equal']
  return f'{pairs["higher"]} of {sum(pairs.values())}' + (f', {ties} {"tie" if ties == 1 else "ties"}' if ties else '')


def _plain(value):
  """Converts nested values to JSON values."""
  if isinstance(value, dict):
    return {name: _plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value]
  if isinstance(value, float):
    return float(f'{value:.6g}') if math.isfinite(value) else None
  return value
