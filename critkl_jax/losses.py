"""The loss: policy gradient, critic, entropy bonus and the certainty-weighted KL penalty.

Functions take arrays only, so that any training loop with any model can call them.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax.config import LossConfig
from critkl_jax.ops.weighted_kl import LOG_PROB_FLOOR, WeightedKL, linear_weighted_kl_loss, weighted_kl
from critkl_jax.ops.weighted_kl.statistics import in_vocabulary, nan_unless
from critkl_jax.records import Batch

_MAX_LOG_RATIO = 20.0  # exp of more is of no use in float32


@struct.dataclass
class Coefficients:
  """The numbers of the loss that a study varies, float32 `[]` each; they may be traced. See `LossConfig`."""

  clip_ratio: chex.Numeric
  value_coefficient: chex.Numeric
  entropy_coefficient: chex.Numeric
  temperature: chex.Numeric
  kl_coefficient: chex.Numeric
  certainty_exponent: chex.Numeric
  certainty_intercept: chex.Numeric
  certainty_temperature: chex.Numeric
  gate_threshold: chex.Numeric = 0.9
  gate_fraction: chex.Numeric = 0.2

  @classmethod
  def of(cls, config: LossConfig) -> 'Coefficients':
    """Returns the numbers of a config; a standard penalty is a prioritized one of exponent 0, none coefficient 0."""
    numbers = {name: getattr(config, name) for name in cls.__dataclass_fields__}
    numbers |= {'standard': {'certainty_exponent': 0.0}, 'none': {'kl_coefficient': 0.0}}.get(config.kl, {})
    return cls(**numbers)


def masked_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns the mean `[]` of `x` `[...]` over the entries where `mask` `[...]` is true; 0 if there are none."""
  chex.assert_equal_shape([x, mask])
  mask = mask.astype(bool)
  return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def action_log_probs(logits: chex.Array, actions: chex.Array, mask: chex.Array | None = None) -> chex.Array:
  """Returns the log-probability of each action.

  Args:
    logits: float `[..., V]`.
    actions: int32 `[...]`, 0..V-1; the log-probability of others is NaN, and so is the gradient through it.
    mask: bool `[...]`; where it is false logits and actions may be anything, the result is 0, and there is no gradient.
      All true if None.

  Returns:
    float32 `[...]`.
  """
  if mask is not None:
    logits = jnp.where(mask.astype(bool)[..., None], logits, 0.0)
  log_probs, known = jax.nn.log_softmax(logits.astype(jnp.float32)), in_vocabulary(actions, logits.shape[-1])
  found = jnp.take_along_axis(log_probs, jnp.where(known, actions, 0)[..., None], -1)[..., 0]
  found = nan_unless(known, found)
  return found if mask is None else jnp.where(mask.astype(bool), found, 0.0)


