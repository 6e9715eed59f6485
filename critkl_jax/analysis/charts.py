"""Pictures of token statistics: certainty and calibration of the reference, and curves over positions and steps."""

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

_LEAST = 1e-6  # lower limit of logarithmic axes: smaller values are drawn here
_NINES = 7  # 1 - certainty is shown down to 1e-7


def plot_certainty(tokens: dict[str, np.ndarray], path: str | os.PathLike, title: str) -> None:
  """Draws the histogram of the reference's certainty and its reliability diagram into a PNG.

  Both cover the tokens of each response up to the first wrong one. If the task knows no right solutions, the histogram
  covers all tokens and the reliability diagram is left out.

  Args:
    tokens: result of `reading.read_tokens`.
    path: file to write.
    title: title above the panels.
  """
  here = tokens['on_path' if 'on_path' in tokens else 'mask']
  critical = tokens.get('critical/oracle', np.zeros_like(here))
  known = 'ref_right_prob' in tokens
  figure = Figure(figsize=(WIDTH if known else WIDTH / 2, 3.8), layout='constrained')
  left, *others = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
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
  for right in others:
    _draw_reliability(right, tokens)
  save(figure, path, title, 'Tokens of responses up to the first wrong one.' if known else 'Tokens of responses.')


def _draw_reliability(right, tokens):
  """Draws the reliability diagram of the reference."""
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


