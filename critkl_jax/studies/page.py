"""A study as files: results.json, results.csv, pictures, and a page in Markdown that any repository shows."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from critkl_jax.analysis import charts
from critkl_jax.analysis.curves import plot_study
from critkl_jax.signatures import MEANING
from critkl_jax.studies.catalog import Study
from critkl_jax.studies.certainty import PAPER_GAPS, certainty_results, generation_gaps, position_means
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.results import FIGURES, TARGET

DOTS = ('greedy', 'sampled', 'greedy_known', 'critical_probability')
CONTRASTED = ('greedy', 'sampled', 'greedy_known', 'area', 'episodes_to_target', 'critical_probability', 'kl_critical',
              'kl_other')


def write_study(study: Study, plan: Plan, results: dict[str, Any]) -> pathlib.Path:
  """Writes a study of runs under `WORKDIR/studies/NAME`, and returns that directory."""
  home = plan.workdir / 'studies' / study.name
  home.mkdir(parents=True, exist_ok=True)
  write_files(home, results, results['runs'])
  if results['arms']:
    records = {label: list(own.values()) for label, own in plan.records(study).items() if own}
    panels = {name: label.replace('N+1', f'N+{results["extra_digits"]}') for name, label in study.panels.items()}
    plot_study({label: [one.metrics for one in own] for label, own in records.items()}, home / 'curves.png',
               _title(results), panels)
    plot_arms(results, home / 'arms.png')
  (home / 'README.md').write_text(page_of(results))
  return home


def write_certainty(study: Study, plan: Plan, tokens: dict[str, np.ndarray], known_digits: int,
                    about: dict[str, Any]) -> dict[str, Any]:
  """Writes the study of certainty under `WORKDIR/studies/NAME`, and returns what it says.

  Args:
    study: the study.
    plan: knows the workdir.
    tokens: as in `certainty.certainty_results`.
    known_digits: N.
    about: `commit`, `device` and `seconds`.
  """
  home = plan.workdir / 'studies' / study.name
  home.mkdir(parents=True, exist_ok=True)
  results = {'study': study.name, 'question': study.question, 'counterpart': study.counterpart,
             'known_digits': known_digits, 'extra_digits': plan.base.extra_digits,
             **certainty_results(tokens, len(plan.seeds(study))), **about}
  rows = [{'certainty': kind, **{name: x[0] if isinstance(x, tuple) else x for name, x in found.items()
                                 if not isinstance(x, dict)},
           **{f'{of}_{name}': found[of][name][0] for of in ('detector', 'of_errors')
              for name in ('auroc', 'average_precision') if found[of][name]}}
          for kind, found in results['kinds'].items()]
  write_files(home, results, rows)
  here, critical = tokens['on_path'], tokens['critical/oracle']
  charts.plot_certainty(tokens, home / 'certainty.png', _title(results))
  means = {'certainty': tokens['certainty'], 'entropy': tokens['ref_entropy'], 'error': 1 - tokens['ref_right_prob']}
  charts.plot_generations(
      generation_gaps(tokens['certainty'], critical & here, here & ~critical),
      {name: position_means(values, here) for name, values in means.items()},
      position_means(critical & here, here), home / 'generations.png', _title(results))
  (home / 'README.md').write_text(_certainty_page(results))
  return results


def certainty_verdicts(results: dict[str, Any]) -> list[str]:
  """Returns what the study of certainty says, in sentences; the last one names a detector that is blind."""
  found, known = results['kinds']['negentropy'], results['known_digits']
  if found['gap'] is None:
    return ['No generation gets as far as a critical token: nothing can be said.']
  (gap, low, high), detector = found['gap'], found['detector']
  said = 'less certain' if high < 0 else 'more certain' if low > 0 else 'not shown to be less certain'
  paper = f' (the paper, N = {known}: {PAPER_GAPS[known][0]:+.2f} +- {PAPER_GAPS[known][1]:.2f})' if (
      known in PAPER_GAPS) else ''
  auroc, precision = detector['auroc'], detector['average_precision']
  sentences = [
      f'The reference is **{said}** at critical tokens: {gap:+.3f} [{low:+.3f}, {high:+.3f}]{paper}.',
      f'As a detector of critical tokens 1 - certainty has an AUROC of {auroc[0]:.3f} [{auroc[1]:.3f}, {auroc[2]:.3f}] '
      f'and an average precision of {precision[0]:.3f} [{precision[1]:.3f}, {precision[2]:.3f}], at a base rate of '
      f'{detector["base_rate"]:.4f}.',
      f'At {100 * results["certain_and_wrong"]:.1f} % of the critical tokens the reference is sure of a wrong one.']
  if auroc[1] <= 0.5:
    sentences.append('Signature of failure, `blind_detector`: the interval of the AUROC reaches chance, 0.5.')
  return sentences


def _certainty_page(results):
  def interval(value):
    return 'none' if value is None else f'{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]'

  def number(value):
    return 'none' if value is None else f'{value:.4f}'

  rows = [[kind, interval(found['gap']), number(found['gap_deviation']), number(found['lowest_other']),
           interval(found['detector']['auroc']), interval(found['detector']['average_precision']),
           interval(found['of_errors']['auroc']), interval(found['entropy_correlation']),
           interval(found['error_correlation'])] for kind, found in results['kinds'].items()]
  heads = ['certainty', 'critical minus elsewhere', 'deviation between generations', 'lowest elsewhere',
           'AUROC, critical tokens', 'average precision', 'AUROC, wrong tokens', 'Spearman with entropy',
           'Spearman with wrong tokens']
  return '\n'.join([
      f'# {results["study"]}', '', f'{results["question"]} Counterpart: {results["counterpart"]}.', '',
      f'{results["generations"]} generations in {results["sets"]} sets, sampled from the reference of N = '
      f'{results["known_digits"]} digits on {results["known_digits"] + results["extra_digits"]}; '
      f'{results["critical_tokens"]} critical tokens and {results["other_tokens"]} others that follow right ones. The '
      'interval of the gap is over sets, the others over generations (95 % bootstrap). Correlations are across '
      'positions of the response, of means over generations; negentropy is a function of entropy, so that theirs is -1 '
      'by definition.', '', '## What it says', '', *(f'- {sentence}' for sentence in certainty_verdicts(results)), '',
      *_table(heads, rows), '', '![generations](generations.png)', '', '![certainty](certainty.png)', '',
      '## How it was made', '',
      f'Commit {results["commit"]} (`+`: with changes not committed), {results["device"]}; {results["seconds"]:.0f} s.',
      ''])


def write_files(home: pathlib.Path, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
  """Writes results.json, where NaN becomes null, and results.csv, a row for each run."""
  (home / 'results.json').write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + '\n')
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  (home / 'results.csv').write_text(file.getvalue())


def plot_arms(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws the interquartile mean of each arm with its interval, a panel for each figure, and every run as a dot."""
  labels = list(results['arms'])
  figure = Figure(figsize=(3.3 * len(DOTS) + 1.5, 0.42 * len(labels) + 1.6), layout='constrained')
  axes = figure.subplots(1, len(DOTS), sharey=True, squeeze=False)[0]
  for axis, name in zip(axes, DOTS):
    for place, label in enumerate(labels):
      value, low, high = results['arms'][label]['figures'][name]['iqm']
      dots = [run[name] for run in results['runs'] if run['arm'] == label]
      axis.plot(dots, [place] * len(dots), 'o', color='#9aa7b4', markersize=3)
      axis.plot([low, high], [place, place], color='#2a6f97', linewidth=2)
      axis.plot([value], [place], 'o', color='#d9480f', markersize=5)
      before = results['references'][results['arms'][label]['reference']][name]
      axis.plot([before[0] if isinstance(before, tuple) else before], [place], '|', color='#1c2733', markersize=9)
    axis.set_title(_named(name, results), fontsize=10)
    axis.grid(alpha=0.3)
    axis.set_yticks(range(len(labels)), labels)
  axes[0].invert_yaxis()
  figure.suptitle(f'{_title(results)}: interquartile mean and 95 % interval; strokes: the reference', fontsize=11)
  figure.savefig(path, dpi=130)


