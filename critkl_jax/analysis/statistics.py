"""Confidence intervals of a study's results, paired by seed and problem.

With fewer than `FEWEST_SEEDS` seeds the bounds are NaN, because two or three runs do not show how much runs vary. They
have only a handful of resamples; equal runs would give an interval without width; and Student's quantile, 12.7 for two
runs, would give a useless interval. For a single model only problems are resampled (`problem_statistics`).
"""

import numpy as np
import scipy.special  # all of scipy.stats would take as long to import as jax

from critkl_jax.analysis.intervals import share_interval

FEWEST_SEEDS = 4  # for an interval over seeds


def paired_difference(rewards: np.ndarray, baseline: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
                      seed: int = 0) -> tuple[float, float, float]:
  """Returns the mean difference of two methods and its bootstrap interval.

  Seeds and problems are both resampled, the same for both methods and all seeds (a bootstrap of pairs; Efron and
  Tibshirani 1993, chapter 8), as in `paired_statistics`.

  Args:
    rewards: float `[num_seeds, num_problems]` of one method.
    baseline: float `[num_seeds, num_problems]` of the other, with the same seeds and problems.
    confidence: level of the interval.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.

  Returns:
    `(mean, low, high)`; the bounds are NaN for fewer than `FEWEST_SEEDS` seeds.

  Raises:
    ValueError: if the shapes differ or an axis is empty.
  """
  if np.shape(rewards) != np.shape(baseline) or np.ndim(rewards) != 2 or not np.size(rewards):
    raise ValueError(f'rewards, baseline: expected one shape [num_seeds, num_problems], got {np.shape(rewards)} and '
                     f'{np.shape(baseline)}.')
  return paired_statistics(rewards, baseline, confidence, num_resamples, seed)['difference']


def problem_statistics(values: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
                       ) -> tuple[float, float, float]:
  """Returns the mean over problems of one model, or of the difference of two, with its percentile bootstrap interval.

  The interval covers the choice of problems, not the variation between runs.

  Args:
    values: float `[num_problems]`.
    confidence: level of the interval.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.

  Returns:
    `(mean, low, high)`.

  Raises:
    ValueError: if there is no problem.
  """
  if np.ndim(values) != 1 or not np.size(values):
    raise ValueError(f'values: expected [num_problems], not empty; got {np.shape(values)}.')
  estimators = {'mean': lambda x: x.mean(-1)}
  return _with_intervals(estimators, _matrix([values]), confidence, num_resamples, seed, factor=1.0)['mean']


