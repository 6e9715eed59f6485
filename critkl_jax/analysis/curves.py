"""Learning curves as pictures."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from critkl_jax.analysis.intervals import of_share
from critkl_jax.analysis.statistics import FEWEST_SEEDS, curve_band
from critkl_jax.analysis.style import (
    OTHERS,
    PENALTIES,
    WIDTH,
    colours_of,
    in_percent,
    level_line,
    panel_title,
    save,
    split_label,
)

WIDEST = 3  # most panels in a row
MOST_BANDS = 4  # most groups in a panel that all have bands; with more, only the three penalties do
SHARES = ('accuracy', 'critical_right', 'format_errors')  # shown in percent, as are the probabilities `critical/...`
PANELS = {
    'accuracy': 'accuracy of sampled answers',
    'kl': 'KL(policy || reference), nats per token',
    'entropy': 'entropy of the policy, nats per token',
    'weight': 'mean weight of the KL penalty',
}


def plot_learning_curves(rows: Sequence[dict[str, float]], path: str | os.PathLike, title: str,
                         panels: dict[str, str] | None = None, reference: float | None = None, penalty: str = '',
                         reference_label: str = 'reference, greedy') -> None:
  """Draws the metrics of one run against the iteration, one panel per metric, into a PNG.

  Args:
    rows: metrics, each row with its `step`.
    path: file to write.
    title: title above the panels.
    panels: metric -> label of its panel; `PANELS` if None. A metric that no row has is left out.
    reference: accuracy of the reference before training, drawn as a line in the panel of `accuracy`.
    penalty: the run's KL penalty, `prioritized`, `standard` or `none`; it sets the colour.
    reference_label: text at that line.
  """
  panels = _shown(rows, panels)
  figure = _panel_grid(list(panels.values()))
  for axis, name in zip(figure.axes, panels):
    points = [(row['step'], row[name]) for row in rows if name in row]
    axis.plot(*zip(*points), marker='o', markersize=3, color=PENALTIES.get(penalty, OTHERS[0]))
    _dress(axis, name)
    _draw_references(axis, name, [] if reference is None else [reference], reference_label)
  save(figure, path, title)


def plot_study(groups: Mapping[str, Sequence[Sequence[dict[str, float]]]], path: str | os.PathLike, title: str,
               panels: dict[str, str] | None = None, conditions: Mapping[str, str] | None = None,
               reference: float | Mapping[str, float] | None = None, reference_label: str = 'reference, greedy',
               colours: Mapping[str, str] | None = None) -> None:
  """Draws the mean curve of each group of runs, with a 95 % bootstrap band of the mean, into a PNG.

  If more than `MOST_BANDS` groups share a panel, only the prioritized, the standard and no penalty have bands.

  Args:
    groups: label -> the metrics of its runs, each as in `plot_learning_curves`, all with the same steps.
    path: file to write.
    title: title above the panels; a sentence on lines and bands is added.
    panels: as in `plot_learning_curves`.
    conditions: label -> the condition of a group. Each condition has its own panels, in which labels that end in
      `, CONDITION` are shown without it. If None, `style.split_label` finds the conditions.
    reference: accuracy of the reference before training, drawn as a line in panels of `accuracy`; or label -> accuracy
      if groups have different references (groups without a comparable one are missing).
    reference_label: text at that line.
    colours: label -> colour; `style.colours_of` if None.
  """
  panels = _shown([row for runs in groups.values() for run in runs for row in run], panels)
  colours = colours or colours_of(groups)
  cells = _by_condition(groups, conditions)
  if not isinstance(reference, Mapping):
    reference = {} if reference is None else dict.fromkeys(groups, reference)
  figure, axes = _condition_grid(cells, panels)
  handles, banded = {}, set()
  for (condition, name), axis in axes.items():
    own = cells[condition]
    shown = {short for short, label in own.items() if len(own) <= MOST_BANDS or colours[label] in PENALTIES.values()}
    for short, label in own.items():
      line = _draw_group(axis, name, groups[label], colours[label], short in shown)
      if line is not None:
        handles.setdefault(short, line)
    banded |= shown
    _dress(axis, name)
    _draw_references(axis, name, sorted({reference[label] for label in own.values() if label in reference}),
                     reference_label)
  if panels and len(groups) > 1:
    _add_legend(figure, handles)
  save(figure, path, title, _meaning(groups, [short for short in handles if short in banded], len(handles)))


def _shown(rows, panels):
  """Returns the panels whose metric is in at least one row."""
  return {name: label for name, label in (panels or PANELS).items() if any(name in row for row in rows)}


def _by_condition(groups, conditions):
  """Groups labels by condition: condition -> label without the condition -> label."""
  found = {}
  for label in groups:
    if conditions is None:
      short, condition = split_label(label)
    else:
      condition = conditions.get(label, '')
      short = label.removesuffix(f', {condition}')
    found.setdefault(condition, {})[short] = label
  return found


def _panel_grid(labels):
  """Makes a figure with a panel for each label; the last row may be shorter."""
  number = len(labels)
  wide = 2 if number == 4 else max(min(number, WIDEST), 1)
  deep = -(-number // wide)
  figure = Figure(figsize=(WIDTH if number > 2 else 3.4 * wide, 1.2 + 2.4 * deep), layout='constrained')
  for i in range(number):
    panel_title(figure.add_subplot(deep, wide, i + 1), labels[i], figure.get_size_inches()[0] / wide)
  return figure


def _condition_grid(cells, panels):
  """Makes a figure and returns it with its panels, (condition, metric) -> panel.

  Conditions are columns and metrics rows, or the other way round if there are many conditions. With a single
  condition the metrics fill the rows one after another.
  """
  if len(cells) <= 1:
    figure, condition = _panel_grid(list(panels.values())), next(iter(cells), '')
    return figure, {(condition, name): axis for name, axis in zip(panels, figure.axes)}
  across = len(cells) <= WIDEST + 1
  wide, deep = (len(cells), len(panels)) if across else (len(panels), len(cells))
  figure = Figure(figsize=(WIDTH, 1.2 + 2.2 * deep), layout='constrained')
  found, first = {}, {}
  for i, condition in enumerate(cells):
    for j, (name, label) in enumerate(panels.items()):
      axis = found[condition, name] = figure.add_subplot(
          deep, wide, 1 + (j * wide + i if across else i * wide + j),
          sharey=first.get(name) if _is_share(name) else None)
      first.setdefault(name, axis)
      panel_title(axis, f'{condition or "all else"}: {label}', WIDTH / wide)
  return figure, found


def _draw_group(axis, name, runs, colour, band):
  """Draws the mean curve of a group and returns its line; None if no run has the metric.

  With `band` it also draws the interval of the mean, or the single runs if they are too few for an interval.
  """
  runs = [run for run in runs if any(name in row for row in run)]  # records of older versions may lack the metric
  if not runs:
    return None
  curves, steps = np.array([[row.get(name) for row in run] for run in runs], float), [row['step'] for row in runs[0]]
  mean, low, high = curve_band(curves)
  if _is_share(name):
    low, high = np.array([of_share(point, number)[1:] for *point, number in zip(mean, low, high, _episodes(runs[0]))]).T
  line, = axis.plot(steps, mean, linewidth=1.6, color=colour)
  if band and 1 < len(runs) < FEWEST_SEEDS:
    axis.plot(steps, curves.T, linewidth=0.6, color=colour, alpha=0.6)
  elif band:
    axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
  return line


def _episodes(run):
  """Returns the number of episodes behind each row's shares; 0 if the row lacks it."""
  lengths = np.array([[row.get(name) or np.nan for name in ('num_tokens', 'response_length')] for row in run], float)
  return np.nan_to_num(np.rint(lengths[:, 0] / lengths[:, 1])).astype(int)


