"""Intervals of what a study finds, paired by seed and problem."""

import numpy as np


def paired_difference(rewards: np.ndarray, baseline: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
                      seed: int = 0) -> tuple[float, float, float]:
  """Returns the mean difference of two methods and its percentile bootstrap interval.

  Seeds are resampled, and problems within them, the same for both methods (a hierarchical bootstrap of pairs; Efron and
  Tibshirani 1993, chapter 8). With one seed the interval tells of problems alone.

  Args:
    rewards: float `[S, M]` of one method, S seeds and M problems.
    baseline: float `[S, M]` of the other, of the same seeds and problems.
    confidence: of the interval.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `(mean, low, high)`.

  Raises:
    ValueError: if the shapes differ or an axis is empty.
  """
  difference = np.asarray(rewards, np.float64) - np.asarray(baseline, np.float64)
  if np.shape(rewards) != np.shape(baseline) or difference.ndim != 2 or not difference.size:
    raise ValueError(f'baseline: expected [S, M] as rewards, got {np.shape(rewards)} and {np.shape(baseline)}.')
  rng = np.random.default_rng(seed)
  num_seeds, num_problems = difference.shape
  means = np.empty(num_resamples)
  for i in range(num_resamples):
    some = difference[rng.integers(0, num_seeds, num_seeds)][:, rng.integers(0, num_problems, num_problems)]
    means[i] = some.mean()
  low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
  return float(difference.mean()), float(low), float(high)


def curve_band(curves: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the mean over seeds of curves `[S, T]` and the bootstrap interval of the mean at each step, `[T]` each."""
  curves = np.asarray(curves, np.float64)
  rng = np.random.default_rng(seed)
  means = curves[rng.integers(0, len(curves), (num_resamples, len(curves)))].mean(1)
  low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
  return curves.mean(0), low, high
