"""The loss: policy gradient, critic, entropy bonus and the certainty-weighted KL penalty.

Functions take arrays only, so that any training loop with any model can call them: `ppo_loss` takes logits,
`linear_ppo_loss` hidden states, `ppo_loss_from_log_probs` the log-probabilities that trainers store.

Letters: B episodes, T response tokens, V vocabulary, D model width.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import (
    TokenStatistics,
    linear_weighted_kl,
    linear_weighted_kl_loss,
    weighted_kl,
)
from critkl_jax.ops.weighted_kl.plain import at_action
from critkl_jax.ops.weighted_kl.statistics import in_vocabulary, nan_unless
from critkl_jax.pytree import PyTreeNode
from critkl_jax.records import Batch
from critkl_jax.rl.aggregation import divisor, token_share
from critkl_jax.rl.certainties import kl_weight
from critkl_jax.rl.checks import check_batch
from critkl_jax.rl.kl import NUMBERS_OF_PENALTIES, PENALTIES, estimated_kl, token_kl_from_log_probs
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.rl.loss_metrics import aggregated, metrics_of
from critkl_jax.rl.policy_gradients import policy_loss, sequence_level


class Coefficients(PyTreeNode):
  """The settings of the loss that may be traced, floats or float32 `[]` each. `LossConfig` describes them."""

  clip_ratio: chex.Numeric
  value_coefficient: chex.Numeric
  entropy_coefficient: chex.Numeric
  temperature: chex.Numeric
  kl_coefficient: chex.Numeric
  certainty_exponent: chex.Numeric
  certainty_intercept: chex.Numeric
  certainty_temperature: chex.Numeric

  @classmethod
  def of(cls, config: LossConfig) -> 'Coefficients':
    """Reads a config's coefficients; `kl='standard'` sets the exponent to 0, `kl='none'` sets alpha to 0."""
    numbers = {name: getattr(config, name) for name in cls.__dataclass_fields__}
    return cls(**numbers | NUMBERS_OF_PENALTIES[config.kl])


def action_log_probs(logits: chex.Array, actions: chex.Array, mask: chex.Array | None = None) -> chex.Array:
  """Computes the log-probability of each action.

  Args:
    logits: float `[..., V]`, already divided by the temperature.
    actions: int32 `[...]`, 0..V-1; an id outside the vocabulary has a NaN log-probability and a NaN gradient.
    mask: bool `[...]`; where it is false, logits and actions may be anything, NaN included, and the result and its
      gradient are 0. None: all true.

  Returns:
    float32 `[...]` in nats.
  """
  if mask is not None:
    logits = jnp.where(mask.astype(bool)[..., None], logits, 0.0)
  log_probs, known = jax.nn.log_softmax(logits.astype(jnp.float32)), in_vocabulary(actions, logits.shape[-1])
  found = at_action(log_probs, jnp.where(known, actions, 0))[..., 0]
  found = nan_unless(known, found)
  return found if mask is None else jnp.where(mask.astype(bool), found, 0.0)


def weighted_penalty(record: TokenStatistics, config: LossConfig, weight: chex.Array | None = None
                     ) -> tuple[chex.Array, chex.Array]:
  """Computes the KL penalty of each token, `w_t KL_t`, and its weight w_t.

  Args:
    record: statistics of the tokens, float32 `[...]` each.
    config: `kl` selects the weight: the record's (`prioritized`), 1 (`standard`) or 0 (`none`); `kl_estimator` selects
      the estimate of KL_t.
    weight: float `[...]` replaces the config's weight; no gradient flows into it. None: the config's weight.

  Returns:
    `(penalty, weight)`, float32 `[...]` each.
  """
  weight = PENALTIES[config.kl](record) if weight is None else jax.lax.stop_gradient(weight)
  return weight * estimated_kl(record, config.kl_estimator), weight


def op_options(config: LossConfig, coefficients: Coefficients) -> dict[str, Any]:
  """Returns the keyword arguments of `weighted_kl` and `linear_weighted_kl` for a config and its coefficients."""
  c = coefficients
  return {'exponent': c.certainty_exponent, 'intercept': c.certainty_intercept, 'temperature': c.temperature,
          'certainty': config.certainty, 'certainty_temperature': c.certainty_temperature}


