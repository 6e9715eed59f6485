"""How well a score picks out tokens: precision, recall, AUROC and average precision, with intervals over responses.

Letters: B responses, T tokens.
"""

from typing import Any

import numpy as np


def agreement(score: np.ndarray, called: np.ndarray, wanted: np.ndarray, weight: np.ndarray, confidence: float = 0.95,
              num_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
  """Compares what a detector finds with what was to be found.

  Intervals are percentile bootstrap over whole responses, because tokens of one are no independent draws.

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
    for nothing is wanted or called, it is None; resamples in which it has none are left out of its interval.

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
  times = np.random.default_rng(seed).multinomial(num_responses, np.full(num_responses, 1 / num_responses),
                                                  num_resamples)
  resampled = [_figures(rank, called, wanted, own * row[rows]) for row in times]
  found: dict[str, Any] = {}
  for name, value in _figures(rank, called, wanted, own).items():
    others = [figures[name] for figures in resampled if figures[name] is not None]
    found[name] = value if value is None else (
        value, *map(float, np.quantile(others, [(1 - confidence) / 2, (1 + confidence) / 2])))
  return found | {'base_rate': float(own @ wanted / own.sum()) if own.size else None}


def _figures(rank, called, wanted, weight):
  """Returns the figures of tokens with scores of these ranks, `[n]` each; None where one has no meaning."""
  positive, negative = (np.bincount(rank, weight * some) for some in (wanted, ~wanted))
  num_called, num_wanted, num_both = (float(weight @ some) for some in (called, wanted, called & wanted))
  num_pairs = num_wanted * float(negative.sum())
  right, all_above = (np.cumsum(some[::-1])[::-1] for some in (positive, positive + negative))
  precision_at = np.divide(right, all_above, out=np.zeros_like(right), where=all_above > 0)
  below = np.cumsum(negative) - negative
  return {'precision': num_both / num_called if num_called else None,
          'recall': num_both / num_wanted if num_wanted else None,
          'auroc': float(positive @ (below + 0.5 * negative)) / num_pairs if num_pairs else None,
          'average_precision': float(positive @ precision_at) / num_wanted if num_wanted else None}
