import numpy as np
import pytest

from critkl_jax.analysis.statistics import (
    FEWEST_SEEDS,
    area_under_curve,
    count_pairs,
    curve_band,
    interquartile_mean,
    paired_statistics,
    problem_statistics,
    seed_statistics,
    smooth,
    steps_to_target,
)


def test_interquartile_mean():
  assert interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])) == pytest.approx(1.5)
  assert interquartile_mean(np.arange(8.0)) == pytest.approx(3.5)
  # five values: a quarter of the weight is 1.25 values, so the second and fourth weigh 0.75 each
  assert interquartile_mean(np.array([-50.0, 1.0, 2.0, 6.0, 900.0])) == pytest.approx((0.75 + 2 + 4.5) / 2.5)
  assert interquartile_mean(np.array([7.0])) == 7.0
  rows = np.random.default_rng(0).random((6, 5))
  np.testing.assert_allclose(interquartile_mean(rows, 1), [interquartile_mean(row) for row in rows])


def test_pairs():
  values, baseline = np.array([0.9, 0.8, 0.5, 0.7]), np.array([0.6, 0.5, 0.5, 0.8])
  found = paired_statistics(values, baseline)
  assert found['difference'][0] == pytest.approx(0.125)
  assert found['improvement'][0] == pytest.approx((2 + 0.5) / 4)
  assert found['iqm_difference'][0] == pytest.approx(0.15)
  for value, low, high in found.values():
    assert low <= value <= high
  with pytest.raises(ValueError, match='expected'):
    paired_statistics(values, baseline[:3])


def test_pairs_of_the_same_seed_are_less_uncertain_than_strangers():
  rng = np.random.default_rng(1)
  seeds = rng.normal(size=12)
  values, baseline = seeds + 0.3, seeds + 0.05 * rng.normal(size=12)
  _, low, high = paired_statistics(values, baseline)['difference']
  assert 0.2 < low < high < 0.4
  _, low, high = paired_statistics(values, rng.permutation(baseline))['difference']
  assert high - low > 0.5


def test_intervals_of_pairs_cover_the_truth():
  covered = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    _, low, high = paired_statistics(0.2 + rng.normal(size=20), np.zeros(20), num_resamples=400)['difference']
    covered += low <= 0.2 <= high
  assert 178 <= covered <= 198  # the percentile bootstrap of few seeds covers a little less than 95 %


def test_smooth_curves_keep_their_ends():
  np.testing.assert_allclose(smooth([[0.0, 3.0, 6.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), [[0, 3, 3, 0], [1, 1, 1, 1]])
  for short in ([0.5], [0.0, 1.0]):
    np.testing.assert_allclose(smooth(short), short)


def test_a_pair_without_a_value_leaves_all_figures_without_one():
  found = paired_statistics(np.array([0.5, np.nan, 0.7]), np.array([0.4, 0.4, 0.4]))
  assert np.isnan([*found.values()]).all()


def test_area_under_curve():
  assert area_under_curve([0, 2, 4], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
  np.testing.assert_allclose(area_under_curve([0, 1], [[0.0, 1.0], [1.0, 1.0]]), [0.5, 1.0])
  assert area_under_curve([3], [0.4]) == 0.4


def test_steps_to_target():
  steps = [0, 10, 20]
  assert steps_to_target(steps, [0.0, 0.5, 1.0], 0.75) == pytest.approx(15)
  assert steps_to_target(steps, [0.8, 0.5, 1.0], 0.75) == 0
  assert steps_to_target(steps, [0.0, 0.5, 0.6], 0.75) == np.inf
  np.testing.assert_allclose(steps_to_target(steps, [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], 0.5), [5, np.inf])


@pytest.mark.parametrize('seeds', [1, 2, 3])
def test_few_seeds_have_no_interval(seeds):
  values = np.random.default_rng(0).random((seeds, 16))
  for value, low, high in seed_statistics(values).values():
    assert 0 < value < 1
    assert np.isnan([low, high]).all()
  found = paired_statistics(values, np.zeros_like(values))
  for name in ('difference', 'iqm_difference'):
    assert np.isnan(found[name][1:]).all()
  _, low, high = found['improvement']  # exact for any number of seeds
  assert 0 < low < high == 1
  mean, low, high = curve_band(values)
  np.testing.assert_allclose(mean, values.mean(0))
  assert np.isnan([low, high]).all()


def test_bands_cover_as_intervals_of_means_do():
  curves = np.random.default_rng(0).random((FEWEST_SEEDS, 3))
  mean, low, high = curve_band(curves, num_resamples=20_000)
  for step in range(3):
    wanted = seed_statistics(curves[:, step], num_resamples=20_000)['mean']
    np.testing.assert_allclose((mean[step], low[step], high[step]), wanted, atol=0.03)


def test_one_model_has_an_interval_over_problems():
  rewards = (np.arange(100) < 30).astype(float)
  value, low, high = problem_statistics(rewards)
  assert value == 0.3
  np.testing.assert_allclose((low, high), 0.3 + 1.96 * np.sqrt(0.21 / 100) * np.array([-1, 1]), atol=0.015)
  with pytest.raises(ValueError, match=r'expected \[num_problems\]'):
    problem_statistics(np.zeros((2, 3)))


def test_ties_are_neither_higher_nor_lower():
  values = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [np.nan, 1.0]])
  baseline = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
  assert count_pairs(values, baseline) == {'higher': 1, 'equal': 2, 'lower': 1}