def curve_band(curves: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the mean over seeds of curves `[num_seeds, num_steps]` with its bootstrap interval, `[num_steps]` each.

  The interval is widened for few seeds as in `seed_statistics`; its bounds are NaN for fewer than `FEWEST_SEEDS`.
  """
  curves = np.asarray(curves, np.float64)
  rng, factor, mean = np.random.default_rng(seed), _widening(len(curves), confidence), curves.mean(0)
  means = curves[rng.integers(0, len(curves), (num_resamples, len(curves)))].mean(1)
  low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
  return mean, mean + factor * (low - mean), mean + factor * (high - mean)


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
  """Returns the mean of the middle half of values along an axis (Agarwal et al. 2021, arXiv 2108.13264).

  The lowest and the highest quarter have weight 0; values at the boundaries have fractional weights.
  """
  values = np.sort(np.asarray(values, np.float64), axis)
  count = values.shape[axis]
  ranks = np.arange(count)
  weight = np.clip(np.minimum(ranks + 1, 0.75 * count) - np.maximum(ranks, 0.25 * count), 0, None)
  return np.tensordot(values, weight / weight.sum(), (axis, 0))


def seed_statistics(values: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
                    ) -> dict[str, tuple[float, float, float]]:
  """Returns mean and interquartile mean of a metric over seeds, with bootstrap intervals.

  Args:
    values: float `[num_seeds]`, or `[num_seeds, num_problems]` with the same problems for all seeds.
    confidence: level of the bootstrap intervals over seeds and problems; for few seeds they are widened, so that
      intervals of a mean have the coverage of Student's.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.

  Returns:
    `(value, low, high)` of `mean` and `iqm`; the bounds are NaN for fewer than `FEWEST_SEEDS` seeds.

  Raises:
    ValueError: if there is no value.
  """
  return _with_intervals({'mean': lambda x: x.mean(-1), 'iqm': lambda x: interquartile_mean(x, x.ndim - 1)},
                         _matrix(values), confidence, num_resamples, seed, _widening(len(values), confidence))


def paired_statistics(values: np.ndarray, baseline: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
                      seed: int = 0) -> dict[str, tuple[float, float, float]]:
  """Compares a metric of runs with the same metric of baseline runs, paired by seed.

  Args:
    values: as in `seed_statistics`.
    baseline: values of the baseline, with the same seeds and problems.
    confidence: as in `seed_statistics`.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.

  Returns:
    `(value, low, high)` of `difference`, the mean difference; `iqm_difference`, its interquartile mean over seeds; and
    `improvement`, the probability that a run beats the baseline run of its seed (ties count half), with
    `share_interval` over seeds. All are NaN if a value is NaN. The bounds of the first two are also NaN for fewer than
    `FEWEST_SEEDS` seeds.

  Raises:
    ValueError: if the shapes differ or there is no value.
  """
  if np.shape(values) != np.shape(baseline):
    raise ValueError(f'baseline: expected {np.shape(values)} as values, got {np.shape(baseline)}.')
  differences = _matrix(values) - _matrix(baseline)
  found = _with_intervals({'difference': lambda x: x.mean(-1),
                           'iqm_difference': lambda x: interquartile_mean(x, x.ndim - 1)},
                          differences, confidence, num_resamples, seed, _widening(len(differences), confidence))
  means = differences.mean(1)
  better = np.sum(means > 0) + 0.5 * np.sum(means == 0)
  return found | {'improvement': (np.nan,) * 3 if np.isnan(means).any() else
                  share_interval(better, len(means), confidence)}


def count_pairs(values: np.ndarray, baseline: np.ndarray) -> dict[str, int]:
  """Counts the pairs of runs whose mean over problems is `higher` than the baseline's, `equal` to it or `lower`.

  Arguments as in `paired_statistics`. A pair with a NaN is not counted.
  """
  means = (_matrix(values) - _matrix(baseline)).mean(1)
  return {'higher': int(np.sum(means > 0)), 'equal': int(np.sum(means == 0)), 'lower': int(np.sum(means < 0))}


def _matrix(values) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim not in (1, 2) or not values.size:
    raise ValueError(f'values: expected [num_seeds] or [num_seeds, num_problems], not empty; got {values.shape}.')
  return values.reshape(len(values), -1)


def _with_intervals(estimators, values, confidence, num_resamples, seed, factor):
  """Applies estimators to the seeds' means and returns `(value, low, high)` of each.

  Args:
    estimators: name -> function `[..., num_seeds] -> [...]`.
    values: `[num_seeds, num_problems]`; seeds and problems are resampled, the same problems for all seeds.
    confidence: level of the intervals.
    num_resamples: number of bootstrap resamples.
    seed: seed of the resampling.
    factor: the intervals are widened by it; NaN gives bounds of NaN.
  """
  rng = np.random.default_rng(seed)
  num_seeds, num_problems = values.shape
  seeds = rng.integers(0, num_seeds, (num_resamples, num_seeds))
  shares = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), num_resamples) / num_problems
  means = values @ shares.T  # [num_seeds, num_resamples]
  resampled = means[seeds, np.arange(num_resamples)[:, None]]
  edges, found = [(1 - confidence) / 2, (1 + confidence) / 2], {}
  for name, estimator in estimators.items():
    value, (low, high) = float(estimator(values.mean(1))), np.quantile(estimator(resampled), edges)
    found[name] = (value, value + factor * min(low - value, 0.0), value + factor * max(high - value, 0.0))
  return {name: tuple(map(float, three)) for name, three in found.items()}


def _widening(num_seeds, confidence):
  """Returns the factor that widens a percentile bootstrap interval over n seeds to the coverage of Student's interval.

  Resampled means have only (n - 1) / n of the variance, and normal instead of Student's quantiles. NaN for fewer than
  `FEWEST_SEEDS` seeds.
  """
  if num_seeds < FEWEST_SEEDS:
    return np.nan
  quantile = (1 + confidence) / 2
  return float(scipy.special.stdtrit(num_seeds - 1, quantile) / scipy.special.ndtri(quantile)
               * np.sqrt(num_seeds / (num_seeds - 1)))


def area_under_curve(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns the mean height `[...]` of curves `[..., num_steps]` between first and last step (trapezoidal rule)."""
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  if steps.size == 1:
    return values[..., 0]
  return np.sum((values[..., 1:] + values[..., :-1]) / 2 * np.diff(steps), -1) / (steps[-1] - steps[0])


def smooth(values: np.ndarray) -> np.ndarray:
  """Smooths curves `[..., num_steps]` by a moving average of three points; first and last point stay."""
  values = np.asarray(values, np.float64)
  inner = (values[..., :-2] + values[..., 1:-1] + values[..., 2:]) / 3
  return np.concatenate([values[..., :1], inner, values[..., max(values.shape[-1] - 1, 1):]], -1)


def steps_to_target(steps: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
  """Returns the step `[...]` at which curves `[..., num_steps]` first reach a target, interpolated linearly.

  Infinity if a curve never reaches it.
  """
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  reached = values >= target
  place = np.argmax(reached, -1)
  before = np.maximum(place - 1, 0)
  low, high = (np.take_along_axis(values, i[..., None], -1)[..., 0] for i in (before, place))
  share = np.where(place > 0, (target - low) / np.where(high > low, high - low, 1), 0.0)
  found = steps[before] + share * (steps[place] - steps[before])
  return np.where(reached.any(-1), found, np.inf)