def reliability(tokens: dict[str, np.ndarray], num_bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes the reliability diagram of the reference (Guo et al. 2017, arXiv 1706.04599).

  Counts only tokens that follow no wrong token.

  Args:
    tokens: result of `reading.read_tokens`.
    num_bins: bins of equal width over the reference's probability of its most probable token.

  Returns:
    `(said, rate, count)`, arrays over the bins that are not empty: mean probability, accuracy, number of tokens.
  """
  here = tokens['on_path']
  said = tokens['ref_top_prob'][here][:, 0]
  right = tokens['ref_right_prob'][here] >= said - 1e-5
  bins = np.minimum((said * num_bins).astype(int), num_bins - 1)
  count, total, hits = (np.bincount(bins, weights, num_bins) for weights in (None, said, right))
  filled = count > 0
  return total[filled] / count[filled], hits[filled] / count[filled], count[filled]


def plot_positions(tokens: dict[str, np.ndarray], path: str | os.PathLike, title: str) -> None:
  """Draws means over responses against the position into a PNG.

  Panels: 1 - certainty of the reference; KL; the probability of the right token under policy and reference, where all
  tokens before are right; the number of responses that reach the position.

  Args:
    tokens: result of `reading.read_tokens`.
    path: file to write.
    title: title above the panels.
  """
  mask, here = tokens['mask'], tokens.get('on_path')
  length = int(mask.any(0).sum())
  panels = (('1 - certainty of the reference (0: certain)', (('', 1 - tokens['certainty'], mask, REFERENCE, '-'),)),
            ('KL(policy || reference), nats per token', (('', tokens['kl'], mask, POLICY, '-'),)))
  if here is not None:
    panels += (('probability of the right token, where all tokens before are right', (
        ('policy', tokens['right_prob'], here, POLICY, '-'),
        ('reference', tokens['ref_right_prob'], here, REFERENCE, (0, (3, 2))))),)
  figure = Figure(figsize=(WIDTH, 1 + 2.2 * len(panels)), layout='constrained')
  axes = figure.subplots(len(panels) + 1, 1, sharex=True, height_ratios=(*[1] * len(panels), 0.6))
  for axis, (name, lines) in zip(axes, panels):
    for label, values, where, colour, line in lines:
      count = where[:, :length].sum(0)
      mean = np.where(where, values, 0)[:, :length].sum(0) / np.maximum(count, 1)
      axis.plot(np.where(count > 0, mean, np.nan), color=colour, linestyle=line, linewidth=1.1, label=label)
    axis.set_title(name)
    if len(lines) > 1:
      axis.legend(fontsize=8.5, frameon=False, loc='lower left', ncols=2)
  if here is not None:
    in_percent(axes[2].yaxis)
  _draw_reach(axes[-1], mask[:, :length], None if here is None else here[:, :length])
  save(figure, path, title, 'Means over the responses that reach a position; their number is at the bottom.')


def _draw_reach(axis, mask, here):
  """Draws how many responses reach each position and, if right solutions are known, how many are right before it."""
  positions = np.arange(mask.shape[1])
  axis.fill_between(positions, mask.sum(0), color=PALE, alpha=0.35, linewidth=0, label='reach the position')
  if here is not None:
    axis.plot(positions, here.sum(0), color=PALE, linewidth=1.4, label='with right tokens alone before it')
  axis.set_title('number of responses that reach the position')
  axis.set_ylim(0, None)
  axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
  axis.legend(fontsize=8.5, frameon=False, loc='lower left', ncols=2)
  axis.set_xlabel('position in the response, tokens')


def plot_steps(steps: dict[str, np.ndarray], path: str | os.PathLike, title: str, unit: str = '') -> None:
  """Draws the curves of `reading.read_steps` into a PNG.

  Args:
    steps: result of `reading.read_steps`.
    path: file to write.
    title: title above the panels.
    unit: word after the names of problem sets, `digits` for example.
  """
  tokens = (('critical tokens', 'critical', CRITICAL), ('other tokens', 'other', OTHER_TOKENS))
  colours = [OTHERS[4], OTHERS[5], *OTHERS[:4]]  # the last set is drawn first
  sets = list(zip(steps['sets'], steps['accuracy'].T))[::-1]
  panels = [('accuracy of greedy answers', [(f'{name} {unit}'.strip(), values, colours[i % len(colours)])
                                            for i, (name, values) in enumerate(sets)])]
  if 'critical_prob' in steps:
    panels += [(name, [(label, steps[f'{kind}_{field}'], colour) for label, kind, colour in tokens])
               for name, field in (('probability of the right token', 'prob'),
                                   ('KL(policy || reference), nats per token', 'kl'))]
  figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (name, lines) in zip(axes, panels):
    for label, values, colour in lines:
      axis.plot(steps['step'], values, color=colour, marker='o', markersize=3, label=label)
    panel_title(axis, name, WIDTH / len(panels))
    axis.set_xlabel('step (0: the reference)' if steps['step'][0] == 0 else 'step')
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.legend(fontsize=8.5, frameon=False)
    if 'KL' not in name:
      in_percent(axis.yaxis)
  axes[0].set_ylim(0, 1.04)
  save(figure, path, title, 'Probabilities and KL: means over the tokens of right solutions.')


def plot_comparison(found: dict[str, Any], path: str | os.PathLike) -> None:
  """Draws the result of `comparison.compare` into a PNG: drift by layer, KL by position."""
  kl = found.get('kl')
  figure = Figure(figsize=(WIDTH, 3.8), layout='constrained')
  left, *others = figure.subplots(1, 1 if kl is None else 2, squeeze=False)[0]
  rows = [row for row in found['drift'] if row['relative'] is not None]
  left.barh([row['layer'] for row in rows], [row['relative'] for row in rows], color=POLICY)
  left.invert_yaxis()
  in_percent(left.xaxis)
  left.set_xlabel("norm of the change, in % of the parameters' norm")
  left.set_title('How far did the parameters of each layer move?')
  for right in others:
    right.plot(kl['by_position'], color=POLICY, linewidth=1.1)
    right.set_title('KL(second || first) on right solutions')
    right.set_ylabel('nats per token')
    right.set_ylim(0, None)
    right.set_xlabel('position in the solution, tokens')
  save(figure, path, 'The second checkpoint compared with the first')


def plot_generations(gaps: np.ndarray, means: dict[str, np.ndarray], critical: np.ndarray, path: str | os.PathLike,
                     title: str) -> None:
  """Draws the certainty gaps of generations, and certainty against entropy and error at each position, into a PNG.

  Args:
    gaps: `[B]` certainty at critical tokens minus elsewhere, of each generation.
    means: `certainty`, `entropy` and `error` (the probability of a wrong token), means `[T]` over generations at each
      position; NaN where few reach it.
    critical: `[T]` share of critical tokens at each position.
    path: file to write.
    title: title above the panels.
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