def value_loss(values: chex.Array, old_values: chex.Array | None, returns: chex.Array, value_clip: float = 0.0
               ) -> chex.Array:
  """Computes the critic's loss of each token, `(value - return)^2 / 2`.

  With `value_clip` it is the larger of two losses: at the value, and at the value clipped to
  `old_value - value_clip .. old_value + value_clip`.

  Args:
    values: float `[...]` the critic's estimates.
    old_values: float `[...]` the estimates at the time of the rollout; may be None if `value_clip` is 0.
    returns: float `[...]` targets; no gradient flows into them.
    value_clip: clipping range; 0 does not clip.

  Returns:
    float32 `[...]`.
  """
  returns = jax.lax.stop_gradient(returns)
  losses = jnp.square(values - returns)
  if value_clip:
    clipped = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    losses = jnp.maximum(losses, jnp.square(clipped - returns))
  return 0.5 * losses


def ppo_loss(logits: chex.Array, values: chex.Array | None, ref_logits: chex.Array, batch: Batch,
             config: LossConfig = LossConfig(), coefficients: Coefficients | None = None, *,
             denominator: chex.Numeric | None = None, checks: bool = False
             ) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Computes the loss of a batch of episodes and its metrics.

  `loss = mean_t[policy_loss_t + c_v value_loss_t - c_e entropy_t + alpha w_t KL_t]`, `w_t = (1 - c) J_t^beta + c`
  (arXiv 2502.06533, section 5). The mean is over the tokens where the batch's mask is true; the config's `aggregation`
  says how it is taken. c_v, c_e, alpha, beta and c are the config's `value_coefficient`, `entropy_coefficient`,
  `kl_coefficient`, `certainty_exponent` and `certainty_intercept`.

  Args:
    logits: float `[B, T, V]` of the policy, not yet divided by the config's temperature; `logits[b, t]` is the
      distribution from which `actions[b, t]` was drawn.
    values: float `[B, T]` the critic's value of the state in which each action was taken; None without a critic.
    ref_logits: float `[B, T, V]` of the reference at the same tokens, not yet divided by the temperature either; no
      gradient flows into them.
    batch: actions, mask, advantages and behaviour log-probabilities; returns if there is a critic, and values if the
      config has a `value_clip`. Its `weight`, if given, replaces the config's w_t.
    config: settings of the loss.
    coefficients: coefficients that replace the config's; they may be traced.
    denominator: divides the sums over tokens instead of the batch's own `loss_denominator`, so that the losses and
      gradients of the parts of a batch add up; may be traced.
    checks: whether to insert the checks of `check_batch`; then transform the calling function with
      `jax.experimental.checkify`.

  Returns:
    `(loss, metrics)`, float32 `[]` each; metrics carry no gradient. Aggregated like the loss: `loss`, `policy_loss`,
    `kl_penalty` (w_t KL_t with the config's estimator) and, with a critic, `value_loss`. Means over the batch's tokens:
    `entropy` (nats), `kl` (exact, unweighted, nats), `weighted_kl` (w_t times the exact KL), `weight`, `clip_fraction`.
    `weight_q01`, `weight_q50`, `weight_q99`: quantiles of the weight over the batch's tokens. If `batch.critical` is
    given, also `critical`, the share of critical tokens, and `kl_at_critical` and `weight_at_critical`, sums over
    critical tokens divided by the number of all tokens: divide them by `critical` for means over critical tokens.

  Raises:
    AssertionError: if the shapes do not agree.
    ValueError: if `batch.weight` is given with `kl='none'`, only one of `values` and `batch.returns` is given, or
      `batch.values` is missing with a `value_clip`.
  """
  chex.assert_rank([logits, ref_logits], 3)
  _check_batch(values, batch, config)
  chex.assert_equal_shape([logits, ref_logits])
  chex.assert_equal_shape_prefix([logits, batch.actions], 2)
  if checks:
    check_batch(batch, logits.shape[-1])
  c = Coefficients.of(config) if coefficients is None else coefficients
  record = weighted_kl(logits, ref_logits, batch.actions, mask=batch.mask, **op_options(config, c))
  return _loss_of_statistics(record, values, batch, config, c, denominator)


def linear_ppo_loss(hidden: chex.Array, embedding: chex.Array, values: chex.Array | None, ref_hidden: chex.Array,
                    ref_embedding: chex.Array, batch: Batch, config: LossConfig = LossConfig(),
                    coefficients: Coefficients | None = None, *, denominator: chex.Numeric | None = None,
                    checks: bool = False, **options: Any) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Computes `ppo_loss` from hidden states, for large vocabularies: the logits are never all in memory.

  With `ratio='sequence'` the backward pass computes the logits again, because the ratio of a sequence must be known
  before the loss of any of its tokens.

  Args:
    hidden: float `[B, T, D]` last hidden states of the policy; `hidden[b, t]` gives the distribution from which
      `actions[b, t]` was drawn.
    embedding: float `[V, D]` output embedding of the policy.
    values: float `[B, T]` as in `ppo_loss`; None without a critic.
    ref_hidden: float `[B, T, D_ref]` last hidden states of the reference; no gradient flows into them.
    ref_embedding: float `[V, D_ref]` output embedding of the reference; no gradient flows into it.
    batch: as in `ppo_loss`.
    config: settings of the loss.
    coefficients: coefficients that replace the config's; they may be traced.
    denominator: as in `ppo_loss`.
    checks: as in `ppo_loss`.
    **options: `bias`, `ref_bias`, `soft_cap`, `axis_name`, `implementation` and `memory_budget` of
      `linear_weighted_kl`.

  Returns:
    `(loss, metrics)` as in `ppo_loss`.

  Raises:
    AssertionError: if the shapes of values and batch do not agree.
    ValueError: as `linear_weighted_kl` and `ppo_loss`.
  """
  _check_batch(values, batch, config)
  if checks:
    axis_name = options.get('axis_name')
    check_batch(batch, embedding.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name)))
  c = Coefficients.of(config) if coefficients is None else coefficients
  arrays = hidden, embedding, ref_hidden, ref_embedding, batch.actions
  own = {'mask': batch.mask, **op_options(config, c)}
  if own.keys() & options.keys():
    raise ValueError(f'{sorted(own.keys() & options.keys())}: come from the batch and the config; leave them out.')
  options |= own
  if config.ratio == 'sequence':
    return _loss_of_statistics(linear_weighted_kl(*arrays, **options), values, batch, config, c, denominator)

  share = token_share(batch.mask, config.aggregation)
  of_tokens = _of_tokens(batch)
  if share is not None:
    of_tokens['share'] = jnp.where(batch.mask.astype(bool), share, 0.0)

  def token_loss(record, *values):
    of_token = dict(zip(of_tokens, values))
    factor = of_token.pop('share', 1.0)
    return factor * _token_terms(record, config, c, **of_token)['loss']

  total, record = linear_weighted_kl_loss(token_loss, *arrays, *of_tokens.values(), **options)
  loss = total / divisor(batch.mask, config.aggregation, config.aggregation_length, denominator)
  terms = _token_terms(record, config, c, **_of_tokens(batch))
  return _with_critic(loss, metrics_of(terms, batch, config, denominator), values, batch, config, c, denominator)


