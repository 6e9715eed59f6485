"""The study of certainty: what a reference says at critical tokens and elsewhere, over many generations.

Letters: B responses, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from critkl_jax.analysis.agreement import agreement
from critkl_jax.analysis.reading import CERTAINTIES
from critkl_jax.analysis.statistics import seed_statistics
from critkl_jax.critical_tokens import THRESHOLD
from critkl_jax.intervals import clip_interval, of_share, share_interval

PAPER_GAPS = {3: (-0.33, 0.01), 5: (-0.21, 0.18), 7: (-0.13, 0.04)}  # table 1 of arXiv 2502.06533, N -> mean, deviation
LEAST_RESPONSES = 20  # that reach a position without an error, for it to count


def certainty_results(tokens: dict[str, np.ndarray], num_sets: int, confidence: float = 0.95, num_resamples: int = 500
                      ) -> dict[str, Any]:
  """Returns what generations of a reference say of its certainty, over tokens that come after right ones alone.

  Args:
    tokens: of `reading.read_tokens`, sampled from the reference, all of one number of digits.
    num_sets: in how many sets, one after another, they are taken for the interval of the gap.
    confidence: of the intervals.
    num_resamples: of the bootstraps over responses.

  Returns:
    `generations`, their number, and `sets`; `critical_tokens` and `other_tokens`; `certain_and_wrong`, the share of
    critical tokens at which the reference gives more than 0.9 to a wrong token; `first_wrong`, how many `generations`
    have a wrong token, and of these the shares `(value, low, high)` whose first one is a `critical` one, and whose
    first one has a negentropy below `THRESHOLD` (`unsure`), None if there are none; and of each of the `kinds` of
    certainty: `gap`, critical minus elsewhere, a mean over generations with critical tokens, and its interval over
    sets, None if no generation has any; `gap_deviation` between generations; `lowest_other`; `detector`, the
    `agreement` of 1 - certainty with the critical tokens, and `of_errors` with the wrong tokens; Spearman's
    correlations across positions of the mean certainty as `(value, low, high)`: `entropy_correlation` with the mean
    entropy, `error_correlation` with the share of wrong tokens, `expected_error_correlation` with their mean
    probability.
  """
  here, critical = tokens['on_path'], tokens['critical/oracle'] & tokens['on_path']
  other, wrong = here & ~critical, here & ~tokens['right']
  sure = critical & (tokens['ref_top_prob'][..., 0] > 0.9) & (tokens['ref_right_prob'] < 0.1)
  result = {'generations': len(here), 'sets': num_sets, 'critical_tokens': int(critical.sum()),
            'other_tokens': int(other.sum()), 'certain_and_wrong': float(sure.sum() / max(critical.sum(), 1)),
            'first_wrong': _first_wrong(wrong, critical, tokens['certainty/negentropy'] < THRESHOLD, confidence)}
  kinds = {}
  for kind in CERTAINTIES:
    certainty = tokens[f'certainty/{kind}']
    of_sets = [generation_gaps(certainty[rows], critical[rows], other[rows])
               for rows in np.array_split(np.arange(len(here)), num_sets)]
    means = np.array([gaps.mean() for gaps in of_sets if gaps.size])
    compared = {name: agreement(1 - certainty, certainty < THRESHOLD, wanted, here.astype(float), confidence,
                                num_resamples) for name, wanted in (('detector', critical), ('of_errors', wrong))}
    kinds[kind] = compared | {
        'gap': seed_statistics(means, confidence)['mean'] if means.size else None,
        'gap_deviation': float(np.concatenate(of_sets).std()) if means.size else None,
        'lowest_other': float(certainty[other].min()),
        'entropy_correlation': correlation(certainty, tokens['ref_entropy'], here, confidence, num_resamples),
        'error_correlation': correlation(certainty, wrong, here, confidence, num_resamples),
        'expected_error_correlation': correlation(certainty, 1 - tokens['ref_right_prob'], here, confidence,
                                                  num_resamples)}
  return result | {'kinds': kinds}


def _first_wrong(wrong, critical, unsure, confidence):
  """Counts what the first wrong tokens are; no response has a second one that follows right ones."""
  rows = wrong.any(1)
  if not rows.any():
    return None
  return {'generations': int(rows.sum())} | {
      name: share_interval(int((wrong & where).any(1).sum()), int(rows.sum()), confidence)
      for name, where in (('critical', critical), ('unsure', unsure))}


def with_exact_shares(kept: dict[str, Any]) -> dict[str, Any]:
  """Returns kept `certainty_results` with exact intervals of the shares of first wrong tokens; older ones have those of
  a bootstrap, which have no width where all are alike."""
  first = kept['first_wrong']
  if not first:
    return kept
  number = first['generations']
  return kept | {'first_wrong': first | {
      name: share_interval(round(first[name][0] * number), number) for name in ('critical', 'unsure')}}


def overconfidence(readings: Sequence[dict[str, np.ndarray]], confidence: float = 0.95, num_resamples: int = 1000,
                   seed: int = 0) -> dict[str, Any]:
  """Returns how often references are sure of a wrong token, with a probability above 0.9, at critical tokens.

  Args:
    readings: tokens of `reading.read_tokens` of the same responses, with another reference each.
    confidence: of the intervals.
    num_resamples: of the bootstrap over responses.
    seed: of the resampling.

  Returns:
    `generations` and `critical_tokens`, their numbers; the share of critical tokens as `(value, low, high)` of each of
    the `references`, and `together`, of the mean of their distributions.
  """
  first = readings[0]
  critical = first['critical/oracle'] & first['on_path']
  sure = [critical & (one['ref_top_prob'][..., 0] > 0.9) & (one['ref_right_prob'] < 0.1) for one in readings]
  # A token of more than 0.9 in the mean is among the most probable ones of each.
  tokens, probs = (np.concatenate([one[name] for one in readings], -1) for name in ('ref_top', 'ref_top_prob'))
  mean = ((tokens[..., None, :] == tokens[..., :, None]) * probs[..., None, :]).sum(-1) / len(readings)
  right = np.mean([one['ref_right_prob'] for one in readings], 0)
  together = critical & (mean.max(-1) > 0.9) & (right < 0.1)
  rng = np.random.default_rng(seed)
  times = rng.multinomial(len(critical), np.full(len(critical), 1 / len(critical)), num_resamples)
  edges = [(1 - confidence) / 2, (1 + confidence) / 2]

  def share(where):
    resampled = (times @ where.sum(1)) / np.maximum(times @ critical.sum(1), 1)
    value = where.sum() / max(critical.sum(), 1), *np.quantile(resampled, edges)
    return of_share(value, int(critical.any(1).sum()), confidence)

  return {'generations': len(critical), 'critical_tokens': int(critical.sum()),
          'references': [share(one) for one in sure], 'together': share(together)}


def generation_gaps(certainty: np.ndarray, critical: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns `[G]`, the mean certainty at critical tokens minus that elsewhere of each of the G responses that have
  both; arguments `[B, T]`."""
  rows = critical.any(1) & other.any(1)
  means = [np.where(where, certainty, 0)[rows].sum(1) / where[rows].sum(1) for where in (critical, other)]
  return means[0] - means[1]


