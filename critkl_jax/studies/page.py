"""Writes the page of a study of runs: `results.json`, `results.csv`, pictures and Markdown."""

import math
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from critkl_jax.analysis.curves import plot_study
from critkl_jax.analysis.statistics import FEWEST_SEEDS
from critkl_jax.analysis.style import REFERENCE, WIDTH, colours_of, panel_title, save, split_label
from critkl_jax.runtime import storage
from critkl_jax.studies.catalog import PRIORITIZED, Study
from critkl_jax.studies.files import FEW, TOLD_APART, interval_text, pairs_text, signature_lines, table, write_files
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.references_page import (
  certainty_lines,
  levels_lines,
  overconfidence_lines,
  plot_levels,
  words_lines,
)
from critkl_jax.studies.results import FIGURES, TARGETS

DOTS = ('greedy', 'area', 'greedy_known', 'critical_probability')  # drawn for each arm, after the primary metrics
TARGET_TEXT = ' / '.join(f'{100 * target:.0f}' for target in TARGETS)
CONTRASTED = ('greedy', 'sampled', 'greedy_known', 'area', 'episodes_to_50', 'episodes_to_80', 'episodes_to_90',
              'critical_probability', 'kl_critical', 'kl_other')


def write_study(study: Study, plan: Plan, results: dict[str, Any]) -> pathlib.Path:
  """Writes the page of a study of runs under `WORKDIR/studies/NAME`, and returns that directory."""
  home = plan.workdir / 'studies' / study.name
  home.mkdir(parents=True, exist_ok=True)
  write_files(home, results, results['runs'])
  if results['arms']:
    records = {label: list(own.values()) for label, own in plan.records(study).items() if own}
    panels = {name: label.replace('N+1', f'N+{results["extra"]}') for name, label in study.panels.items()}
    colours = arm_colours(study)
    sampled = {label: results['references'][arm['reference']]['sampled'][0] for label, arm in results['arms'].items()
               if arm['compares_with_reference']}
    plot_study({label: [one.metrics for one in own] for label, own in records.items()}, home / 'curves.png',
               _title(results), panels, reference=sampled, reference_label='reference, sampled', colours=colours)
    plot_arms(results, home / 'arms.png', colours)
  if results.get('levels'):
    plot_levels(results['levels'], home / 'levels.png', results['unit'])
  storage.write_text(home / 'README.md', page_of(results))
  return home


def arm_colours(study: Study) -> dict[str, str]:
  """Chooses the colours of a study's arms, label -> colour; an arm without changes has the prioritized penalty's."""
  unchanged = {arm.label: PRIORITIZED for arm in study.arms if not (arm.changes or arm.matches or arm.ensemble)}
  return colours_of([arm.label for arm in study.arms], unchanged)


def plot_arms(results: dict[str, Any], path: pathlib.Path, colours: dict[str, str]) -> None:
  """Draws the interquartile mean of each arm with its interval, and every run as a dot.

  Panels are the primary metrics and `DOTS`; `colours` maps labels to colours.
  """
  names, heights = list(dict.fromkeys((*results['primary_metrics'], *DOTS)))[:len(DOTS)], _heights(results['arms'])
  figure = Figure(figsize=(WIDTH, 0.26 * max(heights.values()) + 1.9), layout='constrained')
  axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axis, name in zip(axes, names):
    for label, arm in results['arms'].items():
      _draw_arm(axis, name, label, arm, heights[label], colours[label], results)
    share = FIGURES[name][1]
    panel_title(axis, _named(name, results) + ', nats per token' * name.startswith('kl_'), 2.2)
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _, share=share: f'{100 * x:.6g} %' if share else f'{x:g}'))
    axis.set_yticks(list(heights.values()), list(heights))
    axis.margins(x=0.08)
    if name.startswith('kl_'):
      axis.set_xlim(left=0)
  axes[0].set_ylim(max(heights.values()) + 0.7, -0.7)
  save(figure, path, _title(results), 'Large dots: interquartile mean over seeds, with its 95 % interval. Small dots: '
       'runs. Black strokes: the reference before training.')


def _heights(labels):
  """Returns the height at which each arm is drawn, with the arms of a condition together."""
  heights, height, before = {}, -1.0, None
  for label in labels:
    condition = split_label(label)[1]
    height += 1.0 if before in (None, condition) else 1.5
    heights[label], before = height, condition
  return heights


def _draw_arm(axis, name, label, arm, height, colour, results):
  value, low, high = arm['figures'][name]['iqm']
  runs = [run[name] for run in results['runs'] if run['arm'] == label]
  axis.plot(runs, [height + 0.26] * len(runs), 'o', color=colour, markersize=3, markeredgewidth=0, alpha=0.55)
  axis.plot([low, high], [height, height], color=colour, linewidth=2)
  axis.plot([value], [height], 'o', color=colour, markersize=6)
  before = results['references'][arm['reference']].get(name)
  if before is not None and (name.startswith('greedy') or arm['compares_with_reference']):
    axis.plot([before[0]], [height], '|', color=REFERENCE, markersize=11, markeredgewidth=1.6)


