"""Pictures of tokens: how certain the reference is, whether rightly, and what happens along a response."""

import os
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from critkl_jax.analysis.style import (
    CRITICAL,
    OTHER_TOKENS,
    OTHERS,
    PALE,
    POLICY,
    REFERENCE,
    WIDTH,
    in_percent,
    panel_title,
    save,
)

_LEAST = 1e-6  # what is less is shown as this
_NINES = 7  # 1 - certainty is shown down to 1e-7


def plot_certainty(tokens: dict[str, np.ndarray], path: str | os.PathLike, title: str) -> None:
  """Draws the histogram of the reference's certainty and its reliability diagram into a PNG.

  Of tokens after right ones alone, where it is known which one is right and critical.

  Args:
    tokens: of `reading.read_tokens`.
    path: file to write.
    title: stands above the panels.
  """
  here, critical = tokens['on_path'], tokens['critical/oracle']
  figure = Figure(figsize=(WIDTH, 3.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  for where, name, colour in ((here & ~critical, 'other tokens', OTHER_TOKENS),
                              (here & critical, 'critical tokens', CRITICAL)):
    nines = -np.log10(np.clip(1 - tokens['certainty'][where], 10.0**-_NINES, 1))
    if nines.size:
      left.hist(nines, bins=np.linspace(0, _NINES, 36), weights=np.full(nines.size, 1 / nines.size), alpha=0.6,
                color=colour, label=f'{name} ({nines.size:,})')
  left.set_xticks(range(_NINES + 1), ['0', '0.9', '0.99', '0.999', *(
      f'$1-10^{{-{n}}}$' if n % 2 else '' for n in range(4, _NINES + 1))])
  left.set_ylim(top=1.25 * left.get_ylim()[1])  # room for the legend
  left.set_xlabel("reference's certainty (logarithmic towards 1)")
  left.set_ylabel('share of tokens')
  in_percent(left.yaxis)
  left.set_title('How certain is the reference?')
  left.legend(fontsize=8.5, frameon=False)
  said, rate, count = reliability(tokens)
  right.plot([0, 1], [0, 1], color=PALE, linewidth=1)
  right.annotate('calibrated', (0.12, 0.12), (4, -4), textcoords='offset points', va='top', fontsize=8.5, color=PALE)
  right.scatter(said, rate, s=20 + 60 * np.log10(np.maximum(count, 1)) / 5, color=REFERENCE, clip_on=False, zorder=3)
  for x, y, number in zip(said, rate, count):
    right.annotate(f'{int(number):,}', (x, y), (-6, 3), textcoords='offset points', ha='right', fontsize=8)
  right.set_xlabel("reference's probability of its most probable token")
  right.set_ylabel('share of them that are right')
  right.set_title('Is it right as often as it says? (number of tokens at each dot)')
  for axis in (right.xaxis, right.yaxis):
    in_percent(axis)
  right.set(xlim=(0, 1.02), ylim=(0, 1.04))
  save(figure, path, title, 'Tokens of responses up to the first wrong one.')


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


def plot_positions(tokens: dict[str, np.ndarray], path: str | os.PathLike, title: str) -> None:
  """Draws means over responses at each position into a PNG: unsureness of the reference, KL, the probability of the
  right token under policy and reference where all before is right, and how many responses reach the position.

  Args:
    tokens: of `reading.read_tokens`.
    path: file to write.
    title: stands above the panels.
  """
  mask, here = tokens['mask'], tokens['on_path']
  length = int(mask.any(0).sum())
  figure = Figure(figsize=(WIDTH, 7.6), layout='constrained')
  axes = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1, 1, 0.6))
  panels = (('1 - certainty of the reference (0: certain)', (('', 1 - tokens['certainty'], mask, REFERENCE, '-'),)),
            ('KL(policy || reference), nats per token', (('', tokens['kl'], mask, POLICY, '-'),)),
            ('probability of the right token, where all tokens before are right', (
                ('policy', tokens['right_prob'], here, POLICY, '-'),
                ('reference', tokens['ref_right_prob'], here, REFERENCE, (0, (3, 2))))))
  for axis, (name, lines) in zip(axes, panels):
    for label, values, where, colour, line in lines:
      count = where[:, :length].sum(0)
      mean = np.where(where, values, 0)[:, :length].sum(0) / np.maximum(count, 1)
      axis.plot(np.where(count > 0, mean, np.nan), color=colour, linestyle=line, linewidth=1.1, label=label)
    axis.set_title(name)
    if len(lines) > 1:
      axis.legend(fontsize=8.5, frameon=False, loc='lower left', ncols=2)
  in_percent(axes[2].yaxis)
  _draw_reach(axes[3], mask[:, :length], here[:, :length])
  save(figure, path, title, 'Means over the responses that reach a position; their number is at the bottom.')