def _draw_references(axis, name, shares, label):
  """Draws the references' accuracies before training as labelled lines, if the panel shows accuracy."""
  for share in shares if name == 'accuracy' else ():
    level_line(axis, share, f'{label}: {100 * share:.0f} %', height=1.0 if share < 0.15 else None)  # no room below


def _dress(axis: Axes, name: str) -> None:
  axis.set_xlabel('iteration')
  axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  if _is_share(name):
    in_percent(axis.yaxis)
  else:
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
  if name == 'accuracy':
    axis.set_ylim(0, 1.02)
  elif name.startswith('weight'):
    axis.set_ylim(-0.03, 1.03)


def _is_share(name):
  return name in SHARES or (name.startswith('critical/') and name != 'critical/kl')


def _add_legend(figure, handles):
  """Adds a legend below the panels; the figure grows by the legend's rows after the first."""
  width, height = figure.get_size_inches()
  columns = max(int(width / (0.075 * max(map(len, handles), default=1) + 0.6)), 1)
  columns = min(len(handles), columns, 5)
  figure.set_size_inches(width, height + 0.2 * ((len(handles) - 1) // columns))
  figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=columns, fontsize=9, frameon=False)


def _meaning(groups, banded, number):
  """Writes the sentence that explains lines and bands."""
  seeds = sorted({len(runs) for runs in groups.values()})
  if not seeds:
    return ''
  if seeds[-1] == 1:
    return 'One seed each.' if number > 1 else ''
  many = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  whose = '' if len(banded) == number else f' (of {", ".join(banded)})'
  bands = f'; bands{whose}: 95 % interval of the mean over seeds' if banded and seeds[-1] >= FEWEST_SEEDS else ''
  thin = f'; thin lines{whose}: single seeds' if banded and seeds[0] < FEWEST_SEEDS else ''
  return f'Lines: mean over {many} seeds{bands}{thin}.'
