"""The study of certainty: the reference's certainty at critical tokens and elsewhere, over many generations.

Letters: B episodes, T response tokens.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from critkl_jax.analysis.agreement import detector_agreement
from critkl_jax.analysis.detectors import THRESHOLD
from critkl_jax.analysis.intervals import clip_interval, of_share, share_interval
from critkl_jax.analysis.statistics import seed_statistics
from critkl_jax.rl.certainties import CERTAINTIES

PAPER_GAPS = {3: (-0.33, 0.01), 5: (-0.21, 0.18), 7: (-0.13, 0.04)}  # N -> mean, deviation: table 1 of arXiv 2502.06533
LEAST_RESPONSES = 20  # a position counts if at least so many responses reach it without an error


def certainty_results(tokens: dict[str, np.ndarray], num_sets: int, confidence: float = 0.95, num_resamples: int = 500
                      ) -> dict[str, Any]:
  """Computes the certainty gap and related metrics from a reference's generations.

  Counts only tokens that follow no wrong token.

  Args:
    tokens: result of `reading.read_tokens`, sampled from the reference, all of one size.
    num_sets: number of consecutive sets of generations over which the interval of the gap is taken.
    confidence: level of the intervals.
    num_resamples: number of bootstrap resamples over responses.

  Returns:
    `generations`, `sets`, `critical_tokens` and `other_tokens`: numbers of each. `certain_and_wrong`: share of critical
    tokens at which the reference gives more than 0.9 to a wrong token. `first_wrong`, None without wrong tokens: the
    number of `generations` with a wrong token, and the shares of these `(value, low, high)` whose first wrong token is
    `critical`, or has a negentropy below `THRESHOLD` (`unsure`).
    `kinds`, for each kind of certainty: `gap`, certainty at critical tokens minus elsewhere, mean over generations with
    both and its interval over sets (None without such generations); `gap_deviation` between generations;
    `lowest_other`; `detector`, the `detector_agreement` of 1 - certainty with the critical tokens, and `of_errors` with
    the wrong tokens; Spearman's correlations across positions of the mean certainty, `(value, low, high)`:
    `entropy_correlation` with the mean entropy, `error_correlation` with the share of wrong tokens,
    `expected_error_correlation` with their mean probability.
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
    compared = {
        name: detector_agreement(1 - certainty, certainty < THRESHOLD, wanted, here.astype(float), confidence,
                                 num_resamples)
        for name, wanted in (('detector', critical), ('of_errors', wrong))}
    kinds[kind] = compared | {
        'gap': seed_statistics(means, confidence)['mean'] if means.size else None,
        'gap_deviation': float(np.concatenate(of_sets).std()) if means.size else None,
        'lowest_other': float(certainty[other].min()),
        'entropy_correlation': correlation(certainty, tokens['ref_entropy'], here, confidence, num_resamples),
        'error_correlation': correlation(certainty, wrong, here, confidence, num_resamples),
        'expected_error_correlation': correlation(certainty, 1 - tokens['ref_right_prob'], here, confidence,
                                                  num_resamples)}
  return result | {'kinds': kinds}


def least_certain_words(tokens: dict[str, np.ndarray], share: float = 0.05, most: int = 10) -> list[dict[str, Any]]:
  """Counts the words that were written where a reference is least certain.

  Counts only tokens that follow no wrong token.

  Args:
    tokens: as in `certainty_results`.
    share: the share of tokens that count as least certain.
    most: number of words.

  Returns:
    A row for each word that was written there, the most frequent first: `word`; `least_certain`, its share of these
    tokens, and `everywhere`, of all; `critical`, the share of its least certain tokens that are critical; and `right`,
    the mean probability of the right token there.
  """
  here = tokens['on_path']
  words, certainty = tokens['text'][here], tokens['certainty'][here]
  critical, right = tokens['critical/oracle'][here], tokens['ref_right_prob'][here]
  order = np.argsort(certainty, kind='stable')[:max(int(share * certainty.size), 1)]
  least = collections.Counter(words[order].tolist())
  every = collections.Counter(words.tolist())
  found = []
  for word, number in least.most_common(most):
    own = order[words[order] == word]
    found.append({'word': word, 'least_certain': number / order.size, 'everywhere': every[word] / words.size,
                  'critical': float(critical[own].mean()), 'right': float(right[own].mean())})
  return found


def _first_wrong(wrong, critical, unsure, confidence):
  """Computes the shares of first wrong tokens that are critical or unsure; each row has at most one wrong token."""
  rows = wrong.any(1)
  if not rows.any():
    return None
  return {'generations': int(rows.sum())} | {
      name: share_interval(int((wrong & where).any(1).sum()), int(rows.sum()), confidence)
      for name, where in (('critical', critical), ('unsure', unsure))}