def page_of(results: dict[str, Any]) -> str:
  """Returns the page of a study of runs."""
  extra = results['extra_digits']
  lines = [f'# {results["study"]}', '', f'{results["question"]} Counterpart: {results["counterpart"]}.', '',
           f'References {_known(results)} are fine-tuned on N + {extra}; each run is tested on fixed problems of each '
           'length, greedy and sampled. Intervals are 95 % bootstrap, over seeds and, of accuracies, over problems; '
           'pairs share seed and problems.', '']
  if results['num_missing']:
    lines += [f'**Not complete: {results["num_missing"]} runs are missing.**', '']
  if not results['arms']:
    return '\n'.join(lines)
  if results.get('levels'):
    lines += ['## What the references know', '', *_levels_table(results['levels']), '']
  lines += ['## What the runs say', '', *(f'- {verdict(row, results)}' for row in results['contrasts']), '',
            *_arms_table(results), '', '![arms](arms.png)', '', *_contrasts_table(results), '',
            '![curves](curves.png)', '', '## Signatures of failure', '', *_signatures(results), '',
            '## How it was made', '', _origin(results), '']
  return '\n'.join(lines)


def verdict(row: dict[str, Any], results: dict[str, Any]) -> str:
  """Returns a contrast as a sentence: what the interval of greedy accuracy on N + k digits allows to say."""
  value, low, high = row['figures']['greedy']['difference']
  said = 'more accurate than' if low > 0 else 'less accurate than' if high < 0 else 'not shown to differ from'
  improvement = 100 * row['figures']['greedy']['improvement'][0]
  return (f'**{row["arm"]}** is {said} **{row["against"]}** on N+{results["extra_digits"]}: {100 * value:+.1f} points '
          f'[{100 * low:+.1f}, {100 * high:+.1f}]; better in {improvement:.0f} % of {len(row["seeds"])} pairs.')