def page_of(results: dict[str, Any]) -> str:
  """Formats the Markdown page of a study of runs."""
  lines = [f'# {results["study"]}', '', f'{results["question"]} Counterpart: {results["counterpart"]}.', '',
           _design(results), '']
  if results['note']:
    lines += [results['note'], '']
  if results['num_missing']:
    lines += [f'**Not complete: {results["num_missing"]} runs are missing.**', '']
  if not results['arms']:
    return '\n'.join(lines)
  if results.get('levels'):
    lines += ['## What the references know', '', *levels_lines(results['levels'], results['unit']), '',
              '![levels](levels.png)', '']
  if results.get('certainty'):
    lines += ['## Where the references are unsure', '',
              *certainty_lines(results['certainty'], results['extra'], results['unit']), '']
  if results.get('words'):
    lines += ['## Which words and phrases the references are unsure of', '', *words_lines(results['words']), '']
  if 'overconfidence' in results:
    lines += ['## How often references are sure and wrong', '', *overconfidence_lines(results['overconfidence']), '']
  lines += ['## What the runs say', '', *_judged_table(results), '', *_arms_table(results), '',
            '![arms](arms.png)', '', *_contrasts_table(results), '', *_kinds_table(results),
            '![curves](curves.png)', '', '## Signatures of failure', '', *_signatures(results), '',
            '## Arms', '', *(f'- {label}: {own["changes"]}' for label, own in results['arms'].items()), '',
            '## How it was made', '', _origin(results), '']
  return '\n'.join(lines)


def verdicts(results: dict[str, Any]) -> list[str]:
  """Writes the verdict of each contrast on each primary metric as a sentence."""
  return [_verdict(row, name, results) for row in results['contrasts'] for name in results['primary_metrics']]


def _verdict(row, name, results):
  found, number = row['figures'][name], len(row['seeds'])
  told_apart, value, ties = _told_apart(found), found['difference'][0], found['pairs']['equal']
  said = 'is not shown to differ' if not told_apart else ('is higher' if value > 0 else 'is lower') + (
      ' by the mean, not by the interquartile mean' if told_apart == 1 else '')
  if number < FEWEST_SEEDS:
    said = 'cannot be judged by so few pairs'
  arms, unit = f'**{row["arm"]}** minus **{row["against"]}**: {_named(name, results)}', ' points' * FIGURES[name][1]
  if math.isnan(value):
    return f'{arms} cannot be compared.'
  return (f'{arms} {said}, {_cell(name, found["difference"], "+")}{unit}; higher in {found["pairs"]["higher"]} of '
          f'{number} {"pair" if number == 1 else "pairs"}{f", equal in {ties}" if ties else ""}.')


def _judged_table(results):
  rows = [[f'{row["arm"]} minus {row["against"]}', *(_judged_cell(row, name) for name in results['primary_metrics'])]
          for row in results['contrasts']]
  heads = [_named(name, results) + ' (points)' * FIGURES[name][1] for name in results['primary_metrics']]
  return [f'Mean differences, {TOLD_APART}, and in how many pairs of runs they are above zero; ties are pairs in which '
          f'they are zero. There are {len(rows) * len(heads)}; intervals are not corrected for that.', '',
          *table(['arms', *heads], rows)] if rows else ['- No two arms can be compared yet.']


def _judged_cell(row, name):
  found = row['figures'][name]
  text, mark = _cell(name, found['difference'], '+'), {2: '**', 1: '*', 0: ''}[_told_apart(found)]
  return f'{mark}{text}{mark}; {pairs_text(found["pairs"])}' if text != 'none' else text


def _told_apart(found):
  """Returns 2 if the intervals of mean and interquartile mean both exclude zero, 1 if only the mean's does, else 0."""
  apart = [low > 0 or high < 0 for _, low, high in (found['difference'], found['iqm_difference'])]
  return 1 + apart[1] if apart[0] else 0


def _arms_table(results):
  names = ['greedy', 'sampled', 'greedy_known', 'area', 'critical_probability', 'kl_critical', 'kl_other', 'kl_known']
  if results['unit'] != 'digits':
    names += ['reward', 'reward_known']
  if any(arm['figures']['format_errors']['mean'][0] > 0.005 for arm in results['arms'].values()):
    names.append('format_errors')
  rows = [[f'reference {name}'.strip(), '', *(_cell(figure, own.get(figure)) for figure in names), '', '', '', '']
          for name, own in results['references'].items()]
  for label, arm in results['arms'].items():
    values = [_cell(name, arm['figures'][name]['iqm']) for name in names]
    rows.append([label, str(len(arm['seeds'])), *values, _cell('greedy', arm['gain']['difference'], '+'),
                 f'{" / ".join(map(str, arm["reached"].values()))} of {len(arm["seeds"])}',
                 f'{arm["mean_weight"]:.3f}', _cell('paid', arm['figures']['paid']['mean'])])
  heads = ['arm (interquartile means)', 'runs', *(_named(name, results) for name in names),
           'mean gain over the reference (greedy)', f'runs that reached {TARGET_TEXT} % of sampled answers',
           'mean weight', 'mean penalty paid for a nat of KL']
  return table(heads, rows)