def with_exact_shares(kept: dict[str, Any]) -> dict[str, Any]:
  """Returns stored `certainty_results` with exact intervals of the shares of first wrong tokens.

  Results of older versions have bootstrap intervals, which have no width if all outcomes are equal.
  """
  first = kept['first_wrong']
  if not first:
    return kept
  number = first['generations']
  return kept | {'first_wrong': first | {
      name: share_interval(round(first[name][0] * number), number) for name in ('critical', 'unsure')}}


def overconfidence(readings: Sequence[dict[str, np.ndarray]], confidence: float = 0.95, num_resamples: int = 1000,
                   seed: int = 0) -> dict[str, Any]:
  """Computes the share of critical tokens at which references give more than 0.9 to a wrong token.

  Args:
    readings: results of `reading.read_tokens` for the same responses, each with another reference.
    confidence: level of the intervals.
    num_resamples: number of bootstrap resamples over responses.
    seed: seed of the resampling.

  Returns:
    `generations` and `critical_tokens`, their numbers; the share as `(value, low, high)` for each of the `references`,
    and `together` for the mean of their distributions.
  """
  first = readings[0]
  critical = first['critical/oracle'] & first['on_path']
  sure = [critical & (one['ref_top_prob'][..., 0] > 0.9) & (one['ref_right_prob'] < 0.1) for one in readings]
  # A token with more than 0.9 in the mean is among the most probable tokens of each reference.
  tokens, probs = (np.concatenate([one[name] for one in readings], -1) for name in ('ref_top', 'ref_top_prob'))
  mean = ((tokens[..., None, :] == tokens[..., :, None]) * probs[..., None, :]).sum(-1) / len(readings)
  right = np.mean([one['ref_right_prob'] for one in readings], 0)
  together = critical & (mean.max(-1) > 0.9) & (right < 0.1)
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(len(critical), np.full(len(critical), 1 / len(critical)), num_resamples)
  edges = [(1 - confidence) / 2, (1 + confidence) / 2]

  def share(where):
    resampled = (counts @ where.sum(1)) / np.maximum(counts @ critical.sum(1), 1)
    value = where.sum() / max(critical.sum(), 1), *np.quantile(resampled, edges)
    return of_share(value, int(critical.any(1).sum()), confidence)

  return {'generations': len(critical), 'critical_tokens': int(critical.sum()),
          'references': [share(one) for one in sure], 'together': share(together)}


def generation_gaps(certainty: np.ndarray, critical: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns the certainty gap of each response: mean certainty at critical tokens minus mean at other tokens.

  Arguments `[B, T]`. Leaves out responses without critical tokens or without other tokens.
  """
  rows = critical.any(1) & other.any(1)
  means = [np.where(where, certainty, 0)[rows].sum(1) / where[rows].sum(1) for where in (critical, other)]
  return means[0] - means[1]


def position_means(values: np.ndarray, here: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
  """Averages values over responses at each position.

  Args:
    values: `[B, T]`.
    here: bool `[B, T]` which values count.
    weight: `[B]` how often each response counts; once if None.

  Returns:
    `[T]`; NaN at positions with fewer than `LEAST_RESPONSES` values.
  """
  weight = np.ones(len(here)) if weight is None else weight
  count = weight @ here
  return np.where(here.sum(0) >= LEAST_RESPONSES, weight @ np.where(here, values, 0) / np.maximum(count, 1e-9), np.nan)


def correlation(values: np.ndarray, others: np.ndarray, here: np.ndarray, confidence: float = 0.95,
                num_resamples: int = 500, seed: int = 0) -> tuple[float, float, float]:
  """Returns Spearman's correlation across positions of two `position_means`, with its bootstrap interval.

  Responses are resampled. Resampling adds noise to the means, which weakens the correlation, so the interval is shifted
  by the correlation minus the median of the resamples. Arguments as in `position_means`.
  """
  import scipy.stats  # slow to import; a wrong flag should be reported before

  rng = np.random.default_rng(seed)
  counts = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), num_resamples)

  def estimate(weight):
    means = [position_means(some, here, weight) for some in (values, others)]
    kept = ~np.isnan(means[0])
    if kept.sum() < 2 or any(np.ptp(some[kept]) == 0 for some in means):
      return np.nan
    return float(scipy.stats.spearmanr(means[0][kept], means[1][kept]).statistic)

  edges = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
  value, resampled = estimate(None), np.array([estimate(row) for row in counts])
  if np.isnan(value) or np.isnan(resampled).all():
    return value, np.nan, np.nan
  low, middle, high = np.nanquantile(resampled, edges)
  return clip_interval((value, value + low - middle, value + high - middle), -1, 1)
