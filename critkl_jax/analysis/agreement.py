"""How well a score picks out tokens: precision, recall, AUROC and average precision, with intervals over responses.

Letters: B responses, T tokens.
"""

from typing import Any

import numpy as np

from critkl_jax.intervals import of_share

_NAMES = ('precision', 'recall', 'auroc', 'average_precision')


def agreement(score: np.ndarray, called: np.ndarray, wanted: np.ndarray, weight: np.ndarray, confidence: float = 0.95,
              num_resamples: int = 500, seed: int = 0) -> dict[str, Any]:
  """Compares what a detector finds with what was to be found.

  Intervals are percentile bootstrap over whole responses, because tokens of one are no independent draws. Where all
  resamples are alike, as of a precision of 1, they are exact ones, for as many responses as have a wanted token, or for
  a precision a called one.

  Args:
    score: float `[B, T]`, the greater the more critical.
    called: bool `[B, T]` whether the detector calls the token critical.
    wanted: bool `[B, T]` whether it is one.
    weight: float `[B, T]` for how many tokens each stands; 0 for those that are not compared.
    confidence: of the intervals.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `precision`, `recall`, `auroc` (ties count half) and `average_precision`, each as `(value, low, high)`, and
    `base_rate`, the share of wanted tokens, which is the average precision of chance. Where a figure has no meaning,
    for nothing is wanted, called or compared, it is None; resamples in which it has none are left out of its interval.

  Raises:
    ValueError: if the shapes differ.
  """
  if not np.shape(score) == np.shape(called) == np.shape(wanted) == np.shape(weight) or np.ndim(score) != 2:
    raise ValueError(f'score, called, wanted, weight: expected one shape [B, T], got {np.shape(score)}, '
                     f'{np.shape(called)}, {np.shape(wanted)} and {np.shape(weight)}.')
  wanted, called, weight = np.asarray(wanted, bool), np.asarray(called, bool), np.asarray(weight, np.float64)
  rows, columns = np.nonzero(weight)
  called, wanted, own = (x[rows, columns] for x in (called, wanted, weight))
  _, rank = np.unique(np.asarray(score, np.float64)[rows, columns], return_inverse=True)
  num_responses = len(weight)
  shares = np.full(num_responses, 1 / num_responses)
  times = np.random.default_rng(seed).multinomial(num_responses, shares, num_resamples)
  whole = _figures(rank, called, wanted, own)
  numbers = dict.fromkeys(_NAMES, np.unique(rows[wanted]).size) | {'precision': np.unique(rows[called]).size}
  resampled = [_figures(rank, called, wanted, own * row[rows]) for row in times]
  found: dict[str, Any] = {}
  for name, value in whole.items():
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    found[name] = None if np.isnan(value) else of_share(
        (value, *np.nanquantile([one[name] for one in resampled], edges)), numbers[name], confidence)
  return found | {'base_rate': float(own @ wanted / own.sum()) if own.size else None}


def _figures(rank, called, wanted, weight):
  """Returns the figures of tokens with scores of these ranks, `[n]` each; NaN where one has no meaning."""
  positive, negative = (np.bincount(rank, weight * some).astype(np.float64) for some in (wanted, ~wanted))
  num_called, num_wanted, num_both = (float(weight @ some) for some in (called, wanted, called & wanted))
  hit = np.nonzero(positive)[0]  # few of many ranks
  right, all_above = (np.cumsum(some[::-1])[::-1][hit] for some in (positive, positive + negative))
  below = (np.cumsum(negative) - 0.5 * negative)[hit]
  sums = (num_both, num_called), (num_both, num_wanted), (float(positive[hit] @ below), num_wanted * negative.sum()), (
      float(positive[hit] @ (right / all_above)), num_wanted)
  return {name: float(x / y) if y > 0 else np.nan for name, (x, y) in zip(_NAMES, sums)}
