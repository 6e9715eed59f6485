"""Pictures of tokens: how certain the reference is, whether rightly, and what happens along a response."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_INK, _OTHER = '#d9480f', '#2a6f97'


def plot_certainty(tokens: dict[str, np.ndarray], path: str | pathlib.Path, title: str) -> None:
  """Draws the histogram of the reference's certainty and its reliability diagram into a PNG.

  Of tokens after right ones alone, where it is known which one is right and critical.

  Args:
    tokens: of `reading.read_tokens`.
    path: file to write.
    title: stands above the panels.
  """
  here, critical = tokens['on_path'], tokens['critical/oracle']
  figure = Figure(figsize=(10, 3.4), layout='constrained')
  left, right = figure.subplots(1, 2)
  for where, name, colour in ((here & ~critical, 'others', _OTHER), (here & critical, 'critical tokens', _INK)):
    unsure = np.log10(np.clip(1 - tokens['certainty'][where], 1e-7, 1))
    if unsure.size:
      left.hist(unsure, bins=np.linspace(-7, 0, 36), weights=np.full(unsure.size, 1 / unsure.size), alpha=0.6,
                color=colour, label=f'{name}, {unsure.size}')
  left.set_xlabel('$\\log_{10}$(1 - certainty) of the reference: sure on the left')
  left.set_title('share of the tokens', fontsize=10)
  left.legend(fontsize=8)
  said, rate, count = reliability(tokens)
  right.plot([0, 1], [0, 1], color='#9aa7b4', linewidth=1)
  right.scatter(said, rate, s=20 + 60 * np.log10(np.maximum(count, 1)) / 5, color=_INK)
  right.set_xlabel("reference's probability of its most probable token")
  right.set_title('how often that is the right token', fontsize=10)
  right.set_xlim(0, 1.02)
  right.set_ylim(0, 1.02)
  _finish(figure, (left, right), path, title)


def reliability(tokens: dict[str, np.ndarray], num_bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns a reliability diagram of the reference (Guo et al. 2017, arXiv 1706.04599) over tokens after right ones.

  Args:
    tokens: of `reading.read_tokens`.
    num_bins: of equal width, over its probability of its most probable token.

  Returns:
    `(said, rate, count)`: of each bin that holds tokens the mean probability, the share of right ones, their number.
  """
  here = tokens['on_path']
  said = tokens['ref_top_prob'][here][:, 0]
  right = tokens['ref_right_prob'][here] >= said - 1e-5
  place = np.minimum((said * num_bins).astype(int), num_bins - 1)
  count, total, hits = (np.bincount(place, weights, num_bins) for weights in (None, said, right))
  filled = count > 0
  return total[filled] / count[filled], hits[filled] / count[filled], count[filled]


def plot_positions(tokens: dict[str, np.ndarray], path: str | pathlib.Path, title: str) -> None:
  """Draws means over responses at each position into a PNG: unsureness of the reference, KL, and the probability of the
  right token under policy and reference where all before is right.

  Args:
    tokens: of `reading.read_tokens`.
    path: file to write.
    title: stands above the panels.
  """
  mask, here = tokens['mask'], tokens['on_path']
  length = int(mask.any(0).sum())
  figure = Figure(figsize=(10, 6.2), layout='constrained')
  axes = figure.subplots(3, 1, sharex=True)
  panels = ((axes[0], "1 - certainty of the reference", (('', 1 - tokens['certainty'], mask, _OTHER),)),
            (axes[1], 'KL(policy || reference), nats', (('', tokens['kl'], mask, _OTHER),)),
            (axes[2], 'probability of the right token', (('reference', tokens['ref_right_prob'], here, _OTHER),
                                                         ('policy', tokens['right_prob'], here, _INK))))
  for axis, name, lines in panels:
    for label, values, where, colour in lines:
      count = where[:, :length].sum(0)
      mean = np.where(where, values, 0)[:, :length].sum(0) / np.maximum(count, 1)
      axis.plot(np.where(count > 0, mean, np.nan), color=colour, linewidth=1.1, label=label)
    axis.set_title(name, fontsize=10)
    if len(lines) > 1:
      axis.legend(fontsize=8)
  axes[2].set_xlabel('position in the response, tokens')
  _finish(figure, axes, path, title)


