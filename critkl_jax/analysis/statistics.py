"""Intervals of what a study finds, paired by seed and problem.

Fewer than `FEWEST_SEEDS` seeds have no interval: NaN stands for its bounds. Two or three runs do not show how much runs
differ: they have a handful of resamples, runs that happen to be alike would make an interval without width, and
Student's quantile, 12.7 for two, makes one that says nothing. Where a single model is meant, problems alone are
resampled (`problem_statistics`).
"""

import numpy as np
import scipy.special  # all of scipy.stats would take as long to import as jax

from critkl_jax.intervals import share_interval

FEWEST_SEEDS = 4  # for an interval over seeds


def paired_difference(rewards: np.ndarray, baseline: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
                      seed: int = 0) -> tuple[float, float, float]:
  """Returns the mean difference of two methods and its bootstrap interval.

  Seeds are resampled, and problems, the same for both methods and all seeds (a bootstrap of pairs; Efron and Tibshirani
  1993, chapter 8), as in `paired_statistics`.

  Args:
    rewards: float `[S, M]` of one method, S seeds and M problems.
    baseline: float `[S, M]` of the other, of the same seeds and problems.
    confidence: of the interval.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `(mean, low, high)`; the bounds are NaN for fewer than `FEWEST_SEEDS` seeds.

  Raises:
    ValueError: if the shapes differ or an axis is empty.
  """
  if np.shape(rewards) != np.shape(baseline) or np.ndim(rewards) != 2 or not np.size(rewards):
    raise ValueError(f'baseline: expected [S, M] as rewards, got {np.shape(rewards)} and {np.shape(baseline)}.')
  return paired_statistics(rewards, baseline, confidence, num_resamples, seed)['difference']


def problem_statistics(values: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
                       ) -> tuple[float, float, float]:
  """Returns the mean over problems of one model, or of the difference of two, and its percentile bootstrap interval.

  The interval tells how other problems would do, not how other runs would.

  Args:
    values: float `[M]`, one for each problem.
    confidence: of the interval.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `(mean, low, high)`.

  Raises:
    ValueError: if there is no problem.
  """
  if np.ndim(values) != 1 or not np.size(values):
    raise ValueError(f'values: expected [M], not empty; got {np.shape(values)}.')
  figures = {'mean': lambda x: x.mean(-1)}
  return _with_intervals(figures, _matrix([values]), confidence, num_resamples, seed, factor=1.0)['mean']


