import time

import numpy as np
import pytest

from critkl_jax.runtime.failure_signatures import FORMAT_ERRORS, KL_BOUND, MEANING, PATIENCE, History, signatures

LEARNS = (0.9, 0.91, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)


def run(kl=(0.01,) * 8, right=LEARNS, errors=(0.0,) * 8, weight=(0.98,) * 8, lifted=(0.4,) * 8):
  return [{'kl': k, 'critical_right': r, 'format_errors': e, 'weight': w, 'weight_critical': w - x}
          for k, r, e, w, x in zip(kl, right, errors, weight, lifted)]


def seen(rows):
  return {name for name, found in signatures(rows).items() if found}


def test_a_run_that_learns_shows_none():
  assert set(signatures(run())) == set(MEANING) - {'flat_weight'}  # it needs the quantiles of the weight
  assert seen(run()) == set()
  assert seen(run(right=[1.0] * 8)) == set()  # there is nothing left to explore
  assert seen(run(right=[0.9, 0.9] + [0.97] * 4 + [0.97, 0.96])) == set()  # it rose early


def test_drift():
  assert seen(run(kl=[0.01] * 7 + [KL_BOUND + 0.01])) == {'drift'}
  assert seen(run(kl=[KL_BOUND + 0.01] + [0.01] * 7)) == set()  # it came back
  for nothing in (np.nan, None):
    assert seen(run(kl=[0.01] * 7 + [nothing])) == {'drift'}
  assert seen(run(errors=[0.05] * 7 + [0.06 + FORMAT_ERRORS])) == {'drift'}
  assert seen(run(errors=[0.5] * 8)) == set()  # as bad as the reference


def test_no_exploration():
  assert seen(run(right=[0.9, 0.91, 0.9, 0.89, 0.9, 0.9, 0.91, 0.9])) == {'no_exploration'}
  assert seen(run(right=[0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5])) == {'no_exploration'}
  assert 'no_exploration' not in signatures(run(right=[0.9] * 8)[:PATIENCE - 1])  # too early to say
  probed = [row | {'critical/probability': 0.9 + 0.01 * i} for i, row in enumerate(run(right=[0.9] * 8))]
  assert not signatures(probed)['no_exploration']  # the probe knows better than a few samples
  rows = run(right=[0.9] * 8)
  del rows[3]['critical_right']
  rows[4]['critical_right'] = None
  assert seen(rows) == {'no_exploration'}


def test_a_detector_that_is_blind():
  noise = np.random.default_rng(0).normal(0, 0.01, 8)
  assert seen(run(lifted=noise - noise.mean())) == {'blind_detector'}
  assert seen(run(lifted=noise - noise.mean() + 0.05)) == set()
  assert seen(run(lifted=[-0.1] * 8)) == {'blind_detector'}  # the penalty is heavier where it should be lifted
  assert 'blind_detector' not in signatures(run(lifted=[1e-6, -2e-6] * 4))  # no detector at all


def test_a_weight_that_is_the_same_everywhere():
  def of(low, high):
    return signatures([row | {'weight_q01': low, 'weight_q99': high} for row in run()]).get('flat_weight')

  assert of(0.0, 0.04)
  assert of(0.96, 1.0)
  assert of(0.1, 1.0) is False
  assert of(0.0, 0.5) is False
  assert of(1.0, 1.0) is None  # the standard penalty
  assert of(0.0, 0.0) is None  # none


@pytest.mark.parametrize('rows', [[], [{'loss': 1.0}] * 9])
def test_metrics_that_do_not_tell(rows):
  assert signatures(rows) == {}


def test_a_row_that_is_added_costs_no_more_after_many():
  rows = run(*(np.resize(values, 20000) for values in ((0.01,), LEARNS, (0.0,), (0.98,), (0.4,))))
  history = History(rows[:-1])
  history.add(rows[-1])
  assert history.signatures() == signatures(rows)
  assert seconds(history.signatures) < seconds(lambda: signatures(rows)) / 4


def seconds(function):
  times = []
  for _ in range(3):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return min(times)
