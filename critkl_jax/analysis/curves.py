"""Learning curves as a picture."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    axis.set_xlabel('iteration')
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name == 'accuracy':
      axis.set_ylim(0, 1.02)
  figure.suptitle(title, fontsize=11)
  figure.savefig(path, dpi=150)
