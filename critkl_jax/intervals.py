"""Intervals of shares and of their differences, which have a width where all are alike, too.

A bootstrap resamples what it has: of 20 right answers out of 20 it makes 100 % without any doubt. Where no formula
fits, as for means over seeds and problems, the bootstrap stays, and these stand in where it finds no width.
"""

import statistics
from collections.abc import Sequence

import numpy as np

_NO_WIDTH = 1e-9


def share_interval(count: float, number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Returns the share of `count` in `number` and its interval (Clopper and Pearson 1934), which has a width where all
  are alike, too: four of four leave anything from 0.40 on. It is exact for whole counts; between them, with halves for
  ties, it interpolates, and covers more.

  Raises:
    ValueError: if the count is not between 0 and the number, or the number less than 1.
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
  """Returns the difference of two shares of the same problems and its interval, which has a width where no answer
  changed, too.

  `p - q +- z sqrt((p + q - (p - q)^2) / (n + 2))` with `p = (gained + 1) / (n + 2)`, `q = (lost + 1) / (n + 2)`
  (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
  data").

  Args:
    gained: problems that count in the second share alone.
    lost: problems that count in the first share alone.
    number: n, all problems.
    confidence: of the interval; z is the normal quantile that belongs to it.

  Raises:
    ValueError: if they do not fit into the number, or that is less than 1.
  """
  if not (number >= 1 and gained >= 0 and lost >= 0 and gained + lost <= number * (1 + _NO_WIDTH)):
    raise ValueError(f'gained, lost: expected two parts of number={number}, 1 or more; got {gained} and {lost}.')
  p, q = (gained + 1) / (number + 2), (lost + 1) / (number + 2)
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
  value, reach = (gained - lost) / number, z * np.sqrt((p + q - (p - q)**2) / (number + 2))
  low, high = max(p - q - reach, -1.0), min(p - q + reach, 1.0)
  return float(value), float(min(low, value)), float(max(high, value))


def of_share(value: Sequence[float], number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Returns `(value, low, high)` of a share by a bootstrap within 0 and 1; where it found no width, with the interval
  of that share in `number` problems or responses.

  Args:
    value: the share, and the bounds of its interval; NaN for bounds that there are not.
    number: of problems or responses that are independent of one another, such as those of a single test, where the
      share is a mean over several tests of the same problems or over tokens. Without any the bounds stay as they are.
    confidence: of the interval.
  """
  value = clip_interval(value, 0.0, 1.0)
  return share_interval(value[0] * number, number, confidence) if number and _has_no_width(value) else value


def of_difference(value: Sequence[float], number: int, confidence: float = 0.95) -> tuple[float, float, float]:
  """Returns what `of_share` does of the difference of two shares, within -1 and 1, with `difference_interval` where the
  bootstrap found no width; arguments as there."""
  value = clip_interval(value, -1.0, 1.0)
  if not (number and _has_no_width(value)):
    return value
  return difference_interval(max(value[0], 0.0) * number, max(-value[0], 0.0) * number, number, confidence)


def clip_interval(value: Sequence[float], low: float, high: float) -> tuple[float, float, float]:
  """Returns `(value, low, high)` within the bounds of what it can be: widened intervals may pass them."""
  return tuple(float(np.clip(x, low, high)) for x in value)


def _has_no_width(value):
  return value[2] - value[1] < _NO_WIDTH  # false where a bound is NaN
