"""Per-token policy-gradient losses, and their importance ratios.

Letters: B episodes, T response tokens.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from critkl_jax.rl.kl import MAX_LOG_RATIO


def _ppo(log_probs, log_ratio, advantages, clip_ratio, clip_ratio_high, dual_clip):
  ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  gain = ratio * advantages
  clipped_gain = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio_high) * advantages
  objective, clipped = jnp.minimum(gain, clipped_gain), gain > clipped_gain
  if dual_clip:
    least = jnp.where(advantages < 0, dual_clip * advantages, -jnp.inf)
    objective, clipped = jnp.maximum(objective, least), clipped | (objective < least)
  return -objective, clipped


def _a2c(log_probs, log_ratio, advantages, clip_ratio, clip_ratio_high, dual_clip):
  return -log_probs * advantages, jnp.zeros(log_ratio.shape, bool)


# Name -> (log pi [...], log(pi / pi_old) [...], advantages [...], clip_ratio, clip_ratio_high, dual_clip) ->
# (loss [...], whether clipped [...]).
ALGORITHMS: dict[str, Callable[..., tuple[chex.Array, chex.Array]]] = {'ppo': _ppo, 'a2c': _a2c}
RATIOS = ('token', 'sequence')


def policy_loss(log_probs: chex.Array, old_log_probs: chex.Array | None, advantages: chex.Array, algorithm: str,
                clip_ratio: chex.Numeric, clip_ratio_high: chex.Numeric | None = None, dual_clip: float = 0.0
                ) -> tuple[chex.Array, chex.Array]:
  """Computes the policy-gradient loss of each token, and whether clipping is active in it.

  `ppo`: `-min(ratio adv, clip(ratio, 1 - epsilon, 1 + epsilon_high) adv)`, `ratio = pi / pi_old`, `adv` the advantage
  (Schulman et al., arXiv 1707.06347, equation 7; separate epsilon_high: Yu et al., arXiv 2503.14476, section 3.1).
  The log-ratio is clipped to -20..20 before exp. With a dual clip, the loss is at most `-dual_clip adv` where the
  advantage is negative (Ye et al., arXiv 1912.09729).
  `a2c`: `-adv log pi` (Mnih et al., arXiv 1602.01783); never clipped.

  Args:
    log_probs: float `[...]` log-probability of each action under the policy.
    old_log_probs: float `[...]` log-probability of each action under the behaviour policy; None if this is the policy
      itself, so that all ratios are 1.
    advantages: float `[...]`; no gradient flows into them.
    algorithm: a name in `ALGORITHMS`.
    clip_ratio: epsilon; may be traced.
    clip_ratio_high: epsilon_high; None: the same as epsilon.
    dual_clip: largest ratio that counts where the advantage is negative, greater than 1; 0: no such bound.

  Returns:
    `(loss, clipped)`, float32 and bool `[...]`; `clipped` is true where clipping changes the loss.

  Raises:
    ValueError: if the algorithm is unknown.
  """
  if algorithm not in ALGORITHMS:
    raise ValueError(f'algorithm: expected one of {tuple(ALGORITHMS)}, got {algorithm!r}.')
  log_ratio = log_probs - jax.lax.stop_gradient(log_probs if old_log_probs is None else old_log_probs)
  high = clip_ratio if clip_ratio_high is None else clip_ratio_high
  return ALGORITHMS[algorithm](log_probs, log_ratio, jax.lax.stop_gradient(advantages), clip_ratio, high, dual_clip)


def sequence_level(old_log_probs: chex.Array, log_probs: chex.Array, mask: chex.Array) -> chex.Array:
  """Changes behaviour log-probabilities so that the ratio of each token equals the ratio of its sequence.

  The ratio of a sequence is the geometric mean of its tokens' ratios. The gradient of a token's ratio flows through the
  log-probability of this token alone (GSPO-token: Zheng et al., arXiv 2507.18071, section 4.3). If all tokens of a
  sequence have the same advantage and the loss is aggregated over `sequences`, the gradient equals GSPO's (section
  4.1).

  Args:
    old_log_probs: float `[B, T]` log-probability of each action under the behaviour policy.
    log_probs: float `[B, T]` log-probability under the policy.
    mask: bool `[B, T]` true at the tokens of the sequences.

  Returns:
    float32 `[B, T]`, to pass to `policy_loss` as `old_log_probs`; without gradient, 0 where masked.
  """
  mask = mask.astype(bool)
  log_probs, old_log_probs = (jnp.where(mask, jax.lax.stop_gradient(x), 0.0) for x in (log_probs, old_log_probs))
  count = jnp.maximum(jnp.sum(mask, -1, keepdims=True, dtype=jnp.float32), 1.0)
  log_ratio = jnp.sum(log_probs - old_log_probs, -1, keepdims=True) / count
  return jnp.where(mask, log_probs - log_ratio, 0.0)


def truncated_importance_weights(log_probs: chex.Array, sampler_log_probs: chex.Array, mask: chex.Array,
                                 most: chex.Numeric = 2.0) -> chex.Array:
  """Computes `min(pi_old(a) / pi_sampler(a), most)`, for `Batch.importance_weights`.

  With the same parameters, an inference engine (vLLM, SGLang) computes slightly different probabilities than the
  trainer. These factors correct the policy gradient for it (Yao et al., "Your efficient RL framework secretly brings
  you off-policy RL training", 2025).

  Args:
    log_probs: float `[B, T]` log-probability of each action under the behaviour policy, computed by the trainer.
    sampler_log_probs: float `[B, T]` the same, reported by the sampler.
    mask: bool `[B, T]` true at the tokens that count.
    most: the largest weight; may be traced.

  Returns:
    float32 `[B, T]`, without gradient; 0 where masked.

  Raises:
    AssertionError: if the shapes differ.
  """
  chex.assert_equal_shape([log_probs, sampler_log_probs, mask])
  mask = mask.astype(bool)
  log_ratio = jnp.where(mask, log_probs - sampler_log_probs, 0.0).astype(jnp.float32)
  weights = jnp.minimum(jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)), most)
  return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))
