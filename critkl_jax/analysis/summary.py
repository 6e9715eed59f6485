"""Summary metrics of tokens: accuracy, means at critical and other tokens, agreement of the detectors."""

from typing import Any

import numpy as np

from critkl_jax.analysis.agreement import detector_agreement
from critkl_jax.analysis.evaluation import accuracy_interval, bootstrap_interval

METRICS = {  # statistic of a token -> its name in tables
    'certainty': 'certainty of the reference',
    'weight': 'weight of the penalty',
    'kl': 'KL (nats)',
    'right_prob': "policy's probability of the right token",
    'ref_right_prob': "reference's probability of the right token",
    'entropy': 'entropy of the policy (nats)',
    'ref_entropy': 'entropy of the reference (nats)',
}


def summarize(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
  """Summarizes the tokens of one checkpoint: accuracy, means at critical and other tokens, agreement of detectors.

  Args:
    tokens: arrays of `reading.read_tokens`.

  Returns:
    `accuracy`: for each problem set `accuracy` with `low` and `high` (exact 95% interval) and `num_problems`; empty if
    solutions were read.
    `agreement`: for the targets `oracle` and `counterfactual`, if they are among the detectors, the
    `detector_agreement` of each other detector with the target, over the tokens that both examined.
    With the oracle also: `places`, means of `METRICS` and `number` of tokens at the oracle's `critical` tokens, at the
    `other` tokens up to the first error, and `after_error` (without the right token, which is unknown there);
    `certainty_gap`, certainty at critical tokens minus elsewhere, over responses that have both, `(mean, low, high)` or
    None; `lowest_other_certainty`; `certain_and_wrong`, the share of tokens up to the first error at which the
    reference gives more than 0.9 to a wrong token.
  """
  accuracy = {}
  for name in set_names(tokens['set'][~np.isnan(tokens['success'])]):
    own = tokens['success'][tokens['set'] == name]
    low, high = accuracy_interval(float(own.mean()), len(own))
    accuracy[name] = {'accuracy': float(own.mean()), 'low': low, 'high': high, 'num_problems': len(own)}
  detectors = [name.removeprefix('critical/') for name in tokens if name.startswith('critical/')]
  agreed = {target: {name: _agreement(tokens, name, target) for name in detectors if name != target}
            for target in detectors if target in ('oracle', 'counterfactual')}
  if 'critical/oracle' not in tokens:
    return {'accuracy': accuracy, 'agreement': agreed}
  here, critical = tokens['on_path'], tokens['critical/oracle']
  other = here & ~critical
  places = {name: {'number': int(where.sum())} | {
      field: float(tokens[field][where].mean()) if where.any() and not (name == 'after_error' and 'right' in field)
      else None for field in METRICS}
            for name, where in (('critical', critical), ('other', other), ('after_error', tokens['mask'] & ~here))}
  sure = here & (tokens['ref_top_prob'][..., 0] > 0.9) & (tokens['ref_right_prob'] < 0.1)
  return {'accuracy': accuracy, 'places': places, 'certainty_gap': _gap(tokens['certainty'], critical, other),
          'lowest_other_certainty': float(tokens['certainty'][other].min()) if other.any() else None,
          'certain_and_wrong': float(sure.sum() / max(here.sum(), 1)), 'agreement': agreed}


def set_names(sets: np.ndarray) -> list[str]:
  """Returns the distinct names of problem sets, shorter names first, so that numbers are in ascending order."""
  return sorted({str(name) for name in sets}, key=lambda name: (len(name), name))


def _gap(values, critical, other):
  """Returns the mean difference within responses and its interval over responses; None without such responses."""
  rows = critical.any(1) & other.any(1)
  if not rows.any():
    return None
  means = [np.where(where, values, 0)[rows].sum(1) / where[rows].sum(1) for where in (critical, other)]
  gaps = means[0] - means[1]
  return (float(gaps.mean()), *bootstrap_interval(gaps))


def _agreement(tokens, name, target):
  weights = [tokens[f'looked_at/{detector}'] for detector in (name, target)]
  # Assumes that one of the two examined all tokens, or both examined the same ones.
  both = np.where(np.minimum(*weights) > 0, np.maximum(*weights), 0)
  return detector_agreement(tokens[f'score/{name}'], tokens[f'critical/{name}'], tokens[f'critical/{target}'], both)
