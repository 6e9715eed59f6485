"""Detects typical failures of a KL penalty from the metrics of a run while it trains."""

import array
from collections.abc import Iterable, Sequence

import numpy as np

MEANING = {
    'drift': 'the policy leaves the reference: KL beyond its bound, or answers that lose their form',
    'no_exploration': 'the probability of the right tokens does not rise at critical tokens',
    'blind_detector': 'the penalty is not lifted at critical tokens more than elsewhere',
    'flat_weight': 'the weight of the penalty is near 0, or near 1, at almost all tokens: the exponent does not fit',
}
KL_BOUND = 0.5  # nats a token; policies that learn the paper's task stay below 0.05
FORMAT_ERRORS = 0.1  # tolerated increase of the share of responses with format errors since the start
EXPLORATION = 0.2  # least share of the distance to probability 1 to cover at critical tokens
START, NEARLY_RIGHT = 2, 0.99  # iterations that count as the start; a probability that need not rise further
NEAR_ZERO, NEAR_ONE = 0.05, 0.95  # weights that hardly differ from no penalty, from the standard penalty
PATIENCE = 6  # iterations before a lack of exploration is reported
_COLUMNS = ('kl', 'format_errors', 'critical/probability', 'critical_right', 'weight', 'weight_critical', 'weight_q01',
            'weight_q99')


def signatures(rows: Sequence[dict[str, float]]) -> dict[str, bool]:
  """Returns the signatures of failure that the metrics of a run show so far.

  `drift`: KL above `KL_BOUND` or not a number in the last iteration, or `FORMAT_ERRORS` more format errors than at the
  start. `no_exploration`: after `PATIENCE` iterations, the policy is `unmoved` at critical tokens from the first
  `START` iterations to the last quarter. The probability of the right tokens is taken from the probe if there is one
  (`critical/probability`), else it is the share of right tokens among those sampled, which is noisier.
  `blind_detector`: over the iterations, the mean weight at critical tokens is less than two standard errors below the
  mean weight at all tokens. A penalty with the same weight at all tokens has no detector; the signature is left out.
  `flat_weight`: in the last iteration, 99 % of the tokens have a weight below `NEAR_ZERO`, or above `NEAR_ONE`; it is
  left out too where all weights are equal. `exponent_for` computes an exponent that fits.

  Args:
    rows: metrics of `make_train_step`, one row for each iteration, from the first one on.

  Returns:
    Name of a signature in `MEANING` -> whether it is seen; signatures that the metrics cannot decide are left out.
  """
  return History(rows).signatures()


class History:
  """Keeps the metrics that `signatures` needs, eight numbers of each row, while a run adds rows."""

  def __init__(self, rows: Iterable[dict[str, float]] = ()):
    self._columns, self._last = {name: array.array('d') for name in _COLUMNS}, {}
    for row in rows:
      self.add(row)

  def add(self, row: dict[str, float]) -> None:
    """Adds the metrics of the next iteration."""
    for name, column in self._columns.items():
      value = row.get(name)
      column.append(np.nan if value is None else value)
    self._last = row

  def signatures(self) -> dict[str, bool]:
    """Evaluates the signatures of failure over all rows, as the function `signatures` does."""
    if 'kl' not in self._last:  # metrics of pre-training
      return {}
    kl, errors, probed, right, weight, critical, low, high = map(np.array, self._columns.values())
    found = {'drift': bool(not kl[-1] <= KL_BOUND or errors[-1] > errors[0] + FORMAT_ERRORS)}  # NaN is drift too
    right = probed if 'critical/probability' in self._last else right
    right = right[~np.isnan(right)]
    if kl.size >= PATIENCE and right.size:
      found['no_exploration'] = unmoved(right[:START].mean(), right[-max(right.size // 4, 1):].mean())
    lifted = weight - critical
    lifted = lifted[~np.isnan(lifted)]
    if lifted.size > 2 and np.any(np.abs(lifted) > 1e-3):  # less is rounding: all tokens have the same weight
      found['blind_detector'] = bool(lifted.mean() < 2 * lifted.std(ddof=1) / np.sqrt(lifted.size))
    if low[-1] < high[-1]:
      found['flat_weight'] = bool(high[-1] < NEAR_ZERO or low[-1] > NEAR_ONE)
    return found


def unmoved(first: float, last: float) -> bool:
  """Returns whether the probability of the right critical token hardly rose.

  True if it ends below `NEARLY_RIGHT` and rose by less than `EXPLORATION` of its initial distance from 1.
  """
  return bool(last < NEARLY_RIGHT and last - first < EXPLORATION * (1 - first))