def token_kl(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array | None = None,
             estimator: str = 'exact') -> chex.Array:
  """Returns KL(policy || reference) of each token in nats, exact or estimated from the sampled action.

  With `d = log pi(a) - log pi_ref(a)`: `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d` (Schulman, "Approximating KL
  divergence", 2020); `exact = sum_a pi(a) d(a)`. As a loss, k2 has the expected gradient of KL(pi || pi_ref) and k3
  that of KL(pi_ref || pi); that of k1 is zero. A token that the reference rules out counts with log-probability -1e4.

  Args:
    logits: float `[..., V]` of the policy, at the temperature at which the actions were drawn.
    ref_logits: float `[..., V]` of the reference at the same temperature; no gradient flows into them.
    actions: int32 `[...]` sampled tokens, 0..V-1; not needed for `exact`. Estimates from others are NaN.
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
  # Last of all, so that a mask that comes after keeps NaN out of the gradient.
  return nan_unless(known, estimated_kl(record, estimator))


def estimated_kl(record: WeightedKL, estimator: str) -> chex.Array:
  """Returns what `token_kl` does, of tokens whose `WeightedKL` is known.

  Args:
    record: of the tokens, float32 `[...]` each.
    estimator: `exact`, `k1`, `k2` or `k3`.

  Returns:
    float32 `[...]` in nats.

  Raises:
    ValueError: if the estimator is unknown.
  """
  if estimator == 'exact':
    return record.kl
  log_ratio = jnp.maximum(record.log_prob, LOG_PROB_FLOOR) - record.ref_log_prob
  if estimator == 'k1':
    return log_ratio
  if estimator == 'k2':
    return 0.5 * jnp.square(log_ratio)
  if estimator == 'k3':
    log_ratio = jnp.maximum(log_ratio, -_MAX_LOG_RATIO)  # in both terms, or the sign of the gradient would turn
    return jnp.expm1(-log_ratio) + log_ratio
  raise ValueError(f"estimator: expected 'exact', 'k1', 'k2' or 'k3', got {estimator!r}.")


def weighted_penalty(record: WeightedKL, config: LossConfig) -> tuple[chex.Array, chex.Array]:
  """Returns the penalty of each token, `w_t KL_t`, and its weight w_t.

  Args:
    record: of the tokens, float32 `[...]` each.
    config: its `kl` says whether the weight is the record's (`prioritized`), 1 (`standard`) or 0 (`none`), its
      `kl_estimator` what stands for KL_t.

  Returns:
    `(penalty, weight)`, float32 `[...]` each.
  """
  constant = 1.0 if config.kl == 'standard' else 0.0
  weight = record.weight if config.kl == 'prioritized' else jnp.full(record.weight.shape, constant, record.weight.dtype)
  return weight * estimated_kl(record, config.kl_estimator), weight


def op_options(config: LossConfig, coefficients: Coefficients) -> dict[str, Any]:
  """Returns the arguments of `weighted_kl` and its kin that a config and its numbers stand for."""
  c = coefficients
  return {'exponent': c.certainty_exponent, 'intercept': c.certainty_intercept, 'temperature': c.temperature,
          'certainty': config.certainty, 'certainty_temperature': c.certainty_temperature}


def policy_loss(log_probs: chex.Array, old_log_probs: chex.Array, advantages: chex.Array, algorithm: str,
                clip_ratio: chex.Numeric) -> tuple[chex.Array, chex.Array]:
  """Returns the policy-gradient loss of each token, and whether its ratio was clipped.

  `ppo`: `-min(r A, clip(r, 1 - eps, 1 + eps) A)`, r = pi / pi_old (Schulman et al., arXiv 1707.06347, equation 7).
  `a2c`: `-log pi A` (Mnih et al., arXiv 1602.01783).

  Args:
    log_probs: float `[...]` of the actions under the policy.
    old_log_probs: float `[...]` under the behaviour policy.
    advantages: float `[...]`; no gradient flows into them.
    algorithm: `ppo` or `a2c`.
    clip_ratio: epsilon.

  Returns:
    `(loss, clipped)`, float32 and bool `[...]`.

  Raises:
    ValueError: if the algorithm is unknown.
  """
  advantages = jax.lax.stop_gradient(advantages)
  log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
  ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  clipped_ratio = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
  if algorithm == 'a2c':
    return -log_probs * advantages, jnp.zeros(ratio.shape, bool)
  if algorithm != 'ppo':
    raise ValueError(f"algorithm: expected 'ppo' or 'a2c', got {algorithm!r}.")
  return -jnp.minimum(ratio * advantages, clipped_ratio * advantages), ratio * advantages > clipped_ratio * advantages


def value_loss(values: chex.Array, old_values: chex.Array, returns: chex.Array, value_clip: float = 0.0) -> chex.Array:
  """Returns the critic's loss of each token, `(v - R)^2 / 2`, or with `value_clip` the larger of that and the one with
  v clipped to `value_clip` around the rollout's value.

  Args:
    values: float `[...]` of the critic.
    old_values: float `[...]` at the time of the rollout.
    returns: float `[...]` targets; no gradient flows into them.
    value_clip: 0 does not clip.

  Returns:
    float32 `[...]`.
  """
  returns = jax.lax.stop_gradient(returns)
  losses = jnp.square(values - returns)
  if value_clip:
    clipped = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    losses = jnp.maximum(losses, jnp.square(clipped - returns))
  return 0.5 * losses


def ppo_loss(logits: chex.Array, values: chex.Array, ref_logits: chex.Array, batch: Batch,
             config: LossConfig = LossConfig(), coefficients: Coefficients | None = None
             ) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns the loss of a batch of episodes and its parts.

  `L = L_policy + c_v L_value - c_e H + alpha mean_t[w_t KL_t]`, `w_t = (1 - c) J_t^beta + c` (arXiv 2502.06533, section
  5), each a mean over the tokens where the batch's mask is true.

  Args:
    logits: float `[B, T, V]`; `logits[b, t]` is the distribution from which `actions[b, t]` was drawn, before the
      division by the config's temperature.
    values: float `[B, T]` value of the state in which each action was taken.
    ref_logits: float `[B, T, V]` of the reference at the same places; no gradient flows into them.
    batch: actions, mask, behaviour log-probabilities, advantages and returns, `[B, T]` each.
    config: estimators and coefficients.
    coefficients: numbers that replace the config's; they may be traced.

  Returns:
    `(loss, metrics)`, float32 `[]` each. Metrics: `loss`, `policy_loss`, `value_loss`, `entropy` (nats), `kl` (exact,
    unweighted, nats), `weighted_kl` (as penalised), `weight`, `clip_fraction`. Where the batch knows its critical
    tokens also `critical`, their share, and `kl_at_critical` and `weight_at_critical`, what of the means comes from
    them.

  Raises:
    AssertionError: if the shapes do not agree.
  """
  chex.assert_rank([logits, values, ref_logits], [3, 2, 3])
  _check_batch(values, batch)
  chex.assert_equal_shape([logits, ref_logits])
  chex.assert_equal_shape_prefix([logits, values], 2)
  c = Coefficients.of(config) if coefficients is None else coefficients
  record = weighted_kl(logits, ref_logits, batch.actions, mask=batch.mask, **op_options(config, c))
  parts = _token_parts(record, config, c, *_of_tokens(batch))
  return _with_critic(masked_mean(parts['loss'], batch.mask), parts, values, batch, config, c)


