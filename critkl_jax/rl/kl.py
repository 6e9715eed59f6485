"""Per-token estimators of KL(policy || reference), and the kinds of KL penalty."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import LOG_PROB_FLOOR, TokenStatistics, weighted_kl
from critkl_jax.ops.weighted_kl.statistics import in_vocabulary, nan_unless

MAX_LOG_RATIO = 20.0  # largest absolute value of a log-ratio in exp


def _k1(log_prob, ref_log_prob):
  return jnp.maximum(log_prob, LOG_PROB_FLOOR) - ref_log_prob


def _k2(log_prob, ref_log_prob):
  return 0.5 * jnp.square(_k1(log_prob, ref_log_prob))


def _k3(log_prob, ref_log_prob):
  # Clipped in both terms: in one alone it would flip the gradient's sign.
  log_ratio = jnp.maximum(_k1(log_prob, ref_log_prob), -MAX_LOG_RATIO)
  return jnp.expm1(-log_ratio) + log_ratio


# Name -> (log pi(a) [...], log pi_ref(a) [...]) -> KL estimate in nats [...].
SAMPLED_ESTIMATORS: dict[str, Callable[[chex.Array, chex.Array], chex.Array]] = {'k1': _k1, 'k2': _k2, 'k3': _k3}
ESTIMATORS = ('exact', *SAMPLED_ESTIMATORS)
# Name -> token statistics -> weight of each token's penalty [...].
PENALTIES: dict[str, Callable[[TokenStatistics], chex.Array]] = {
    'prioritized': lambda record: record.weight,
    'standard': lambda record: jnp.full(record.weight.shape, 1.0, record.weight.dtype),
    'none': lambda record: jnp.full(record.weight.shape, 0.0, record.weight.dtype),
}
# Coefficients with which the program compiled for the prioritized penalty computes the other penalties.
NUMBERS_OF_PENALTIES = {'prioritized': {}, 'standard': {'certainty_exponent': 0.0}, 'none': {'kl_coefficient': 0.0}}


def token_kl(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array | None = None,
             estimator: str = 'exact') -> chex.Array:
  """Computes KL(policy || reference) of each token in nats, exactly or estimated from the sampled action.

  With `d = log pi(a) - log pi_ref(a)`: `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d` (Schulman, "Approximating KL
  divergence", 2020); `exact = sum_a pi(a) d(a)`. As a loss, k2 has the expected gradient of KL(pi || pi_ref), k3 the
  expected gradient of KL(pi_ref || pi), and k1 an expected gradient of zero. Log-probabilities are at least -1e4,
  so that a logit of -inf gives a finite KL; k3 also clips d to at least -20.

  Args:
    logits: float `[..., V]` of the policy, at the temperature at which the actions were drawn.
    ref_logits: float `[..., V]` of the reference at the same temperature; no gradient flows into them.
    actions: int32 `[...]` sampled tokens, 0..V-1; not needed for `exact`. An id outside the vocabulary gives NaN.
    estimator: `exact`, `k1`, `k2` or `k3`.

  Returns:
    float32 `[...]`.

  Raises:
    ValueError: if the estimator is unknown or needs actions that are not given.
    AssertionError: if the shapes do not agree.
  """
  chex.assert_equal_shape([logits, ref_logits])
  if estimator == 'exact':
    actions = jnp.zeros(logits.shape[:-1], jnp.int32)
  elif actions is None:
    raise ValueError(f'actions: the estimator {estimator!r} needs the sampled actions, got None.')
  known = in_vocabulary(actions, logits.shape[-1])
  record = weighted_kl(logits, ref_logits, jnp.where(known, actions, 0), exponent=0.0)
  # Applied last, so that a mask applied by the caller keeps NaN out of the gradient.
  return nan_unless(known, estimated_kl(record, estimator))


def token_kl_from_log_probs(log_probs: chex.Array, ref_log_probs: chex.Array, estimator: str = 'k2') -> chex.Array:
  """Like `token_kl`, from the log-probabilities of the sampled actions, as most trainers store them.

  Args:
    log_probs: float `[...]` log-probability of each action under the policy.
    ref_log_probs: float `[...]` log-probability under the reference at the same temperature; no gradient flows into it.
    estimator: `k1`, `k2` or `k3`; the exact KL needs logits.

  Returns:
    float32 `[...]` in nats.

  Raises:
    ValueError: if the estimator is unknown, or `exact`.
    AssertionError: if the shapes differ.
  """
  chex.assert_equal_shape([log_probs, ref_log_probs])
  if estimator not in SAMPLED_ESTIMATORS:
    raise ValueError(f'estimator: expected one of {tuple(SAMPLED_ESTIMATORS)}, got {estimator!r}; the exact KL needs '
                     'logits or hidden states.')
  ref_log_probs = jnp.maximum(jax.lax.stop_gradient(ref_log_probs).astype(jnp.float32), LOG_PROB_FLOOR)
  return SAMPLED_ESTIMATORS[estimator](log_probs.astype(jnp.float32), ref_log_probs)


def estimated_kl(record: TokenStatistics, estimator: str) -> chex.Array:
  """Like `token_kl`, from a precomputed `TokenStatistics`.

  Args:
    record: statistics of the tokens, float32 `[...]` each.
    estimator: a name in `ESTIMATORS`.

  Returns:
    float32 `[...]` in nats.

  Raises:
    ValueError: if the estimator is unknown.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f'estimator: expected one of {ESTIMATORS}, got {estimator!r}.')
  return record.kl if estimator == 'exact' else SAMPLED_ESTIMATORS[estimator](record.log_prob, record.ref_log_prob)


def kl_shaped_rewards(rewards: chex.Array, log_probs: chex.Array, ref_log_probs: chex.Array, mask: chex.Array, *,
                      coefficient: chex.Numeric, weight: chex.Array | None = None, estimator: str = 'k1') -> chex.Array:
  """Subtracts the weighted KL penalty of each token from its reward, `r_t - alpha w_t KL_t`.

  The penalty is then in the reward instead of the loss (Ouyang et al., arXiv 2203.02155, equation 2), so set
  `kl='none'` in the loss. The default is k1: in the reward, it is the estimator whose expected policy gradient is the
  gradient of the KL.

  Args:
    rewards: float `[B, T]` reward of each action.
    log_probs: float `[B, T]` log-probability of each action under the behaviour policy.
    ref_log_probs: float `[B, T]` log-probability under the reference, at the same temperature.
    mask: bool `[B, T]` true at the tokens that count; elsewhere the other arrays may be anything, NaN included.
    coefficient: alpha; may be traced.
    weight: float `[B, T]` w_t, such as `kl_weight(certainty, exponent)`. None: 1 at all tokens.
    estimator: `k1`, `k2` or `k3`.

  Returns:
    float32 `[B, T]`, without gradient; 0 where masked.

  Raises:
    ValueError: if the estimator is unknown, or `exact`.
    AssertionError: if the shapes differ.
  """
  weight = jnp.ones(mask.shape, jnp.float32) if weight is None else weight
  chex.assert_equal_shape([rewards, log_probs, ref_log_probs, mask, weight])
  penalty = coefficient * weight * token_kl_from_log_probs(log_probs, ref_log_probs, estimator)
  return jax.lax.stop_gradient(jnp.where(mask.astype(bool), rewards - penalty, 0.0))
