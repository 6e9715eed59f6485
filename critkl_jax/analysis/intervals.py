"""Confidence intervals of shares and of their differences, with a width even if all outcomes are equal.

The bootstrap interval of 20 right answers out of 20 has no width, because all resamples are equal. Means over seeds and
problems have no exact formula and keep the bootstrap, except where its interval has no width: there the intervals of
this module replace it.
"""

import statistics
from collections.abc import Sequence

import numpy as np

_NO_WIDTH = 1e-9


def share_interval(count: float, number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Returns the share `count / number` with its exact interval (Clopper and Pearson 1934).

  The interval has a width even if all outcomes are equal: 0.40 to 1 for 4 of 4. Fractional counts (halves for ties)
  interpolate between whole ones.

  Raises:
    ValueError: if `count` is not between 0 and `number`, or `number` is less than 1.
  """
  import scipy.special  # all of scipy.stats would take as long to import as jax, and most programs show no interval
  if not (number >= 1 and 0 <= count <= number):
    raise ValueError(f'count: expected 0 to number={number}, and a number of 1 or more; got {count}.')
  edge = (1 - confidence) / 2
  low = 0.0 if count == 0 else scipy.special.betaincinv(count, number - count + 1, edge)
  high = 1.0 if count == number else scipy.special.betaincinv(count + 1, number - count, 1 - edge)
  return float(count / number), float(low), float(high)


def difference_interval(gained: float, lost: float, number: int, confidence: float = 0.95
                        ) -> tuple[float, float, float]:
  """Returns the difference of two shares of the same problems with its interval, (value, low, high).

  The interval has a width even if no answer changed:
  `p - q +- z sqrt((p + q - (p - q)^2) / (n + 2))` with `p = (gained + 1) / (n + 2)`, `q = (lost + 1) / (n + 2)`
  (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
  data").

  Args:
    gained: number of problems that are right only in the second share.
    lost: number of problems that are right only in the first share.
    number: n, the number of all problems.
    confidence: level of the interval; z is its normal quantile.

  Raises:
    ValueError: if `gained` or `lost` is negative, their sum exceeds `number`, or `number` is less than 1.
  """
  if not (number >= 1 and gained >= 0 and lost >= 0 and gained + lost <= number * (1 + _NO_WIDTH)):
    raise ValueError(f'gained, lost: expected two parts of number={number}, 1 or more; got {gained} and {lost}.')
  p, q = (gained + 1) / (number + 2), (lost + 1) / (number + 2)
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
  value, reach = (gained - lost) / number, z * np.sqrt((p + q - (p - q)**2) / (number + 2))
  low, high = max(p - q - reach, -1.0), min(p - q + reach, 1.0)
  return float(value), float(min(low, value)), float(max(high, value))


def of_share(value: Sequence[float], number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Clips the bootstrap interval of a share to 0..1, or replaces it by the exact interval if it has no width.

  Args:
    value: (share, low, high); missing bounds are NaN.
    number: number of independent samples. For a mean over several tests of the same problems these are the problems of
      one test, for a mean over tokens the responses. 0 keeps the bootstrap interval.
    confidence: level of the interval.

  Returns:
    (share, low, high).
  """
  value = clip_interval(value, 0.0, 1.0)
  return share_interval(value[0] * number, number, confidence) if number and _has_no_width(value) else value


def of_difference(value: Sequence[float], number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Like `of_share`, for a difference of two shares: clips to -1..1, or replaces by `difference_interval`."""
  value = clip_interval(value, -1.0, 1.0)
  if not (number and _has_no_width(value)):
    return value
  return difference_interval(max(value[0], 0.0) * number, max(-value[0], 0.0) * number, number, confidence)


def clip_interval(value: Sequence[float], low: float, high: float) -> tuple[float, float, float]:
  """Clips (value, low, high) to the range of possible values, which a widened interval may leave."""
  return tuple(float(np.clip(x, low, high)) for x in value)


def _has_no_width(value):
  return value[2] - value[1] < _NO_WIDTH  # false if a bound is NaN
