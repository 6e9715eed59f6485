import numpy as np
import pytest

from critkl_jax.analysis.intervals import share_interval
from critkl_jax.rl.certainties import CERTAINTIES
from critkl_jax.studies import catalog, certainty_gap_page, files
from critkl_jax.studies.certainty_gap import (
  certainty_results,
  correlation,
  generation_gaps,
  overconfidence,
  position_means,
  with_exact_shares,
)
from critkl_jax.studies.plan import Plan
from critkl_jax.training.presets import FINETUNE_PRESETS


def generations(gap, num_responses=80, length=30, seed=0):
  """Makes responses whose certainty falls with the position, and by `gap` at the critical token."""
  rng = np.random.default_rng(seed)
  critical = np.zeros((num_responses, length), bool)
  critical[:, 10] = True
  certainty = 0.9 - 0.01 * np.arange(length) + 0.001 * rng.normal(size=(num_responses, length)) - gap * critical
  wrong = rng.random((num_responses, length)) < 0.5 * (1 - certainty)
  here = np.cumsum(np.pad(wrong, ((0, 0), (1, 0)))[:, :-1], 1) == 0
  right_prob = 0.5 + 0.5 * certainty
  return {'on_path': here, 'right': here & ~wrong, 'critical/oracle': critical & here, 'ref_entropy': 1 - certainty,
          'ref_right_prob': right_prob, 'ref_top_prob': right_prob[..., None], 'certainty': certainty,
          **{f'certainty/{kind}': certainty for kind in CERTAINTIES}}


def test_a_gap_is_found_and_its_interval_covers_it():
  found = certainty_results(generations(0.3), 8, num_resamples=100)
  value, low, high = found['kinds']['negentropy']['gap']
  elsewhere = 0.9 - 0.01 * 5  # about the mean before the first error, which comes early
  assert low < value < high < 0
  assert value == pytest.approx(0.5 - elsewhere + 0.05, abs=0.06)
  assert found['kinds']['negentropy']['detector']['auroc'][0] > 0.99
  assert found['kinds']['negentropy']['entropy_correlation'][0] == pytest.approx(-1)
  assert found['kinds']['negentropy']['expected_error_correlation'][0] == pytest.approx(-1)
  assert -1 < found['kinds']['negentropy']['error_correlation'][0] < -0.4  # of sampled errors, which are few
  assert found['critical_tokens'] == int(generations(0.3)['critical/oracle'].sum())
  assert found['sets'] == 8


def test_gaps_and_means_by_hand():
  certainty = np.array([[0.5, 1.0, 0.7], [0.9, 0.8, 0.1], [0.2, 0.2, 0.2]])
  critical = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
  other = ~critical & np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
  np.testing.assert_allclose(generation_gaps(certainty, critical, other), [0.5 - 0.85])
  here = np.ones((25, 2), bool)
  here[:6, 1] = False
  values = np.tile([1.0, 2.0], (25, 1))
  np.testing.assert_allclose(position_means(values, here), [1.0, np.nan])  # 19 are too few


def test_correlation_resamples_responses():
  rng = np.random.default_rng(0)
  base = rng.normal(size=40)
  values, here = base + rng.normal(size=(50, 40)), np.ones((50, 40), bool)
  same, low, high = correlation(values, 2 * base + rng.normal(size=(50, 40)), here, num_resamples=100)
  assert 0.85 < low < same < high <= 1  # uncorrected resamples correlate less
  assert same > 0.9
  none, low, high = correlation(values, rng.normal(size=(50, 40)), here, num_resamples=100)
  assert abs(none) < 0.5


def test_a_reference_that_never_gets_to_a_critical_token():
  tokens = generations(0.3)
  tokens['on_path'] = tokens['on_path'] & (np.arange(30) < 5)
  found = certainty_results(tokens, 4, num_resamples=20)
  assert found['critical_tokens'] == 0
  assert found['kinds']['negentropy']['gap'] is None
  assert found['kinds']['negentropy']['detector']['auroc'] is None
  assert certainty_gap_page.certainty_verdicts(found | {'known_digits': 5}) == [
      'No generation gets as far as a critical token: nothing can be said.']


