"""Learning curves as a picture."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from critkl_jax.analysis.statistics import curve_band

WIDEST = 4  # panels in a row
PANELS = {
    'accuracy': 'accuracy of the rollouts',
    'kl': 'KL from the reference (nats a token)',
    'entropy': 'entropy (nats a token)',
    'weight': 'mean weight of the penalty',
}


def plot_learning_curves(rows: Sequence[dict[str, float]], path: str | pathlib.Path, title: str,
                         panels: dict[str, str] | None = None) -> None:
  """Draws metrics against the step, a panel each, into a PNG.

  Args:
    rows: metrics, each row with its `step`.
    path: file to write.
    title: stands above the panels.
    panels: metric -> label of its panel; those of a fine-tuning run if None. A metric that no row has is left out.
  """
  panels = {name: label for name, label in (panels or PANELS).items() if any(name in row for row in rows)}
  figure = Figure(figsize=(3.6 * max(len(panels), 1), 3.0), layout='constrained')
  for number, (name, label) in enumerate(panels.items(), start=1):
    axis = figure.add_subplot(1, len(panels), number)
    points = [(row['step'], row[name]) for row in rows if name in row]
    axis.plot(*zip(*points), marker='o', markersize=3, color='#2a6f97')
    _dress(axis, name, label)
  figure.suptitle(title, fontsize=11)
  figure.savefig(path, dpi=150)


def plot_study(groups: dict[str, Sequence[Sequence[dict[str, float]]]], path: str | pathlib.Path, title: str,
               panels: dict[str, str] | None = None, conditions: dict[str, str] | None = None) -> None:
  """Draws the mean curve of each group of runs with a band, the bootstrap 95% interval of the mean, into a PNG.

  Args:
    groups: label -> the metrics of its runs, each as in `plot_learning_curves`, all of the same steps.
    path: file to write.
    title: stands above the panels.
    panels: as in `plot_learning_curves`.
    conditions: label -> the condition of a group: each has panels of its own; all have the same if None. Labels
      that end in `, CONDITION` are shown without it, and those that are equal then have the same colour.
  """
  rows = [row for runs in groups.values() for run in runs for row in run]
  panels = {name: label for name, label in (panels or PANELS).items() if any(name in row for row in rows)}
  alike, places, handles = {}, {}, {}
  for group in groups:
    condition = (conditions or {}).get(group, '')
    short = group.removesuffix(f', {condition}')
    alike.setdefault(condition, {})[short] = groups[group]
    places.setdefault(short, len(places))
  deep = 1 if len(panels) <= WIDEST else 2  # rows of a condition
  wide = max(-(-len(panels) // deep), 1)
  figure = Figure(figsize=(4.2 * wide, 0.6 + 3.0 * deep * len(alike)), layout='constrained')
  for place, (condition, own) in enumerate(alike.items()):
    for number, (name, label) in enumerate(panels.items(), start=1):
      axis = figure.add_subplot(deep * len(alike), wide, place * deep * wide + number)
      for short, runs in own.items():
        runs = [run for run in runs if any(name in row for row in run)]  # older ones may lack it
        if not runs:
          continue
        mean, low, high = curve_band(np.array([[row.get(name) for row in run] for run in runs], float))
        steps = [row['step'] for row in runs[0]]
        handles[short], = axis.plot(steps, mean, linewidth=1.6, color=f'C{places[short]}')
        axis.fill_between(steps, low, high, color=f'C{places[short]}', alpha=0.18, linewidth=0)
      _dress(axis, name, f'{condition}\n{label}' if condition else label)
  if panels and len(groups) > 1:
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=min(len(handles), 4), fontsize=9)
  figure.suptitle(title, fontsize=11)
  figure.savefig(path, dpi=150)


def _dress(axis: Axes, name: str, label: str) -> None:
  axis.set_xlabel('iteration')
  axis.set_title(label, fontsize=10)
  axis.grid(alpha=0.3)
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  if name == 'accuracy':
    axis.set_ylim(0, 1.02)
