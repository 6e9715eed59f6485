"""How well a score picks out tokens: precision, recall, AUROC and average precision, with intervals over responses.

Letters: B responses, T tokens.
"""

from typing import Any

import numpy as np

_NAMES = ('precision', 'recall', 'auroc', 'average_precision')
_BINS = 2048  # of scores, in resamples

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
  num_ranks, num_responses = int(rank.max(initial=0)) + 1, len(weight)

  def figures(bins, times):
    """Of each resample, `times` `[R, B]` each response; ranks are brought to so many bins."""
    place = rows * bins + rank * bins // num_ranks
    tables = (np.bincount(place, own * some, num_responses * bins).reshape(-1, bins) for some in (wanted, ~wanted))
    sums = (np.bincount(rows, own * some, num_responses) for some in (called, wanted, called & wanted))
    return _figures(*(times @ x.astype(np.float64) for x in (*tables, *sums)))

  whole = figures(num_ranks, np.ones((1, num_responses))) if own.size else dict.fromkeys(_NAMES, np.full(1, np.nan))
  shares = np.full(num_responses, 1 / num_responses)
  times = np.random.default_rng(seed).multinomial(num_responses, shares, num_resamples)
  resampled = figures(min(num_ranks, _BINS), times) if own.size else whole
  found: dict[str, Any] = {}
  for name, (value,) in whole.items():
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    found[name] = None if np.isnan(value) else (
        float(value), *map(float, np.nanquantile(resampled[name], edges)))
  return found | {'base_rate': float(own @ wanted / own.sum()) if own.size else None}


def _figures(positive, negative, num_called, num_wanted, num_both):
  """Returns the figures `[R]` of R resamples from weights of wanted and other tokens by rank, `[R, ranks]`, and sums,
  `[R]`; NaN where one has no meaning."""
  right, all_above = (np.cumsum(some[:, ::-1], 1)[:, ::-1] for some in (positive, positive + negative))
  precision_at = np.divide(right, all_above, out=np.zeros_like(right), where=all_above > 0)
  below = np.cumsum(negative, 1) - negative
  pairs = num_wanted * negative.sum(1)
  values = ((num_both, num_called), (num_both, num_wanted), ((positive * (below + 0.5 * negative)).sum(1), pairs),
            ((positive * precision_at).sum(1), num_wanted))
  return {name: np.divide(x, y, out=np.full(x.shape, np.nan), where=y > 0) for name, (x, y) in zip(_NAMES, values)}