def linear_ppo_loss(hidden: chex.Array, embedding: chex.Array, values: chex.Array, ref_hidden: chex.Array,
                    ref_embedding: chex.Array, batch: Batch, config: LossConfig = LossConfig(),
                    coefficients: Coefficients | None = None, **options: Any
                    ) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns what `ppo_loss` does for logits `hidden @ embedding.T`, without ever holding them all: for large
  vocabularies.

  Args:
    hidden: float `[B, T, D]` last hidden states of the policy; `[b, t]` gives the distribution of `actions[b, t]`.
    embedding: float `[V, D]` its output embedding.
    values: float `[B, T]`.
    ref_hidden: float `[B, T, D_ref]` of the reference; no gradient flows into them.
    ref_embedding: float `[V, D_ref]` of the reference.
    batch: as in `ppo_loss`.
    config: estimators and coefficients.
    coefficients: numbers that replace the config's; they may be traced.
    **options: further arguments of `linear_weighted_kl`, such as `implementation` or `axis_name`.

  Returns:
    `(loss, metrics)` as `ppo_loss`.

  Raises:
    AssertionError: if the shapes of values and batch do not agree.
    ValueError: as `linear_weighted_kl`.
  """
  _check_batch(values, batch)
  c = Coefficients.of(config) if coefficients is None else coefficients

  def token_loss(record, *of_tokens):
    return _token_parts(record, config, c, *of_tokens)['loss']

  total, record = linear_weighted_kl_loss(
      token_loss, hidden, embedding, ref_hidden, ref_embedding, batch.actions, *_of_tokens(batch),
      mask=batch.mask, **op_options(config, c), **options)
  parts = _token_parts(record, config, c, *_of_tokens(batch))
  count = jnp.maximum(jnp.sum(batch.mask, dtype=jnp.float32), 1.0)
  return _with_critic(total / count, parts, values, batch, config, c)


def _of_tokens(batch):
  """Returns what the loss of a token needs beside what the models say of it."""
  return (batch.log_probs, batch.advantages) + (() if batch.gate is None else (batch.gate,))


def _token_parts(record, config, c, old_log_probs, advantages, gate=1.0):
  """Returns the loss of each token but for the critic's, and what it is made of."""
  policy_losses, clipped = policy_loss(record.log_prob, old_log_probs, advantages, config.algorithm, c.clip_ratio)
  penalty, weight = (gate * x for x in weighted_penalty(record, config))
  kl_coefficient = c.kl_coefficient if config.kl_placement == 'loss' else 0.0
  return {'loss': policy_losses - c.entropy_coefficient * record.entropy + kl_coefficient * penalty,
          'policy_loss': policy_losses, 'entropy': record.entropy, 'weighted_kl': penalty, 'kl': record.kl,
          'weight': weight, 'clip_fraction': clipped.astype(jnp.float32)}


def _with_critic(loss, parts, values, batch, config, c):
  """Adds the critic's loss, and returns the loss and the means of its parts."""
  # What stands at masked places may be anything, NaN included: it must not reach the gradient through 0 * NaN.
  values = jnp.where(batch.mask.astype(bool), values, 0.0)
  critic = masked_mean(value_loss(values, batch.values, batch.returns, config.value_clip), batch.mask)
  loss = loss + c.value_coefficient * critic
  metrics = {name: masked_mean(part, batch.mask) for name, part in parts.items()}
  if batch.critical is not None:
    metrics |= {f'{name}_at_critical': masked_mean(jnp.where(batch.critical, parts[name], 0.0), batch.mask)
                for name in ('kl', 'weight')}
    metrics['critical'] = masked_mean(batch.critical.astype(jnp.float32), batch.mask)
  return loss, jax.lax.stop_gradient(metrics | {'value_loss': critic, 'loss': loss})


def _check_batch(values, batch):
  chex.assert_rank(values, 2)
  chex.assert_equal_shape([values, batch.actions, batch.mask, batch.log_probs, batch.advantages, batch.returns])


ppo_loss_jit = jax.jit(ppo_loss, static_argnames='config')