def _draw_reach(axis, mask, here):
  """Draws how many responses reach each position, and how many of them are right so far."""
  positions = np.arange(mask.shape[1])
  axis.fill_between(positions, mask.sum(0), color=PALE, alpha=0.35, linewidth=0, label='reach the position')
  axis.plot(positions, here.sum(0), color=PALE, linewidth=1.4, label='with right tokens alone before it')
  axis.set_title('number of responses that reach the position')
  axis.set_ylim(0, None)
  axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
  axis.legend(fontsize=8.5, frameon=False, loc='lower left', ncols=2)
  axis.set_xlabel('position in the response, tokens')


def plot_steps(steps: dict[str, np.ndarray], path: str | os.PathLike, title: str) -> None:
  """Draws the curves of `reading.read_steps` into a PNG."""
  figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
  axes = figure.subplots(1, 3)
  short, long = (f'{n} digits' for n in steps['digits'])
  tokens = (('critical tokens', 'critical', CRITICAL), ('other tokens', 'other', OTHER_TOKENS))
  panels = (('accuracy of greedy answers', ((long, 'long', OTHERS[4]), (short, 'short', OTHERS[5]))),
            ('probability of the right token', [(label, f'{kind}_prob', colour) for label, kind, colour in tokens]),
            ('KL(policy || reference), nats per token',
             [(label, f'{kind}_kl', colour) for label, kind, colour in tokens]))
  for axis, (name, lines) in zip(axes, panels):
    for label, field, colour in lines:
      axis.plot(steps['step'], steps[field], color=colour, marker='o', markersize=3, label=label)
    panel_title(axis, name, WIDTH / 3)
    axis.set_xlabel('step (0: the reference)' if steps['step'][0] == 0 else 'step')
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.legend(fontsize=8.5, frameon=False)
    if 'KL' not in name:
      in_percent(axis.yaxis)
  axes[0].set_ylim(0, 1.04)
  save(figure, path, title, 'Probabilities and KL: means over the tokens of right solutions.')


def plot_comparison(found: dict[str, Any], path: str | os.PathLike) -> None:
  """Draws what `comparison.compare` found into a PNG: drift by layer, KL by position."""
  figure = Figure(figsize=(WIDTH, 3.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  rows = [row for row in found['drift'] if row['relative'] is not None]
  left.barh([row['layer'] for row in rows], [row['relative'] for row in rows], color=POLICY)
  left.invert_yaxis()
  in_percent(left.xaxis)
  left.set_xlabel("norm of the change, in % of the parameters' norm")
  left.set_title('How far did the parameters of each layer move?')
  right.plot(found['kl']['by_position'], color=POLICY, linewidth=1.1)
  right.set_title('KL(second || first) on right solutions')
  right.set_ylabel('nats per token')
  right.set_ylim(0, None)
  right.set_xlabel('position in the solution, tokens')
  save(figure, path, 'The second checkpoint compared with the first')


def plot_generations(gaps: np.ndarray, means: dict[str, np.ndarray], critical: np.ndarray, path: str | os.PathLike,
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
  figure = Figure(figsize=(WIDTH, 3.6), layout='constrained')
  left, middle, right = figure.subplots(1, 3)
  left.hist(gaps, bins=40, color=PALE)
  mean = float(np.mean(gaps))
  left.axvline(mean, color=REFERENCE)
  left.annotate(f'mean {mean:+.3f}', (mean, 0.96), (-4, 0), ha='right', va='top', fontsize=8.5, color=REFERENCE,
                xycoords=('data', 'axes fraction'), textcoords='offset points')
  panel_title(left, f'Certainty gap of {gaps.size} generations', WIDTH / 3)
  left.set_xlabel('certainty: critical minus other tokens')
  left.set_ylabel('generations')
  unsure = np.maximum(1 - means['certainty'], _LEAST)
  colours = LinearSegmentedColormap.from_list('critical', [PALE, CRITICAL])
  panels = ((middle, 'entropy', 'Entropy at each position', 'nats'),
            (right, 'error', 'Probability of a wrong token at each position', None))
  for axis, name, label, unit in panels:
    dots = axis.scatter(unsure, np.maximum(means[name], _LEAST), c=critical, s=10, cmap=colours, vmin=0)
    axis.set(xscale='log', yscale='log', xlabel='1 - mean certainty at a position', ylabel=unit)
    panel_title(axis, label, WIDTH / 3)
  bar = figure.colorbar(dots, ax=right, label='share of critical tokens')
  in_percent(bar.ax.yaxis)
  save(figure, path, title, 'Middle and right: a dot for each position, means over generations, 1e-6 at least.')
