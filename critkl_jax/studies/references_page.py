"""Sections on references in pages of studies: accuracy by size of problem, certainty, words, overconfidence."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from critkl_jax.analysis.style import BEHIND_TEXT, PALE, WIDTH, colours_of, save
from critkl_jax.studies.certainty_gap import PAPER_GAPS
from critkl_jax.studies.files import interval_text, table

# Tables 4 and 5 of arXiv 2502.06533: N -> accuracy in percent at N, N+1, ..., operands of identical / varying length.
PAPER_LEVELS = {
    7: ('98.9 / 100.0', '48.8 / 69.0', '0 / 0', '0 / 0'),
    9: ('96.4 / 97.0', '78.9 / 89.4', '0.5 / 6.9', '0 / 0'),
    11: ('91.2 / 94.4', '75.1 / 87.0', '30.7 / 53.7', '0.2 / 7.3'),
    13: ('93.0 / 95.6', '88.9 / 92.5', '67.7 / 84.7', '20.4 / 51.8'),
}


def levels_lines(levels: Mapping[str, Sequence[Mapping[str, Any]]], unit: str = 'digits') -> list[str]:
  """Formats tables 4 and 5 of the paper, of additions with the paper's rows below ours.

  Args:
    levels: of each reference rows of `evaluation.accuracy_table`.
    unit: what the size of a problem counts.
  """
  cells, most = [], 4
  for name, rows in levels.items():
    by_length = {}
    for row in rows:
      by_length.setdefault(row[unit], []).append(
          interval_text((row['accuracy'], row['low'], row['high']), '.1f', 100))
    most = max(most, len(by_length))
    cells.append((min(by_length), [name or 'base', str(min(by_length)), *(' / '.join(x) for x in by_length.values())]))
  papers = PAPER_LEVELS.items() if unit == 'digits' else ()
  rows = [row for _, row in sorted(cells)] + [['the paper', str(n), *row] for n, row in papers]
  heads = ['reference', 'N', *('at N' if k == 0 else f'N+{k}' for k in range(most))]
  lengths = ', operands of identical / of varying length' if unit == 'digits' else f' by the number of {unit}'
  return [f'Greedy accuracy in percent{lengths}; no entry where the context is too short.', '',
          *table(heads, [row + [''] * (len(heads) - len(row)) for row in rows])]


def plot_levels(levels: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path, unit: str = 'digits') -> None:
  """Draws the accuracy of each reference by the size of problems beyond its N, the paper's references in grey.

  Panels of additions are the distributions of lengths; arguments as in `levels_lines`.
  """
  figure = Figure(figsize=(WIDTH, 4.2), layout='constrained')
  known = {name: min(row[unit] for row in rows) for name, rows in levels.items()}
  names = sorted(levels, key=lambda name: (known[name], name))
  shared = len(set(known.values())) < len(known)
  own, labels = [levels[name] for name in names], [name or 'base' if shared else f'N = {known[name]}' for name in names]
  colours = colours_of(labels)
  of_digits = unit == 'digits'
  panels = ('identical', 'varying') if of_digits else ('',)
  for i, (axis, lengths) in enumerate(zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels)):
    for n, cells in PAPER_LEVELS.items() if of_digits else ():
      shares = [float(cell.split(' / ')[i]) for cell in cells]
      place = 2 if shares[2] > 20 else 1  # where the curves lie apart
      axis.plot(range(len(shares)), shares, '--', color=PALE, linewidth=1)
      axis.annotate(f'paper, N = {n}', (place, shares[place]), (4, 2), textcoords='offset points', fontsize=8,
                    color='#6b7885', bbox=BEHIND_TEXT)
    for label, rows in zip(labels, own):
      _draw_levels(axis, [row for row in rows if row.get('distribution', '') == lengths], unit, label, colours[label])
    axis.set_title(f'operands of {lengths} length' if of_digits else '')
    axis.set_xlabel(f'{unit} of the problem beyond N')
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(lambda x, _: f'{x:g} %')
  figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=6, fontsize=9, frameon=False)
  save(figure, path, f'What does a reference, pre-trained on N {unit}, know beyond them?',
       'Greedy accuracy; error bars: 95 % interval over problems.' + (
           ' Dashed: the references of the paper.' if of_digits else ''))


def _draw_levels(axis, rows, unit, label, colour):
  values = 100 * np.array([[row['accuracy'], row['accuracy'] - row['low'], row['high'] - row['accuracy']]
                           for row in rows])
  axis.errorbar([row[unit] - rows[0][unit] for row in rows], values[:, 0], values[:, 1:].T, marker='o',
                markersize=4, capsize=3, linewidth=1.5, color=colour, label=label)


def certainty_lines(certainty: Mapping[str, Mapping[str, Any]], extra: int, unit: str = 'digits') -> list[str]:
  """Formats table 1 of the paper, with the paper's rows below ours.

  Args:
    certainty: of each reference `certainty.certainty_results`, and `known` (N).
    extra: k.
    unit: what the size of a problem counts.
  """
  rows = []
  sizes = {name: one['known'] if 'known' in one else one['known_digits'] for name, one in certainty.items()}  # older
  for name, one in sorted(certainty.items(), key=lambda item: sizes[item[0]]):
    found, first = one['kinds']['negentropy'], one['first_wrong']
    rows.append([
        name or 'base', str(sizes[name]), interval_text(found['gap'], '+.3f'),
        'none' if found['gap'] is None else f'{found["gap_deviation"]:.3f}', f'{found["lowest_other"]:.4f}',
        str(one['critical_tokens']), interval_text(found['detector']['auroc'], '.3f'),
        f'{100 * one["certain_and_wrong"]:.1f}', f'{first["generations"] if first else 0} of {one["generations"]}',
        interval_text(first['critical'], '.0f', 100) if first else 'none'])
  papers = PAPER_GAPS.items() if unit == 'digits' else ()
  rows += [['the paper', str(n), f'{mean:+.2f}', f'{deviation:.2f}'] for n, (mean, deviation) in papers]
  heads = ['reference', 'N', 'certainty at critical tokens minus elsewhere', 'deviation between generations',
           'lowest elsewhere', 'critical tokens', 'AUROC of 1 - certainty, critical tokens',
           'sure of a wrong critical token (%)', 'generations with a wrong token', 'first one critical (%)']
  return [f'Generations of each on N + {extra} {unit}, tokens up to the first wrong one; certainty is the '
          'negentropy.', '', *table(heads, [row + [''] * (len(heads) - len(row)) for row in rows])]


def words_lines(words: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """Formats `certainty_gap.least_certain_words` of each reference as a table."""
  rows = [[name or 'base', f'`{one["word"].strip() or "line break"}`',
           *(f'{100 * one[key]:.1f}' for key in ('least_certain', 'everywhere', 'critical', 'right'))]
          for name, own in words.items() for one in own]
  return ['The words or phrases that a reference wrote at the 5 % of tokens at which it was least certain, up to the '
          'first wrong one.', '', *table(
              ['reference', 'word', 'share of the least certain tokens (%)', 'share of all tokens (%)',
               'critical, of its least certain ones (%)', 'mean probability of the right word there (%)'], rows)]


def overconfidence_lines(found: Mapping[str, Any]) -> list[str]:
  """Formats the results of `certainty_gap.overconfidence`."""
  names = ['the reference', *(f'another one, {i}' for i in range(1, len(found['references'])))]
  return [f'Of {found["critical_tokens"]} critical tokens in generations of the reference, those at which more than '
          '0.9 goes to a wrong token:', '', *table(['', 'share (%)'], [
              *([name, interval_text(value, '.2f', 100)] for name, value in zip(names, found['references'])),
              ['the mean of all', interval_text(found['together'], '.2f', 100)]])]