def _arms_table(results):
  names = ('greedy', 'sampled', 'greedy_known', 'area', 'critical_probability', 'kl_critical', 'kl_other')
  rows = [[f'reference {name}'.strip(), '', *(_cell(figure, own.get(figure)) for figure in names), '', '', '']
          for name, own in results['references'].items()]
  for label, arm in results['arms'].items():
    values = [_cell(name, arm['figures'][name]['iqm']) for name in names]
    rows.append([label, str(len(arm['seeds'])), *values, _cell('greedy', arm['gain']['difference'], '+'),
                 f'{arm["reached_target"]} of {len(arm["seeds"])}', f'{arm["mean_weight"]:.3f}'])
  heads = ['arm (interquartile means)', 'runs', *(_named(name, results) for name in names),
           'mean gain over the reference (greedy)', f'reached {100 * TARGET:.0f} %', 'mean weight']
  return _table(heads, rows)


def _levels_table(levels):
  """Formats tables 4 and 5 of the paper: a row for each reference, operands of identical and of varying length."""
  most = max(len(rows) for rows in levels.values()) // 2
  cells = []
  for name, rows in levels.items():
    by_length = {}
    for row in rows:
      by_length.setdefault(row['digits'], []).append(_cell('greedy', (row['accuracy'], row['low'], row['high'])))
    cells.append([name or 'base', str(min(by_length)), *(' / '.join(own) for own in by_length.values())])
  heads = ['reference', 'N', *('at N' if k == 0 else f'N+{k}' for k in range(most))]
  return _table(heads, [row + [''] * (len(heads) - len(row)) for row in cells])


def _contrasts_table(results):
  rows = [[row['arm'], row['against'], *(_cell(name, row['figures'][name]['difference'], '+') for name in CONTRASTED),
           _cell('', row['figures']['greedy']['improvement'])] for row in results['contrasts']]
  heads = ['arm', 'minus', *(_named(name, results) for name in CONTRASTED), 'probability of improvement (greedy)']
  return _table(heads, rows)


def _signatures(results):
  found = [f'- {label}: `{name}` in {number} of {len(arm["seeds"])} runs'
           for label, arm in results['arms'].items() for name, number in arm['signatures'].items()]
  return [*(found or ['None was seen.']), '', *(f'`{name}`: {text}.' for name, text in MEANING.items())]


def _origin(results):
  return (f'Commit {", ".join(results["commits"])} (`+`: with changes not committed), {", ".join(results["devices"])}; '
          f'{results["seconds"] / 60:.0f} minutes of runs, those shared with other studies among them. '
          '`results.json` has every figure with its interval, `results.csv` a row for each run, `../../runs` the runs '
          'themselves: their configs, metrics and answers.')


def _title(results):
  return f'{results["study"]}, {_known(results)}, + {results["extra_digits"]} digits'


def _known(results):
  own = results['references'].values() if 'references' in results else [results]
  digits = sorted({one['known_digits'] for one in own})
  return f'of N = {", ".join(map(str, digits))}'


def _named(name, results):
  return FIGURES[name][0].replace('N+k', f'N+{results["extra_digits"]}')


def _cell(name, value, sign=''):
  """Returns a figure with its interval: shares in percent, others with three digits."""
  if value is None:
    return ''
  value = (value,) if np.isscalar(value) else value
  if math.isnan(value[0]):
    return 'none'
  share = name in FIGURES and FIGURES[name][1]
  texts = [f'{100 * x:{sign}.1f}' if share else f'{x:{sign}.3g}' for x in value]
  return f'{texts[0]} [{texts[1]}, {texts[2]}]' if len(texts) > 1 else texts[0]


def _table(heads, rows):
  return ['| ' + ' | '.join(row) + ' |' for row in (heads, ['---'] * len(heads), *rows)]


def _plain(value):
  """Returns nested values as JSON has them."""
  if isinstance(value, dict):
    return {name: _plain(x) for name, x in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value]
  if isinstance(value, float):
    return float(f'{value:.6g}') if math.isfinite(value) else None
  return value
