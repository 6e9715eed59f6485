"""Metrics over tokens: accuracy, what is different at critical tokens, and how far detectors agree."""

from typing import Any

import numpy as np

from critkl_jax.analysis.agreement import agreement
from critkl_jax.evaluate import accuracy_interval, bootstrap_interval

METRICS = {  # of a token -> its name in tables
    'certainty': 'certainty of the reference',
    'weight': 'weight of the penalty',
    'kl': 'KL (nats)',
    'right_prob': "policy's probability of the right token",
    'ref_right_prob': "reference's probability of the right token",
    'entropy': 'entropy of the policy (nats)',
    'ref_entropy': 'entropy of the reference (nats)',
}


def summarize(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
  """Summarizes the tokens of one checkpoint.

  Args:
    tokens: arrays of `reading.read_tokens`.

  Returns:
    `accuracy`: of each number of digits `accuracy` with `low` and `high` (exact 95% interval) and `num_problems`; none
    if solutions were read. `places`: means of `METRICS` at the oracle's `critical` tokens, at `other` tokens after
    right ones, and at those `after_error`, where the right token is not known; with their `number`. `certainty_gap`:
    certainty at critical tokens minus elsewhere, over responses that have some, as `(mean, low, high)`; None without.
    `lowest_other_certainty`. `certain_and_wrong`: the share of tokens after right ones at which the reference gives
    more than 0.9 to a wrong token. `agreement`: of the oracle, and of the counterfactual detector where there is one,
    the agreement of each other detector with it (see `agreement`), over the tokens that both looked at.
  """
  accuracy = {}
  for number in np.unique(tokens['digits'][~np.isnan(tokens['reward'])]):
    own = tokens['reward'][tokens['digits'] == number]
    low, high = accuracy_interval(float(own.mean()), len(own))
    accuracy[str(number)] = {'accuracy': float(own.mean()), 'low': low, 'high': high, 'num_problems': len(own)}
  here, critical = tokens['on_path'], tokens['critical/oracle']
  other = here & ~critical
  places = {name: {'number': int(where.sum())} | {
      field: float(tokens[field][where].mean()) if where.any() and not (name == 'after_error' and 'right' in field)
      else None for field in METRICS}
            for name, where in (('critical', critical), ('other', other), ('after_error', tokens['mask'] & ~here))}
  sure = here & (tokens['ref_top_prob'][..., 0] > 0.9) & (tokens['ref_right_prob'] < 0.1)
  detectors = [name.removeprefix('critical/') for name in tokens if name.startswith('critical/')]
  agreed = {target: {name: _agreement(tokens, name, target) for name in detectors if name != target}
            for target in detectors if target in ('oracle', 'counterfactual')}
  return {'accuracy': accuracy, 'places': places, 'certainty_gap': _gap(tokens['certainty'], critical, other),
          'lowest_other_certainty': float(tokens['certainty'][other].min()) if other.any() else None,
          'certain_and_wrong': float(sure.sum() / max(here.sum(), 1)), 'agreement': agreed}


def _gap(values, critical, other):
  """Returns the mean difference within responses, and its interval over responses."""
  rows = critical.any(1) & other.any(1)
  if not rows.any():
    return None
  means = [np.where(where, values, 0)[rows].sum(1) / where[rows].sum(1) for where in (critical, other)]
  gaps = means[0] - means[1]
  return (float(gaps.mean()), *bootstrap_interval(gaps))


def _agreement(tokens, name, target):
  weights = [tokens[f'looked_at/{detector}'] for detector in (name, target)]
  both = np.where(np.minimum(*weights) > 0, np.maximum(*weights), 0)  # one looks at all, or they look at the same
  return agreement(tokens[f'score/{name}'], tokens[f'critical/{name}'], tokens[f'critical/{target}'], both)
