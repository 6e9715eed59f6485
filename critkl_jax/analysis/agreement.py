"""Agreement of a detector with a target: precision, recall, AUROC and average precision, with intervals over responses.

Letters: B episodes, T response tokens.
"""

from typing import Any

import numpy as np

from critkl_jax.analysis.intervals import of_share

_NAMES = ('precision', 'recall', 'auroc', 'average_precision')


def detector_agreement(score: np.ndarray, called: np.ndarray, wanted: np.ndarray, weight: np.ndarray,
                       confidence: float = 0.95, num_resamples: int = 500, seed: int = 0) -> dict[str, Any]:
  """Computes precision, recall, AUROC and average precision of a detector against target tokens.

  Intervals are percentile bootstrap over whole responses, because tokens of one response are not independent. If all
  resamples are equal, as for a precision of 1, the exact interval replaces it. Its sample size is the number of
  responses that contain a target token, or for precision a called token.

  Args:
    score: float `[B, T]` the detector's score, greater for more critical tokens.
    called: bool `[B, T]` whether the detector calls the token critical.
    wanted: bool `[B, T]` whether the token is a target.
    weight: float `[B, T]` sampling weight: how many tokens this token represents; 0 for tokens left out.
    confidence: level of the intervals.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.

  Returns:
    `precision`, `recall`, `auroc` (ties count half) and `average_precision`, each as `(value, low, high)`, and
    `base_rate`, the share of target tokens, which is the average precision of random scores. A metric is None where it
    is undefined (no target, called or compared tokens); resamples where it is undefined do not enter its interval.

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
  draws = np.random.default_rng(seed).multinomial(num_responses, shares, num_resamples)
  metrics = _metrics(rank, called, wanted, own)
  numbers = dict.fromkeys(_NAMES, np.unique(rows[wanted]).size) | {'precision': np.unique(rows[called]).size}
  resampled = [_metrics(rank, called, wanted, own * counts[rows]) for counts in draws]
  edges = [(1 - confidence) / 2, (1 + confidence) / 2]
  found: dict[str, Any] = {}
  for name, value in metrics.items():
    found[name] = None if np.isnan(value) else of_share(
        (value, *np.nanquantile([one[name] for one in resampled], edges)), numbers[name], confidence)
  return found | {'base_rate': float(own @ wanted / own.sum()) if own.size else None}


def _metrics(rank, called, wanted, weight):
  """Computes the metrics from the rank of each token's score; arguments `[num_tokens]`; NaN where undefined."""
  positive, negative = (np.bincount(rank, weight * some).astype(np.float64) for some in (wanted, ~wanted))
  num_called, num_wanted, num_both = (float(weight @ some) for some in (called, wanted, called & wanted))
  hit = np.nonzero(positive)[0]  # ranks that hold a target token
  right, all_above = (np.cumsum(some[::-1])[::-1][hit] for some in (positive, positive + negative))
  below = (np.cumsum(negative) - 0.5 * negative)[hit]
  sums = (num_both, num_called), (num_both, num_wanted), (float(positive[hit] @ below), num_wanted * negative.sum()), (
      float(positive[hit] @ (right / all_above)), num_wanted)
  return {name: float(x / y) if y > 0 else np.nan for name, (x, y) in zip(_NAMES, sums)}