def _kinds_table(results):
  arms = {label: arm['critical_kinds'] for label, arm in results['arms'].items() if arm['critical_kinds']}
  if not arms:
    return []
  rows = [[label, *('; '.join((_cell('greedy', own['start'][0]), *(_cell('greedy', own[place]) for place in (
      'after_one', 'before_last')))) for own in kinds.values())] for label, kinds in arms.items()]
  heads = [{'probability': 'all'}.get(kind, kind.replace('_', ' ')) for kind in next(iter(arms.values()))]
  kinds = ('kind of critical token (does the list of the first or second operand go on, with a comma, and with which '
           'digit?)' if results['unit'] == 'digits' else 'critical token')
  return [f'Probability (%) of the right token at each {kinds}, at the start; after one iteration; before the last '
          'update. Means over seeds, of 256 problems.', '', *table(['arm', *heads], rows), '']


def _contrasts_table(results):
  names = dict.fromkeys((*CONTRASTED, *results['primary_metrics']))
  rows = [[row['arm'], row['against'], *(_cell(name, row['figures'][name]['difference'], '+') for name in names),
           _cell('', row['figures']['greedy']['improvement'])] for row in results['contrasts']]
  heads = ['arm', 'minus', *(_named(name, results) for name in names), 'probability of improvement (greedy)']
  return table(heads, rows)


def _design(results):
  """Describes how the study was made and what its metrics mean."""
  return (f'References {_known(results)} are fine-tuned on N + {results["extra"]} ({_seeds(results)}); each '
          'run is tested on fixed problems of each length, greedy and sampled. Intervals are 95 % bootstrap, over '
          f"seeds and, of accuracies, over problems, widened by Student's quantile for few seeds. {FEW} Pairs share "
          'seed and problems. Where all runs are alike, accuracies and other shares have the exact interval of '
          'the problems of a test, and what is no share has one without width, which is no certainty. Seeds vary '
          f'fine-tuning alone: {_number_of_references(results)}. Learning curves, the area under them and the episodes '
          f'to {TARGET_TEXT} % are of sampled answers, those of the rollouts and of the last test, for the episodes '
          "with the reference's test as the first point and, but for both ends, averaged over three; a run that never "
          'gets there counts with all of its episodes. The '
          "probability of the right critical token is a mean over the test's problems, after right beginnings; KL in "
          "the tables is that of the policy's own answers to the first 128 of them, up to the first error at critical "
          'tokens, and KL in curves of right solutions is of 16 other problems, at critical tokens of 256. The '
          'penalty that is paid for a nat of KL has its coefficient in it. Probabilities of improvement are shares of '
          'pairs, a tie counting as half of one, with the interval of Clopper and Pearson over seeds.')


def _number_of_references(results):
  return ('each reference is one pre-training' if len(results['references']) > 1 else
          'nothing here says how other references would do')


def _seeds(results):
  numbers = [len(arm['seeds']) for arm in results['arms'].values()] or [0]
  low, high = min(numbers), max(numbers)
  return f'seeds of each arm: {low if low == high else f"{low} to {high}"}'


def _signatures(results):
  found = [f'- {label}: `{name}` in {number} of {len(arm["seeds"])} runs'
           for label, arm in results['arms'].items() for name, number in arm['signatures'].items()]
  return signature_lines(found)


def _origin(results):
  return (f'Commit {", ".join(results["commits"])} (`+`: with changes not committed), {", ".join(results["devices"])}; '
          f'{results["seconds"] / 60:.0f} minutes of runs, those shared with other studies among them. '
          '`results.json` has every figure with its interval, `results.csv` a row for each run, `../../runs` the runs '
          'themselves: their configs, metrics, and which answers were right.')


def _title(results):
  """Writes the title of a picture: the question, the model and the training problems."""
  unit = results['unit']
  return f'{results["question"]}\nReferences {_known(results)} {unit}, fine-tuned on N + {results["extra"]} {unit}'


def _known(results):
  sizes = sorted({one['known'] for one in results['references'].values()})
  return f'of N = {", ".join(map(str, sizes))}'


def _named(name, results):
  return FIGURES[name][0].replace('N+k', f'N+{results["extra"]}')


def _cell(name, value, sign=''):
  """Formats a metric with its interval, if it has one: shares in percent, others with three digits."""
  if value is None:
    return ''
  share = name in FIGURES and FIGURES[name][1]
  form, scale = (f'{sign}.1f', 100) if share else (f'{sign}.3g', 1)
  if np.isscalar(value):
    return 'none' if math.isnan(value) else format(scale * value, form)
  return interval_text(value, form, scale)