def plot_steps(steps: dict[str, np.ndarray], path: str | pathlib.Path, title: str) -> None:
  """Draws the curves of `reading.read_steps` into a PNG."""
  figure = Figure(figsize=(12, 3.4), layout='constrained')
  axes = figure.subplots(1, 3)
  short, long = (f'{n} digits' for n in steps['digits'])
  panels = (('accuracy, greedy', ((long, 'long', _INK), (short, 'short', _OTHER))),
            ('probability of the right token', (('critical tokens', 'critical_prob', _INK),
                                                ('others', 'other_prob', _OTHER))),
            ('KL from the reference, nats a token', (('critical tokens', 'critical_kl', _INK),
                                                     ('others', 'other_kl', _OTHER))))
  for axis, (name, lines) in zip(axes, panels):
    for label, field, colour in lines:
      axis.plot(steps['step'], steps[field], color=colour, marker='o', markersize=3, label=label)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel('step')
    axis.legend(fontsize=8)
  _finish(figure, axes, path, title)


def plot_comparison(found: dict[str, Any], path: str | pathlib.Path) -> None:
  """Draws what `comparison.compare` found into a PNG: drift by layer, KL by position."""
  figure = Figure(figsize=(11, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  rows = [row for row in found['drift'] if row['relative'] is not None]
  left.barh([row['layer'] for row in rows], [row['relative'] for row in rows], color=_OTHER)
  left.invert_yaxis()
  left.tick_params(axis='y', labelsize=8)
  left.set_title('how far parameters moved, relative to their size', fontsize=10)
  right.plot(found['kl']['by_position'], color=_INK, linewidth=1.1)
  right.set_title('KL(second || first) on right solutions, nats', fontsize=10)
  right.set_xlabel('position in the solution, tokens')
  _finish(figure, (left, right), path, 'second checkpoint against the first')


def _finish(figure, axes, path, title):
  for axis in axes:
    axis.grid(alpha=0.3)
  figure.suptitle(title.replace('$', r'\$'), fontsize=11)  # a path is no mathematics
  figure.savefig(path, dpi=110)


def plot_generations(gaps: np.ndarray, means: dict[str, np.ndarray], critical: np.ndarray, path: str | pathlib.Path,
                     title: str) -> None:
  """Draws into a PNG how much less certain a reference is at critical tokens, generation by generation, and how its
  certainty goes with entropy and errors, position by position.

  Args:
    gaps: `[G]` certainty at critical tokens minus elsewhere, of each generation.
    means: `certainty`, `entropy` and `error` (the probability of a wrong token), means `[T]` over generations at each
      position; NaN where few reach it.
    critical: `[T]` share of critical tokens at each position.
    path: file to write.
    title: stands above the panels.
  """
  figure = Figure(figsize=(12, 3.6), layout='constrained')
  left, middle, right = figure.subplots(1, 3)
  left.hist(gaps, bins=40, color=_OTHER)
  left.axvline(float(np.mean(gaps)), color=_INK)
  left.set_title(f'gap of {gaps.size} generations', fontsize=10)
  left.set_xlabel('certainty at critical tokens minus elsewhere')
  unsure = np.maximum(1 - means['certainty'], 1e-6)
  panels = (middle, 'entropy', 'mean entropy (nats)'), (right, 'error', 'probability of a wrong token')
  for axis, name, label in panels:
    dots = axis.scatter(unsure, np.maximum(means[name], 1e-6), c=critical, s=10, cmap='viridis', vmin=0)
    axis.set_xscale('log')
    axis.set_yscale('log')
    axis.set_xlabel('1 - mean certainty at a position')
    axis.set_title(label, fontsize=10)
  figure.colorbar(dots, ax=right, label='share of critical tokens')
  _finish(figure, (left, middle, right), path, title)
