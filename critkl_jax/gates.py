"""Rules that switch the KL penalty of single tokens on or off, beside its weight: for ablations and comparisons.

Letters: B responses, T tokens.
"""

import chex
import jax
import jax.numpy as jnp

GATES = ('none', 'oracle', 'threshold', 'uncritical', 'random', 'top_entropy', 'response_entropy', 'negative_advantage',
         'kl_cov')


def kl_gate(name: str, mask: chex.Array, *, certainty: chex.Array, entropy: chex.Array, log_probs: chex.Array,
            advantages: chex.Array, critical: chex.Array, key: chex.PRNGKey, threshold: chex.Numeric = 0.9,
            fraction: chex.Numeric = 0.2) -> chex.Array:
  """Returns by what the KL penalty of each token is multiplied: 1 where it is on, 0 where it is off.

  `none`: on everywhere. `oracle`: off at the task's critical tokens. `threshold`: off where the reference's certainty
  is below the threshold. `uncritical`: the same, but on at the task's critical tokens. `random`: off at random tokens,
  in each response as many as the oracle would take.
  `top_entropy`: off at the given fraction of all tokens, those of greatest entropy (after Wang et al., arXiv
  2506.01939, with the reference's entropy for the policy's). `response_entropy`: the same within each response.
  `negative_advantage`: on only where the advantage is negative. `kl_cov`: on only at the given fraction of all tokens,
  those of greatest covariance of log-probability and advantage (Cui et al., arXiv 2505.22617, KL-Cov).

  Args:
    name: one of `GATES`.
    mask: bool `[B, T]` true at tokens.
    certainty: float `[B, T]` of the reference.
    entropy: float `[B, T]` of the reference.
    log_probs: float `[B, T]` of the actions under the behaviour policy.
    advantages: float `[B, T]`.
    critical: bool `[B, T]` the oracle's.
    key: PRNG key, consumed; used by `random`.
    threshold: of the certainty; may be traced.
    fraction: of the tokens, rounded to whole ones; of tokens alike at the edge none counts; may be traced.

  Returns:
    float32 `[B, T]`, 0 where masked, without gradient.

  Raises:
    ValueError: if the name is unknown.
  """
  chex.assert_equal_shape([mask, certainty, entropy, log_probs, advantages, critical])
  if name == 'none':
    on = mask
  elif name == 'oracle':
    on = ~critical
  elif name == 'threshold':
    on = certainty >= threshold
  elif name == 'uncritical':
    on = (certainty >= threshold) | critical
  elif name == 'random':
    noise = jnp.where(mask, jax.random.uniform(key, mask.shape, jnp.float32), -1.0)
    number = jnp.sum(critical & mask, 1, keepdims=True, dtype=jnp.int32)
    on = jnp.argsort(jnp.argsort(-noise, 1), 1).astype(jnp.int32) >= number
  elif name == 'top_entropy':
    on = ~_greatest(entropy, mask, fraction, axis=None)
  elif name == 'response_entropy':
    on = ~_greatest(entropy, mask, fraction, axis=1)
  elif name == 'negative_advantage':
    on = advantages < 0
  elif name == 'kl_cov':
    on = _greatest(_centred(log_probs, mask) * _centred(advantages, mask), mask, fraction, axis=None)
  else:
    raise ValueError(f'kl_gate: expected one of {GATES}, got {name!r}.')
  return jax.lax.stop_gradient((on & mask).astype(jnp.float32))


def _greatest(values, mask, fraction, axis):
  """Returns where the greatest values stand, a fraction of those along an axis or of all."""
  values = jnp.where(mask, values.astype(jnp.float32), -jnp.inf)
  count = jnp.sum(mask, axis, keepdims=True, dtype=jnp.float32)
  descending = -jnp.sort(-values.reshape(1, -1) if axis is None else -values, 1)
  descending = jnp.pad(descending, ((0, 0), (0, 1)), constant_values=-jnp.inf)
  number = jnp.round(fraction * count).astype(jnp.int32)
  return mask & (values > jnp.take_along_axis(descending, number, 1))


def _centred(values, mask):
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  return values - jnp.sum(jnp.where(mask, values, 0.0)) / count
