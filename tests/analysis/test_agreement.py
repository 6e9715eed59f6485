import numpy as np
import pytest

from critkl_jax.analysis.agreement import detector_agreement
from critkl_jax.analysis.intervals import share_interval


def by_pairs(score, wanted, weight):
  """Computes the AUROC as the share of pairs in the right order."""
  total = right = 0.0
  for s, y, w in zip(score.ravel(), wanted.ravel(), weight.ravel()):
    for t, z, v in zip(score.ravel(), wanted.ravel(), weight.ravel()):
      if y and not z:
        total += w * v
        right += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
  return right / total


def test_auroc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  score, wanted = rng.integers(0, 5, (4, 9)) / 4.0, rng.random((4, 9)) < 0.3
  weight = rng.integers(0, 4, (4, 9)).astype(float)
  found = detector_agreement(score, score > 0.6, wanted, weight)
  assert found['auroc'][0] == pytest.approx(by_pairs(score, wanted, weight))
  called = score > 0.6
  assert found['precision'][0] == pytest.approx((weight * called * wanted).sum() / (weight * called).sum())
  assert found['recall'][0] == pytest.approx((weight * called * wanted).sum() / (weight * wanted).sum())
  assert found['base_rate'] == pytest.approx((weight * wanted).sum() / weight.sum())
  for name in ('precision', 'recall', 'auroc', 'average_precision'):
    value, low, high = found[name]
    assert 0 <= low <= value <= high <= 1


def test_average_precision_by_hand():
  score, wanted = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]]), np.array([[True, False, True, False, False]])
  found = detector_agreement(score, score > 0.65, wanted, np.ones((1, 5)))
  assert found['average_precision'][0] == pytest.approx((1 / 1 + 2 / 3) / 2)
  assert found['precision'][0] == pytest.approx(2 / 3)
  assert found['recall'][0] == 1.0


def test_a_perfect_and_a_useless_score():
  wanted = np.random.default_rng(1).random((20, 30)) < 0.1
  perfect = detector_agreement(wanted * 1.0, wanted, wanted, np.ones(wanted.shape))
  # Not 1 to 1: a token of another response may be missed.
  exact = share_interval(wanted.any(1).sum(), wanted.any(1).sum())
  assert perfect['auroc'] == perfect['average_precision'] == perfect['precision'] == perfect['recall'] == exact
  assert 0.8 < exact[1] < 1
  useless = detector_agreement(np.zeros(wanted.shape), wanted & False, wanted, np.ones(wanted.shape))
  assert useless['auroc'][0] == 0.5
  assert useless['precision'] is None
  assert useless['average_precision'][0] == pytest.approx(useless['base_rate'])


def test_weights_stand_for_tokens_that_were_not_looked_at():
  rng = np.random.default_rng(2)
  score, wanted = rng.random((3, 8)), rng.random((3, 8)) < 0.4
  weight = rng.integers(1, 4, (3, 8))
  several = [np.repeat(x, weight.ravel()).reshape(1, -1) for x in (score.ravel(), wanted.ravel())]
  one = detector_agreement(score, score > 0.5, wanted, weight)
  other = detector_agreement(several[0], several[0] > 0.5, several[1], np.ones(several[0].shape))
  for name in ('precision', 'recall', 'auroc', 'average_precision'):
    assert one[name][0] == pytest.approx(other[name][0])


def test_intervals_cover_the_truth():
  """Tokens of a response are correlated here; intervals over single tokens would be far too narrow."""
  covered = 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    wanted = rng.random((60, 20)) < 0.2
    score = wanted + rng.normal(size=(60, 1)) + 0.5 * rng.normal(size=(60, 20))
    _, low, high = detector_agreement(score, score > 1, wanted, np.ones(wanted.shape), num_resamples=300)['auroc']
    covered += low <= 0.7365 <= high  # P(1 + sqrt(2.5) Z > 0), ignoring pairs within a response
  assert 34 <= covered <= 40


def test_nothing_to_compare():
  nothing = np.zeros((2, 3))
  found = detector_agreement(nothing, nothing > 0, nothing > 0, nothing)
  assert set(found.values()) == {None}


def test_intervals_of_rare_tokens_at_the_top():
  """Few target tokens decide the average precision, so resamples must keep the order of the top scores."""
  rng = np.random.default_rng(3)
  wanted = np.zeros((128, 280), bool)
  wanted[rng.integers(0, 128, 4), rng.integers(0, 280, 4)] = True
  score = rng.normal(size=wanted.shape) + 10 * wanted
  found = detector_agreement(score, score > 6, wanted, np.ones(wanted.shape), num_resamples=100)
  assert found['average_precision'] == found['auroc'] == found['precision'] == share_interval(4, 4)


def test_shapes_must_agree():
  with pytest.raises(ValueError, match='expected one shape'):
    detector_agreement(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 2)), np.zeros((2, 3)))
