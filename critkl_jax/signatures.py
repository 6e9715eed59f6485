"""Signatures of failure: what goes wrong with a KL penalty, told from the metrics of a run while it trains."""

import array
from collections.abc import Iterable, Sequence

import numpy as np

MEANING = {
    'drift': 'the policy leaves the reference: KL beyond its bound, or answers that lose their form',
    'no_exploration': 'the probability of the right tokens does not rise at critical tokens',
    'blind_detector': 'the penalty is not lifted at critical tokens more than elsewhere',
}
KL_BOUND = 0.5  # nats a token; the policies of the paper's task learn it within 0.05
FORMAT_ERRORS = 0.1  # share of responses, beyond that at the start
EXPLORATION = 0.2  # share of the way to certainty at critical tokens
START, NEARLY_RIGHT = 2, 0.99  # iterations that count as the start; probability of right tokens that is enough
PATIENCE = 6  # iterations before it is said that nothing moved
_COLUMNS = ('kl', 'format_errors', 'critical/probability', 'critical_right', 'weight', 'weight_critical')


def signatures(rows: Sequence[dict[str, float]]) -> dict[str, bool]:
  """Returns which signatures the metrics of a run show so far.

  `drift`: KL above `KL_BOUND` or not a number in the last iteration, or `FORMAT_ERRORS` more format errors than at the
  start. `no_exploration`: at critical tokens the policy is `unmoved` from the first `START` iterations to the last
  quarter; from `PATIENCE` iterations on. The probability of the right tokens is the probe's if there is one
  (`critical/probability`), else the share of right ones among those sampled, which is noisier.
  `blind_detector`: over the iterations, the mean weight at critical tokens is not below the mean weight by two standard
  errors; a penalty that weighs all tokens alike has no detector and does not show it.

  Args:
    rows: metrics of `make_train_step`, an iteration each, from the first one on.

  Returns:
    Those of `MEANING` on which the metrics can tell, by name.
  """
  return History(rows).signatures()


class History:
  """Keeps the metrics that `signatures` needs, six numbers of each row, while a run adds rows."""

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
    if 'kl' not in self._last:  # of a pre-training
      return {}
    kl, errors, probed, right, weight, critical = map(np.array, self._columns.values())
    found = {'drift': bool(not kl[-1] <= KL_BOUND or errors[-1] > errors[0] + FORMAT_ERRORS)}  # NaN is drift too
    right = probed if 'critical/probability' in self._last else right
    right = right[~np.isnan(right)]
    if kl.size >= PATIENCE and right.size:
      found['no_exploration'] = unmoved(right[:START].mean(), right[-max(right.size // 4, 1):].mean())
    lifted = weight - critical
    lifted = lifted[~np.isnan(lifted)]
    if lifted.size > 2 and np.any(np.abs(lifted) > 1e-3):  # less is rounding: all tokens weigh alike
      found['blind_detector'] = bool(lifted.mean() < 2 * lifted.std(ddof=1) / np.sqrt(lifted.size))
    return found


def unmoved(first: float, last: float) -> bool:
  """Returns whether the probability of the right critical token is not `NEARLY_RIGHT` in the end, and less than
  `EXPLORATION` of what it lacked at first was gained."""
  return bool(last < NEARLY_RIGHT and last - first < EXPLORATION * (1 - first))