def test_references_that_are_sure_of_other_wrong_tokens_are_not_sure_together():
  """Token 0 is right. The first reference is sure of 1, the second of 1 or 2; one token is not critical."""
  def reading(top, top_prob, right_prob):
    shape = (2, 2)
    return {'critical/oracle': np.array([[1, 1], [1, 0]], bool), 'on_path': np.ones(shape, bool),
            'ref_top': np.array(top).reshape(*shape, 2), 'ref_top_prob': np.array(top_prob).reshape(*shape, 2),
            'ref_right_prob': np.array(right_prob).reshape(shape)}

  sure = [[0.95, 0.05]] * 4
  one = reading([[1, 0], [1, 0], [1, 0], [1, 0]], sure, [0.05] * 4)
  two = reading([[1, 0], [2, 0], [0, 1], [1, 0]], sure, [0.05, 0.05, 0.95, 0.05])
  found = overconfidence([one, two])
  assert found['critical_tokens'] == 3
  assert [value for value, _, _ in found['references']] == pytest.approx([1, 2 / 3])
  assert found['together'][0] == pytest.approx(1 / 3)
  assert all(low <= value <= high for value, low, high in (*found['references'], found['together']))


@pytest.mark.slow
def test_the_page_names_a_blind_detector(tmp_path):
  study = catalog.STUDIES['certainty_gap']
  about = {'commit': 'abc', 'device': 'cpu', 'seconds': 1.0}
  plan = Plan(FINETUNE_PRESETS['smoke'], tmp_path)
  assert plan.number_missing(study) == 1
  found = certainty_gap_page.write_certainty(study, plan, generations(0.3), 5, about)
  assert plan.number_missing(study) == 0
  text = (tmp_path / 'studies' / 'certainty_gap' / 'README.md').read_text()
  assert 'is **less certain** at critical tokens: -0.' in text
  assert '(the paper, N = 5: -0.21 +- 0.18)' in text
  assert 'blind_detector' not in text
  for name in ('generations.png', 'certainty.png'):
    assert (tmp_path / 'studies' / 'certainty_gap' / name).read_bytes().startswith(b'\x89PNG')
  blind = certainty_gap_page.write_certainty(study, plan, generations(-0.05), 5, about)
  assert 'is **more certain**' in certainty_gap_page.certainty_verdicts(blind)[0]
  assert 'Signature of failure, `blind_detector`' in certainty_gap_page.certainty_verdicts(blind)[-1]
  assert len(certainty_gap_page.certainty_verdicts(found)) == 4
  assert 'the first one is a critical token in' in certainty_gap_page.certainty_verdicts(found)[-1]
  files.write_index(tmp_path)
  index = (tmp_path / 'README.md').read_text().splitlines()
  assert all(f'- {sentence}' in index for sentence in certainty_gap_page.certainty_verdicts(blind))


def test_first_wrong_tokens_by_hand():
  tokens = generations(0.3, num_responses=40)
  wrong = np.zeros((40, 30), bool)
  wrong[:10, 10] = True  # at the critical token, where certainty is lowest
  wrong[10:30, 3] = True
  here = np.cumsum(np.pad(wrong, ((0, 0), (1, 0)))[:, :-1], 1) == 0
  critical = here & (np.arange(30) == 10)
  certainty = np.where(wrong | critical, 0.8, 0.95)
  certainty[25:30, 3] = 0.99
  tokens |= {'on_path': here, 'right': here & ~wrong, 'critical/oracle': critical, 'certainty/negentropy': certainty}
  found = certainty_results(tokens, 4, num_resamples=20)['first_wrong']
  assert found['generations'] == 30
  assert found['critical'][0] == pytest.approx(10 / 30)
  assert found['unsure'][0] == pytest.approx(25 / 30)
  assert 0 < found['critical'][1] < found['critical'][0] < found['critical'][2] < 0.6
  tokens |= {'right': here}
  assert certainty_results(tokens, 4, num_resamples=20)['first_wrong'] is None


def test_shares_that_were_kept_with_another_interval_get_the_exact_one():
  kept = {'sets': 4, 'first_wrong': {'generations': 121, 'critical': [0.0, 0.0, 0.0], 'unsure': [0.570248, 0.4, 0.7]}}
  found = with_exact_shares(kept)
  assert found == {'sets': 4, 'first_wrong': {
      'generations': 121, 'critical': share_interval(0, 121), 'unsure': share_interval(69, 121)}}
  assert found['first_wrong']['critical'][2] > 0.02
  assert with_exact_shares({'first_wrong': None}) == {'first_wrong': None}


def test_references_that_are_never_sure_and_wrong_may_be():
  tokens = generations(0.3)
  tokens |= {'ref_top_prob': tokens['ref_top_prob'] * 0, 'ref_top': np.zeros((*tokens['on_path'].shape, 1), int)}
  found = overconfidence([tokens, tokens], num_resamples=20)
  number = int(tokens['critical/oracle'].any(1).sum())
  assert found['together'] == found['references'][0] == share_interval(0, number)