def curve_band(curves: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the mean over seeds of curves `[S, T]` and the bootstrap interval of the mean at each step, `[T]` each,
  widened for few seeds as in `seed_statistics`; the bounds are NaN for fewer than `FEWEST_SEEDS` seeds."""
  curves = np.asarray(curves, np.float64)
  rng, factor, mean = np.random.default_rng(seed), _widening(len(curves), confidence), curves.mean(0)
  means = curves[rng.integers(0, len(curves), (num_resamples, len(curves)))].mean(1)
  low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
  return mean, mean + factor * (low - mean), mean + factor * (high - mean)


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
  """Returns the mean of the middle half of values along an axis (Agarwal et al. 2021, arXiv 2108.13264): a quarter of
  the smallest and of the greatest weigh nothing, with fractions where a quarter is no whole number."""
  values = np.sort(np.asarray(values, np.float64), axis)
  count = values.shape[axis]
  places = np.arange(count)
  weight = np.clip(np.minimum(places + 1, 0.75 * count) - np.maximum(places, 0.25 * count), 0, None)
  return np.tensordot(values, weight / weight.sum(), (axis, 0))


def seed_statistics(values: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
                    ) -> dict[str, tuple[float, float, float]]:
  """Returns mean and interquartile mean over seeds of a figure of runs, with bootstrap intervals.

  Args:
    values: float `[S]`, one for each seed, or `[S, M]`, of S seeds and M problems that all of them share.
    confidence: of the bootstrap intervals, over seeds and problems; for few seeds they are widened, so that those of a
      mean cover what Student's do.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `(value, low, high)` of `mean` and `iqm`; the bounds are NaN for fewer than `FEWEST_SEEDS` seeds.

  Raises:
    ValueError: if there is no value.
  """
  return _with_intervals({'mean': lambda x: x.mean(-1), 'iqm': lambda x: interquartile_mean(x, x.ndim - 1)},
                         _matrix(values), confidence, num_resamples, seed, _widening(len(values), confidence))


def paired_statistics(values: np.ndarray, baseline: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
                      seed: int = 0) -> dict[str, tuple[float, float, float]]:
  """Compares a figure of runs with that of other runs of the same seeds.

  Args:
    values: as in `seed_statistics`.
    baseline: of the other runs, of the same seeds and problems.
    confidence: as in `seed_statistics`.
    num_resamples: of the bootstrap.
    seed: of the resampling.

  Returns:
    `(value, low, high)` of `difference`, the mean difference; `iqm_difference`, its interquartile mean over seeds; and
    `improvement`, the probability that a run is better than the other of its seed, ties counting half, with
    `share_interval` over seeds. All are NaN if a value is; for fewer than `FEWEST_SEEDS` seeds the bounds of the first
    two are.

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
  """Returns in how many pairs of runs the mean over problems is `higher` than the baseline's, `equal` and `lower`;
  arguments as in `paired_statistics`. A pair without a value is none of them."""
  means = (_matrix(values) - _matrix(baseline)).mean(1)
  return {'higher': int(np.sum(means > 0)), 'equal': int(np.sum(means == 0)), 'lower': int(np.sum(means < 0))}


def _matrix(values) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim not in (1, 2) or not values.size:
    raise ValueError(f'values: expected [S] or [S, M], not empty; got {values.shape}.')
  return values.reshape(len(values), -1)


def _with_intervals(figures, values, confidence, num_resamples, seed, factor):
  """Returns `(value, low, high)` of each figure, a function `[..., S] -> [...]`, of the seeds' means of values `[S,
  M]`; seeds are resampled, and problems, the same ones for all seeds, and the interval is made `factor` times as wide:
  it has no bounds if that is NaN."""
  rng = np.random.default_rng(seed)
  num_seeds, num_problems = values.shape
  seeds = rng.integers(0, num_seeds, (num_resamples, num_seeds))
  times = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), num_resamples) / num_problems
  means = values @ times.T  # [S, resamples]
  resampled = means[seeds, np.arange(num_resamples)[:, None]]
  edges, found = [(1 - confidence) / 2, (1 + confidence) / 2], {}
  for name, figure in figures.items():
    value, (low, high) = float(figure(values.mean(1))), np.quantile(figure(resampled), edges)
    found[name] = (value, value + factor * min(low - value, 0.0), value + factor * max(high - value, 0.0))
  return {name: tuple(map(float, three)) for name, three in found.items()}


def _widening(num_seeds, confidence):
  """Returns by what a percentile bootstrap interval over few seeds is too narrow: resamples vary by (S - 1) / S of the
  variance, and Student's quantile stands where theirs is the normal one; NaN for too few seeds to have an interval."""
  if num_seeds < FEWEST_SEEDS:
    return np.nan
  quantile = (1 + confidence) / 2
  return float(scipy.special.stdtrit(num_seeds - 1, quantile) / scipy.special.ndtri(quantile)
               * np.sqrt(num_seeds / (num_seeds - 1)))


def area_under_curve(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns the mean height `[...]` of curves `[..., T]` between their first and last step (trapezoids)."""
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  if steps.size == 1:
    return values[..., 0]
  return np.sum((values[..., 1:] + values[..., :-1]) / 2 * np.diff(steps), -1) / (steps[-1] - steps[0])


def smooth(values: np.ndarray) -> np.ndarray:
  """Returns curves `[..., T]` each of whose points is the mean of three around it, but for the first and the last,
  which stay as they are."""
  values = np.asarray(values, np.float64)
  inner = (values[..., :-2] + values[..., 1:-1] + values[..., 2:]) / 3
  return np.concatenate([values[..., :1], inner, values[..., max(values.shape[-1] - 1, 1):]], -1)


def steps_to_target(steps: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
  """Returns the step `[...]` at which curves `[..., T]` first reach a target, between two points on the line that joins
  them; infinity where they never do."""
  steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
  reached = values >= target
  place = np.argmax(reached, -1)
  before = np.maximum(place - 1, 0)
  low, high = (np.take_along_axis(values, i[..., None], -1)[..., 0] for i in (before, place))
  share = np.where(place > 0, (target - low) / np.where(high > low, high - low, 1), 0.0)
  found = steps[before] + share * (steps[place] - steps[before])
  return np.where(reached.any(-1), found, np.inf)
