"""The loss: policy gradient, critic, entropy bonus and the certainty-weighted KL penalty.

Functions take arrays only, so that any training loop with any model can call them.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax.confidence import certainty, entropy, kl_weight
from critkl_jax.config import LossConfig
from critkl_jax.records import Batch

# Log-probability that a ruled-out token (logit -inf) is taken to have when two policies are compared. A finite number
# keeps losses and gradients finite; no token that a float32 softmax can produce is as unlikely.
LOG_PROB_FLOOR = -1e4
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

  @classmethod
  def of(cls, config: LossConfig) -> 'Coefficients':
    """Returns the numbers of a config."""
    return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


def masked_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns the mean `[]` of `x` `[...]` over the entries where `mask` `[...]` is true; 0 if there are none."""
  chex.assert_equal_shape([x, mask])
  mask = mask.astype(bool)
  return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def action_log_probs(logits: chex.Array, actions: chex.Array) -> chex.Array:
  """Returns the log-probability of each action: float32 `[...]` of logits `[..., V]` and int32 actions `[...]`."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(log_probs, actions[..., None], -1)[..., 0]


def token_kl(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array | None = None,
             estimator: str = 'exact') -> chex.Array:
  """Returns KL(policy || reference) of each token in nats, exact or estimated from the sampled action.

  With `d = log pi(a) - log pi_ref(a)`: `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d` (Schulman, "Approximating KL
  divergence", 2020); `exact = sum_a pi(a) d(a)`. As a loss, k2 has the expected gradient of KL(pi || pi_ref) and k3
  that of KL(pi_ref || pi); that of k1 is zero. A token that the reference rules out counts with log-probability -1e4.

  Args:
    logits: float `[..., V]` of the policy, at the temperature at which the actions were drawn.
    ref_logits: float `[..., V]` of the reference at the same temperature; no gradient flows into them.
    actions: int32 `[...]` sampled tokens; not needed for `exact`.
    estimator: `exact`, `k1`, `k2` or `k3`.

  Returns:
    float32 `[...]`.

  Raises:
    ValueError: if the estimator is unknown or needs actions that are not given.
    AssertionError: if the shapes do not agree.
  """
  chex.assert_equal_shape([logits, ref_logits])
  log_probs = jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32)), LOG_PROB_FLOOR)
  ref_logits = jax.lax.stop_gradient(ref_logits).astype(jnp.float32)
  ref_log_probs = jnp.maximum(jax.nn.log_softmax(ref_logits), LOG_PROB_FLOOR)
  if estimator == 'exact':
    return jnp.sum(jnp.exp(log_probs) * (log_probs - ref_log_probs), -1)
  if actions is None:
    raise ValueError(f'actions: the estimator {estimator!r} needs the sampled actions, got None.')
  log_ratio = jnp.take_along_axis(log_probs - ref_log_probs, actions[..., None], -1)[..., 0]
  if estimator == 'k1':
    return log_ratio
  if estimator == 'k2':
    return 0.5 * jnp.square(log_ratio)
  if estimator == 'k3':
    log_ratio = jnp.maximum(log_ratio, -_MAX_LOG_RATIO)  # in both terms, or the sign of the gradient would turn
    return jnp.expm1(-log_ratio) + log_ratio
  raise ValueError(f"estimator: expected 'exact', 'k1', 'k2' or 'k3', got {estimator!r}.")


def penalty_weight(ref_logits: chex.Array, config: LossConfig, coefficients: Coefficients | None = None) -> chex.Array:
  """Returns the weight of each token's KL penalty as the config says: float32 `[...]` of reference logits `[..., V]`.

  `prioritized`: `kl_weight` of the certainty; `standard`: 1; `none`: 0.
  """
  c = Coefficients.of(config) if coefficients is None else coefficients
  if config.kl == 'prioritized':
    sure = certainty(ref_logits, config.certainty, c.certainty_temperature)
    return kl_weight(sure, c.certainty_exponent, c.certainty_intercept)
  return jnp.full(ref_logits.shape[:-1], 1.0 if config.kl == 'standard' else 0.0)


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
    unweighted, nats), `weighted_kl` (as penalised), `weight`, `clip_fraction`.

  Raises:
    AssertionError: if the shapes do not agree.
  """
  chex.assert_rank([logits, values, ref_logits], [3, 2, 3])
  chex.assert_equal_shape([values, batch.actions, batch.mask, batch.log_probs, batch.advantages, batch.returns])
  chex.assert_equal_shape([logits, ref_logits])
  chex.assert_equal_shape_prefix([logits, values], 2)
  c = Coefficients.of(config) if coefficients is None else coefficients
  mean = functools.partial(masked_mean, mask=batch.mask)
  # What stands at masked places may be anything, NaN included: it must not reach the gradient through 0 * NaN.
  values = jnp.where(batch.mask.astype(bool), values, 0.0)
  hide = functools.partial(jnp.where, batch.mask[..., None].astype(bool))
  weights = penalty_weight(hide(ref_logits, 0.0), config, c)
  logits = hide(logits, 0.0).astype(jnp.float32) / c.temperature
  ref_logits = hide(ref_logits, 0.0).astype(jnp.float32) / c.temperature

  policy_losses, clipped = policy_loss(
      action_log_probs(logits, batch.actions), batch.log_probs, batch.advantages, config.algorithm, c.clip_ratio)
  losses = {
      'policy_loss': mean(policy_losses),
      'value_loss': mean(value_loss(values, batch.values, batch.returns, config.value_clip)),
      'entropy': mean(entropy(jax.nn.log_softmax(logits))),
      'weighted_kl': mean(weights * token_kl(logits, ref_logits, batch.actions, config.kl_estimator)),
  }
  kl_coefficient = c.kl_coefficient if config.kl_placement == 'loss' else 0.0
  loss = (losses['policy_loss'] + c.value_coefficient * losses['value_loss']
          - c.entropy_coefficient * losses['entropy'] + kl_coefficient * losses['weighted_kl'])
  metrics = losses | {
      'loss': loss,
      'kl': mean(token_kl(jax.lax.stop_gradient(logits), ref_logits)),
      'weight': mean(weights),
      'clip_fraction': mean(clipped.astype(jnp.float32)),
  }
  return loss, metrics


ppo_loss_jit = jax.jit(ppo_loss, static_argnames='config')