def position_means(values: np.ndarray, here: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
  """Returns `[T]`, the mean over responses of values `[B, T]` where `here`; NaN at positions that fewer than
  `LEAST_RESPONSES` reach.

  Args:
    values: the values.
    here: bool `[B, T]`.
    weight: `[B]` how often each response counts; once if None.
  """
  weight = np.ones(len(here)) if weight is None else weight
  count = weight @ here
  return np.where(here.sum(0) >= LEAST_RESPONSES, weight @ np.where(here, values, 0) / np.maximum(count, 1e-9), np.nan)


def correlation(values: np.ndarray, others: np.ndarray, here: np.ndarray, confidence: float = 0.95,
                num_resamples: int = 500, seed: int = 0) -> tuple[float, float, float]:
  """Returns Spearman's correlation, across positions, of two means over responses, with the percentile bootstrap
  interval over responses; arguments as in `position_means`.

  Resamples add noise of their own to the means, and noise weakens a correlation: their interval is moved by as much as
  their median lies beside the correlation.
  """
  import scipy.stats  # takes as long to import as jax, for which no wrong flag should wait

  rng = np.random.default_rng(seed)
  times = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), num_resamples)

  def one(weight):
    means = [position_means(some, here, weight) for some in (values, others)]
    kept = ~np.isnan(means[0])
    if kept.sum() < 2 or any(np.ptp(some[kept]) == 0 for some in means):
      return np.nan
    return float(scipy.stats.spearmanr(means[0][kept], means[1][kept]).statistic)

  edges = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
  value, resampled = one(None), np.array([one(row) for row in times])
  if np.isnan(value) or np.isnan(resampled).all():
    return value, np.nan, np.nan
  low, middle, high = np.nanquantile(resampled, edges)
  return clip_interval((value, value + low - middle, value + high - middle), -1, 1)
