"""Gates: rules that switch the KL penalty of single tokens on or off, for ablations and comparisons.

Letters: B episodes, T response tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class GateInputs(NamedTuple):
  """Inputs that a gate may read: the arguments of `kl_gate` without the name."""

  mask: chex.Array
  certainty: chex.Array
  entropy: chex.Array
  log_probs: chex.Array
  advantages: chex.Array
  critical: chex.Array
  key: chex.PRNGKey
  threshold: chex.Numeric
  fraction: chex.Numeric


def _random(x):
  noise = jnp.where(x.mask, jax.random.uniform(x.key, x.mask.shape, jnp.float32), -1.0)
  number = jnp.sum(x.critical & x.mask, 1, keepdims=True, dtype=jnp.int32)
  return jnp.argsort(jnp.argsort(-noise, 1), 1).astype(jnp.int32) >= number


def _kl_cov(x):
  covariance = _centred(x.log_probs, x.mask) * _centred(x.advantages, x.mask)
  return _greatest(covariance, x.mask, x.fraction, axis=None)


# Name -> `GateInputs` -> bool [B, T], true where the penalty is on; `kl_gate` describes each gate.
GATES: dict[str, Callable[[GateInputs], chex.Array]] = {
    'none': lambda x: x.mask,
    'oracle': lambda x: ~x.critical,
    'threshold': lambda x: x.certainty >= x.threshold,
    'uncritical': lambda x: (x.certainty >= x.threshold) | x.critical,
    'random': _random,
    'top_entropy': lambda x: ~_greatest(x.entropy, x.mask, x.fraction, axis=None),
    'response_entropy': lambda x: ~_greatest(x.entropy, x.mask, x.fraction, axis=1),
    'negative_advantage': lambda x: x.advantages < 0,
    'kl_cov': _kl_cov,
}
READ_CERTAINTY = ('threshold', 'uncritical')  # gates that read certainty and threshold
READ_CRITICAL = ('oracle', 'uncritical', 'random')  # gates that read the critical tokens
READ_FRACTION = ('top_entropy', 'response_entropy', 'kl_cov')  # gates that read the fraction


def kl_gate(name: str, mask: chex.Array, *, certainty: chex.Array, entropy: chex.Array, log_probs: chex.Array,
            advantages: chex.Array, critical: chex.Array, key: chex.PRNGKey, threshold: chex.Numeric = 0.9,
            fraction: chex.Numeric = 0.2) -> chex.Array:
  """Returns the 0/1 mask applied to each token's KL penalty: 1 where it is on, 0 where it is off.

  `none`: on everywhere.
  `oracle`: off at the task's critical tokens.
  `threshold`: off where the reference's certainty is below the threshold.
  `uncritical`: as `threshold`, but on at the task's critical tokens.
  `random`: off at random tokens, in each response as many as it has critical tokens.
  `top_entropy`: off at the tokens of highest entropy, the given fraction of all tokens (after Wang et al., arXiv
  2506.01939, with the reference's entropy in place of the policy's).
  `response_entropy`: as `top_entropy`, within each response.
  `negative_advantage`: on only where the advantage is negative.
  `kl_cov`: on only at the tokens of highest covariance of log-probability and advantage, the given fraction of all
  tokens (Cui et al., arXiv 2505.22617, KL-Cov).

  Args:
    name: a name in `GATES`.
    mask: bool `[B, T]` true at the tokens of the episodes.
    certainty: float `[B, T]` certainty of the reference.
    entropy: float `[B, T]` entropy of the reference, nats.
    log_probs: float `[B, T]` log-probability of each action under the behaviour policy.
    advantages: float `[B, T]`.
    critical: bool `[B, T]` true at the task's critical tokens.
    key: PRNG key, consumed; used by `random`.
    threshold: certainty threshold; may be traced.
    fraction: fraction of the tokens to select; their number is rounded, and ties at the cut-off are not selected; may
      be traced.

  Returns:
    float32 `[B, T]`, 0 where masked, without gradient.

  Raises:
    ValueError: if the name is unknown.
  """
  chex.assert_equal_shape([mask, certainty, entropy, log_probs, advantages, critical])
  if name not in GATES:
    raise ValueError(f'kl_gate: expected one of {tuple(GATES)}, got {name!r}.')
  on = GATES[name](GateInputs(mask, certainty, entropy, log_probs, advantages, critical, key, threshold, fraction))
  return jax.lax.stop_gradient((on & mask).astype(jnp.float32))


def _greatest(values, mask, fraction, axis):
  """Selects the given fraction of the unmasked entries with the greatest values, along `axis` or among all (None)."""
  values = jnp.where(mask, values.astype(jnp.float32), -jnp.inf)
  count = jnp.sum(mask, axis, keepdims=True, dtype=jnp.float32)
  descending = -jnp.sort(-values.reshape(1, -1) if axis is None else -values, 1)
  descending = jnp.pad(descending, ((0, 0), (0, 1)), constant_values=-jnp.inf)
  number = jnp.round(fraction * count).astype(jnp.int32)
  return mask & (values > jnp.take_along_axis(descending, number, 1))


def _centred(values, mask):
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  return values - jnp.sum(jnp.where(mask, values, 0.0)) / count