def ppo_loss_from_log_probs(log_probs: chex.Array, batch: Batch, config: LossConfig = LossConfig(), *,
                            ref_log_probs: chex.Array | None = None, certainty: chex.Array | None = None,
                            weight: chex.Array | None = None, entropy: chex.Array | None = None,
                            values: chex.Array | None = None, coefficients: Coefficients | None = None,
                            denominator: chex.Numeric | None = None, checks: bool = False
                            ) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Computes `ppo_loss` from the log-probabilities of the actions, which is what most trainers store.

  The weight of the prioritized penalty depends on the reference alone: store the certainty of `reference_statistics`
  with the reference's log-probabilities. Where the mask is false, all arrays may be anything, NaN included.

  Args:
    log_probs: float `[B, T]` log-probability of each action under the policy, at the config's temperature; gradients
      flow into it.
    batch: as in `ppo_loss`.
    config: settings of the loss; `kl_estimator` is `k1`, `k2` or `k3`.
    ref_log_probs: float `[B, T]` log-probability under the reference, at the same temperature; no gradient flows into
      it. Not needed for `kl='none'`.
    certainty: float `[B, T]` certainty of the reference, 0..1, at the config's `certainty_temperature`. The weight w_t
      is computed from it with the config's exponent and intercept. `kl='prioritized'` needs it, or a weight; other
      penalties ignore it.
    weight: float `[B, T]` w_t itself, instead of the certainty; no gradient flows into it. `batch.weight` must then be
      None.
    entropy: float `[B, T]` entropy of the policy in nats; needed for an entropy bonus, whose gradient flows into it.
    values: float `[B, T]` as in `ppo_loss`; None without a critic.
    coefficients: coefficients that replace the config's; they may be traced.
    denominator: as in `ppo_loss`.
    checks: as in `ppo_loss`; the range of the actions is not checked, because V is not known.

  Returns:
    `(loss, metrics)` as in `ppo_loss`, with `kl_estimate` (the KL by the config's estimator, unweighted, nats) in place
    of `kl`, `weighted_kl` and `kl_at_critical`, which need logits; `entropy` only if it is given.

  Raises:
    AssertionError: if the shapes do not agree.
    ValueError: as `ppo_loss`; if the estimator is `exact`; if an array is missing that the config needs; or if
      `batch.weight` is given together with `weight` or, for `kl='prioritized'`, with `certainty`.
  """
  c = Coefficients.of(config) if coefficients is None else coefficients
  if certainty is not None and config.kl == 'prioritized':
    weight = kl_weight(certainty, c.certainty_exponent, c.certainty_intercept) if weight is None else weight
  batch = _with_weight(batch, weight)
  _check_batch(values, batch, config)
  if checks:
    check_batch(batch)
  needed = [('ref_log_probs', ref_log_probs, config.kl != 'none', f'kl={config.kl!r}'),
            ('certainty', batch.weight, config.kl == 'prioritized', "kl='prioritized'"),
            ('entropy', entropy, config.entropy_coefficient > 0, f'entropy_coefficient={config.entropy_coefficient}')]
  for name, array, is_needed, reason in needed:
    if array is None and is_needed:
      raise ValueError(f'{name}: {reason} needs it, got None.')
  ref_log_probs = log_probs if ref_log_probs is None else ref_log_probs
  chex.assert_equal_shape([log_probs, batch.actions, ref_log_probs, *([] if entropy is None else [entropy])])
  mask = batch.mask.astype(bool)
  log_probs, ref_log_probs, *some = (None if x is None else jnp.where(mask, x.astype(jnp.float32), 0.0)
                                     for x in (log_probs, ref_log_probs, entropy))
  weight = jnp.full_like(log_probs, float(config.kl == 'standard')) if batch.weight is None else _fixed_weight(batch)
  estimate = (jnp.zeros_like(log_probs) if config.kl == 'none' else
              token_kl_from_log_probs(log_probs, ref_log_probs, config.kl_estimator))
  old = _old_log_probs(batch, log_probs, config)
  terms = _terms(log_probs, some[0], weight, weight * estimate, config, c, old, **_factors(batch))
  terms['kl_estimate'] = estimate
  loss = aggregated(terms['loss'], batch, config, denominator)
  return _with_critic(loss, metrics_of(terms, batch, config, denominator), values, batch, config, c, denominator)


def _loss_of_statistics(record, values, batch, config, c, denominator):
  """Returns loss and metrics, given the statistics of each token."""
  of_tokens = _of_tokens(batch) | {'old_log_probs': _old_log_probs(batch, record.log_prob, config)}
  terms = _token_terms(record, config, c, **of_tokens)
  loss = aggregated(terms['loss'], batch, config, denominator)
  return _with_critic(loss, metrics_of(terms, batch, config, denominator), values, batch, config, c, denominator)


def _old_log_probs(batch, log_probs, config):
  """Returns the behaviour log-probabilities `[B, T]`, changed by `sequence_level` for `ratio='sequence'`, or None."""
  if config.ratio == 'token' or batch.log_probs is None:
    return batch.log_probs
  return sequence_level(batch.log_probs, log_probs, batch.mask)


def _of_tokens(batch):
  """Returns the per-token arrays of the batch that the loss reads, float32 `[B, T]`, as arguments of `_token_terms`."""
  found = _factors(batch)
  if batch.log_probs is not None:
    found['old_log_probs'] = batch.log_probs
  return found if batch.weight is None else found | {'weight': _fixed_weight(batch)}


def _factors(batch):
  """Returns advantages and, if the batch has them, importance weights, `[B, T]` each, as arguments of `_terms`."""
  advantages = batch.advantages
  if advantages.ndim == 1:
    advantages = jnp.where(batch.mask.astype(bool), advantages[:, None], 0.0)
  found = {'advantages': advantages}
  if batch.importance_weights is not None:
    factors = jnp.where(batch.mask.astype(bool), batch.importance_weights.astype(jnp.float32), 0.0)
    found['importance_weights'] = jax.lax.stop_gradient(factors)
  return found


def _fixed_weight(batch):
  """Returns the batch's weights without gradient, 0 where masked: there the weight may be anything, NaN included."""
  return jax.lax.stop_gradient(jnp.where(batch.mask.astype(bool), batch.weight.astype(jnp.float32), 0.0))


def _with_weight(batch, weight):
  if weight is None:
    return batch
  if batch.weight is not None:
    raise ValueError('batch.weight: another weight or a certainty is given as well; leave one of them out.')
  return batch.replace(weight=weight)


def _token_terms(record, config, c, advantages, old_log_probs=None, importance_weights=None, weight=None):
  """Returns the loss of each token, without the critic, and the terms of this loss, given the tokens' statistics."""
  penalty, weight = weighted_penalty(record, config, weight)
  terms = _terms(record.log_prob, record.entropy, weight, penalty, config, c, old_log_probs, advantages,
                 importance_weights)
  return terms | {'kl': record.kl, 'weighted_kl': weight * record.kl}


def _terms(log_prob, entropy, weight, penalty, config, c, old_log_probs, advantages, importance_weights=None):
  policy_losses, clipped = policy_loss(log_prob, old_log_probs, advantages, config.algorithm, c.clip_ratio,
                                       config.clip_ratio_high or None, config.dual_clip)
  if importance_weights is not None:
    policy_losses = importance_weights * policy_losses
  bonus = 0.0 if entropy is None else c.entropy_coefficient * entropy
  terms = {'loss': policy_losses - bonus + c.kl_coefficient * penalty, 'policy_loss': policy_losses,
           'kl_penalty': penalty, 'weight': weight, 'clip_fraction': clipped.astype(jnp.float32)}
  return terms if entropy is None else terms | {'entropy': entropy}


def _with_critic(loss, metrics, values, batch, config, c, denominator):
  """Adds the critic's loss, if there is a critic, and returns loss and metrics."""
  if values is None:
    return loss, jax.lax.stop_gradient(metrics | {'loss': loss})
  # Values of masked tokens may be anything, NaN included: they must not reach the gradient through 0 * NaN.
  values = jnp.where(batch.mask.astype(bool), values, 0.0)
  critic = aggregated(value_loss(values, batch.values, batch.returns, config.value_clip), batch, config, denominator)
  loss = loss + c.value_coefficient * critic
  return loss, jax.lax.stop_gradient(metrics | {'value_loss': critic, 'loss': loss})


def _check_batch(values, batch, config):
  chex.assert_rank(batch.actions, 2)
  names = [name for name in ('mask', 'log_probs', 'values', 'returns', 'weight', 'importance_weights', 'critical')
           if getattr(batch, name) is not None]
  chex.assert_equal_shape([batch.actions, *(getattr(batch, name) for name in names),
                           *([] if values is None else [values])])
  chex.assert_rank(batch.advantages, {1, 2})
  chex.assert_equal_shape_prefix([batch.actions, batch.advantages], batch.advantages.ndim)
  if (values is None) != (batch.returns is None):
    given, missing = ('values', 'batch.returns') if batch.returns is None else ('batch.returns', 'values')
    raise ValueError(f"{missing}: the critic's loss needs it, since {given} is given; give both, or neither without a "
                     'critic.')
  if values is not None and config.value_clip and batch.values is None:
    raise ValueError(f'batch.values: value_clip={config.value_clip} needs the values at the time of the rollout.')
  if batch.weight is not None and config.kl == 'none':
    raise ValueError("batch.weight: kl='none' has no penalty to weigh; leave the weight out, or set kl='prioritized'.")


ppo_loss_jit = jax.jit(ppo_loss, static_argnames=('config', 'checks'))
