"""Writes the page of a ladder."""

import collections
import itertools
import pathlib
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from critkl_jax.analysis.style import WIDTH, colours_of, in_percent, level_line, panel_title, save
from critkl_jax.runtime import storage
from critkl_jax.studies.catalog import Study
from critkl_jax.studies.files import FEW, interval_text, signature_lines, table, write_files
from critkl_jax.studies.ladder import GAIN, LEAST
from critkl_jax.studies.plan import Plan


def write_ladder(study: Study, plan: Plan, results: dict[str, Any]) -> pathlib.Path:
  """Writes the page of a ladder under `WORKDIR/studies/NAME`, and returns that directory."""
  home = plan.workdir / 'studies' / study.name
  home.mkdir(parents=True, exist_ok=True)
  rows = [{'arm': label, 'seed': seed, **row} for label, arm in results['arms'].items()
          for seed, runs in arm['climbs'].items() for row in runs]
  write_files(home, results, rows)
  if rows:
    _plot_climbs(results, home / 'climbs.png')
  storage.write_text(home / 'README.md', _ladder_page(results))
  return home


def ladder_verdict(row: dict[str, Any]) -> str:
  """Writes a contrast of climbs as a sentence."""
  _, low, high = row['difference']
  said = 'higher than' if low > 0 else 'less high than' if high < 0 else 'not shown to climb higher than'
  verb = 'is' if said.startswith('not') else 'climbs'
  last = row['rungs'][-1]
  return (f'**{row["arm"]}** {verb} {said} **{row["against"]}**: {interval_text(row["difference"], "+.2f")} digits, '
          f'{len(row["seeds"])} pairs; on {last["digits"]} digits, the most that both tried, '
          f'{interval_text(last["difference"], "+.1f", 100)} points, {len(last["seeds"])} pairs.')


def _plot_climbs(results, path):
  """Draws the accuracies of all runs of the climbs.

  Columns are penalties; rows are the digits that a run is trained on, and k digits fewer.
  """
  arms, colours, step = results['arms'], colours_of(results['arms']), results['extra_digits']
  fewer = 'one digit fewer' if step == 1 else f'{step} digits fewer'
  figure = Figure(figsize=(WIDTH, 5.6), layout='constrained')
  axes = figure.subplots(2, len(arms), sharex=True, sharey=True, squeeze=False)
  for (label, arm), column in zip(arms.items(), axes.T):
    for axis, name, what in zip(column, ('accuracy', 'accuracy_known'), ('the digits trained on', fewer)):
      for runs in arm['climbs'].values():
        tries = [sum(other['digits'] == row['digits'] for other in runs[:k]) for k, row in enumerate(runs)]
        axis.plot([row['digits'] + 0.12 * n for row, n in zip(runs, tries)], [row[name] for row in runs],
                  marker='o', markersize=4, linewidth=1.3, color=colours[label], alpha=0.8)
      panel_title(axis, f'{label}: greedy accuracy on {what}', WIDTH / len(arms))
      axis.xaxis.set_major_locator(MaxNLocator(integer=True))
      in_percent(axis.yaxis)
    level_line(column[0], LEAST, f'{100 * LEAST:.0f} %: rung reached', height=LEAST + 0.11)
    column[1].set_xlabel('rung: digits trained on')
  save(figure, path, f'{results["question"]}\nEach line is a climb (one seed), each dot a run; later tries at the same '
       'digits stand a little to the right.')


def _rungs_lines(results):
  rows = [[row['arm'], row['against'], str(one['digits']), str(len(one['seeds'])),
           interval_text(one['difference'], '+.1f', 100)] for row in results['contrasts'] for one in row['rungs']]
  return ['Greedy accuracy of the last tries at a rung, where both climbs of a seed tried it; from the second rung on '
          'each starts from what its own penalty left:', '',
          *table(['arm', 'minus', 'digits', 'pairs', 'difference (points)'], rows), ''] if rows else []


def _signatures(results):
  runs, seen = collections.Counter(), collections.Counter()
  for label, arm in results['arms'].items():
    for row in itertools.chain(*arm['climbs'].values()):
      runs[label, row['digits']] += 1
      seen.update((label, row['digits'], name) for name in row['signatures'].split())
  return signature_lines([f'- {label}, {digits} digits: `{name}` in {number} of {runs[label, digits]} runs'
                          for (label, digits, name), number in sorted(seen.items())])


def _ladder_page(results):
  rows = []
  for label, arm in results['arms'].items():
    reached, kept = arm['reached'], arm['retained']
    climbs = '; '.join(' '.join(f'{row["digits"]}: {100 * row["accuracy"]:.0f}' for row in runs)
                       for runs in arm['climbs'].values())
    rows.append([label, str(len(arm['seeds'])), interval_text(reached, '.2f'),
                 interval_text(kept, '.1f', 100), climbs])
  picture = ['![climbs](climbs.png)', ''] if rows else []
  missing = [f'**Not complete: {results["num_missing"]} climbs are not at their end.**', ''] if (
      results['num_missing']) else []
  return '\n'.join([
      f'# {results["study"]}', '', f'{results["question"]} Counterpart: {results["counterpart"]}.', '',
      f'Rungs are k = {results["extra_digits"]} digits apart, and a run is a try at one; the result of each run is the '
      'reference of the next. A rung is reached with at least half of its problems answered (greedy); else it is tried '
      f'again, until a try gains less than {100 * GAIN:.0f} points: there the climb ends, or after {results["rungs"]} '
      'rungs. What is still known is that of the run that reached the highest rung. Intervals are 95 % bootstrap over '
      f"seeds, widened by Student's quantile. {FEW} Where all climbs reach the same there is nothing to resample: "
      'accuracies then have the interval of the problems of a test, and of digits an interval without width is no '
      'certainty.', '',
      results['note'], '', *missing,
      '## What the climbs say', '', *(f'- {ladder_verdict(row)}' for row in results['contrasts']), '',
      *table(['arm', 'climbs', 'digits reached', 'still known of the first N digits (%)',
               'digits: accuracy (%) of each run, climb by climb'], rows), '', *picture, *_rungs_lines(results),
      '## Signatures of failure', '', *_signatures(results), '', '## How it was made', '',
      f'Commit {", ".join(results["commits"])}; {results["seconds"] / 60:.0f} minutes of runs.', ''])
