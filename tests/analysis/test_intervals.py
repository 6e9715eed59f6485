"""Intervals of shares are exact, have a width if all outcomes are equal, and have their nominal coverage."""

import math

import numpy as np
import pytest

from critkl_jax.analysis.intervals import clip_interval, difference_interval, of_difference, of_share, share_interval


def test_shares_have_exact_intervals():
  value, low, high = share_interval(4, 4)
  assert (value, high) == (1, 1)
  assert low ** 4 == pytest.approx(0.025)  # the probability of four successes at the lower bound
  value, low, high = share_interval(3, 8)
  assert value == 3 / 8
  binomial = [np.array([float(math.comb(8, k)) * p ** k * (1 - p) ** (8 - k) for k in range(9)]) for p in (low, high)]
  assert binomial[0][3:].sum() == pytest.approx(0.025)
  assert binomial[1][:4].sum() == pytest.approx(0.025)
  assert share_interval(0, 4)[1:] == (0, pytest.approx(1 - 0.025 ** 0.25))
  assert 0 < share_interval(2.5, 4)[1] < 2.5 / 4 < share_interval(2.5, 4)[2] < 1


@pytest.mark.parametrize(('count', 'number'), [(0, 0), (-1, 4), (5, 4), (math.nan, 4)])
def test_what_is_no_share_is_refused(count, number):
  with pytest.raises(ValueError, match=r'count: expected 0 to number='):
    share_interval(count, number)
  with pytest.raises(ValueError, match=r'gained, lost: expected two parts of number='):
    difference_interval(count, 0, number)


@pytest.mark.parametrize('number', [1, 4, 20, 128, 5000])
def test_where_all_are_alike_there_is_a_width(number):
  for count in (0, number):
    value, low, high = share_interval(count, number)
    assert low <= value <= high
    assert high - low == pytest.approx(1 - 0.025 ** (1 / number))
  for gained, lost in ((0, 0), (number, 0), (0, number)):
    value, low, high = difference_interval(gained, lost, number)
    assert value == (gained - lost) / number
    assert -1 <= low <= value <= high <= 1
    assert high - low > 1 / (number + 2)
  assert difference_interval(0, 0, number)[1] < 0 < difference_interval(0, 0, number)[2]


def test_differences_of_the_same_problems_by_hand():
  # Bonett and Price add one to each: 12 gained and 3 lost of 98 become 13 / 100 and 4 / 100.
  value, low, high = difference_interval(12, 3, 98)
  assert value == pytest.approx(9 / 98)
  reach = 1.959964 * math.sqrt((0.13 + 0.04 - 0.09**2) / 100)
  assert (low, high) == (pytest.approx(0.09 - reach), pytest.approx(0.09 + reach))
  assert difference_interval(3, 12, 98) == (-value, -high, -low)
  assert difference_interval(12, 3, 98, 0.5)[1] > low


@pytest.mark.parametrize(('p', 'q'), [(0.0, 0.0), (0.01, 0.0), (0.02, 0.02), (0.3, 0.1), (0.95, 0.0), (0.5, 0.5)])
def test_intervals_of_differences_cover_the_truth(p, q):
  counts = np.random.default_rng(0).multinomial(20, [p, q, 1 - p - q], 2000)
  bounds = np.array([difference_interval(gained, lost, 20) for gained, lost, _ in counts])
  assert np.mean((bounds[:, 1] <= p - q) & (p - q <= bounds[:, 2])) > 0.93


def test_bootstraps_keep_their_bounds_but_where_they_have_no_width():
  assert of_share((0.9, 0.8, 1.2), 20) == (0.9, 0.8, 1.0)
  assert of_share((1.0, 1.0, 1.0), 20) == share_interval(20, 20)
  assert of_share((1.0, 1.0 - 1e-16, 1.0), 20) == share_interval(20, 20)  # a mean of ones, rounded
  assert of_share((1.0, 1.0, 1.0), 20, 0.5)[1] > share_interval(20, 20)[1]
  assert of_share((0.25, 0.25, 0.25), 20) == share_interval(5, 20)
  assert of_share((1.0, 1.0, 1.0), 0) == (1.0, 1.0, 1.0)
  assert of_difference((0.5, 0.2, 1.3), 20) == (0.5, 0.2, 1.0)
  assert of_difference((0.0, 0.0, 0.0), 20) == difference_interval(0, 0, 20)
  assert of_difference((-1.0, -1.0, -1.0), 20) == difference_interval(0, 20, 20)
  for few in (of_share, of_difference):
    value, *bounds = few((0.5, math.nan, math.nan), 20)
    assert value == 0.5
    assert np.isnan(bounds).all()
  assert clip_interval((0.5, -3, 7), -1, 2) == (0.5, -1.0, 2.0)
