"""Certainty of a reference distribution, and the weight of the KL penalty computed from it.

Vassoyan et al. (arXiv 2502.06533), section 5: the penalty of a token is weighted by J^beta, where J is the normalised
negentropy of the reference, so that the policy may explore where the reference is uncertain. Certainty and weight never
carry a gradient. V is the vocabulary size.
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

# Name -> (entropy [...], log of the largest probability [...], log V) -> certainty [...].
CERTAINTIES = {
    'negentropy': lambda entropy, log_max, log_size: 1.0 - entropy / log_size,
    'min_entropy': lambda entropy, log_max, log_size: 1.0 + log_max / log_size,
    'max_prob': lambda entropy, log_max, log_size: jnp.exp(log_max),
}


def certainty(ref_logits: chex.Array, kind: str = 'negentropy', temperature: chex.Numeric = 1.0) -> chex.Array:
  """Computes the certainty of a reference distribution, between 0 and 1.

  `negentropy`: `1 - entropy(p) / log V` (arXiv 2502.06533, section 5.1); uniform gives 0, one-hot 1.
  `min_entropy`: `1 + log(max p) / log V` (the paper's released code).
  `max_prob`: `max p`.

  Args:
    ref_logits: float `[..., V]` unnormalised log-probabilities of the reference; -inf rules a token out.
    kind: a name in `CERTAINTIES`.
    temperature: divisor of the logits; may be traced.

  Returns:
    float32 `[...]`, without gradient.

  Raises:
    ValueError: if the kind is unknown, or V is less than 2.
  """
  if ref_logits.shape[-1] < 2:
    raise ValueError(f'ref_logits: expected a vocabulary of 2 or more, got shape {ref_logits.shape}.')
  log_probs = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits).astype(jnp.float32) / temperature)
  return certainty_of_statistics(entropy(log_probs), jnp.max(log_probs, -1), ref_logits.shape[-1], kind)


def mean_distribution(ref_logits: Sequence[chex.Array], temperature: chex.Numeric = 1.0) -> chex.Array:
  """Averages the distributions of several references; returns log-probabilities, as input of `certainty`.

  Where references contradict each other the mean is uncertain, however certain each reference is (arXiv 2502.06533,
  footnote 2).

  Args:
    ref_logits: float `[..., V]` logits of each reference.
    temperature: divisor of all logits; may be traced.

  Returns:
    float32 `[..., V]`, without gradient.
  """
  log_probs = [jax.nn.log_softmax(jax.lax.stop_gradient(x).astype(jnp.float32) / temperature) for x in ref_logits]
  return jax.nn.logsumexp(jnp.stack(log_probs), 0) - jnp.log(jnp.float32(len(log_probs)))


def certainty_of_statistics(entropy: chex.Array, log_max: chex.Array, vocab_size: int, kind: str = 'negentropy'
                            ) -> chex.Array:
  """Like `certainty`, from the entropy and the largest log-probability of a distribution.

  Args:
    entropy: float `[...]` in nats.
    log_max: float `[...]` log of the largest probability.
    vocab_size: V, 2 or more.
    kind: a name in `CERTAINTIES`.

  Returns:
    float32 `[...]`, without gradient.

  Raises:
    ValueError: if the kind is unknown.
  """
  if kind not in CERTAINTIES:
    raise ValueError(f'certainty: expected one of {tuple(CERTAINTIES)}, got {kind!r}.')
  value = CERTAINTIES[kind](entropy, log_max, jnp.log(jnp.float32(vocab_size)))
  return jax.lax.stop_gradient(jnp.clip(value, 0.0, 1.0))


def certainty_from_entropy(entropy: chex.Array, vocab_size: int) -> chex.Array:
  """Computes the certainty `negentropy`, `1 - entropy / log V`, from an entropy that a trainer has stored.

  Args:
    entropy: float `[...]` entropy of the reference in nats, at `LossConfig.certainty_temperature`.
    vocab_size: V, 2 or more.

  Returns:
    float32 `[...]`, without gradient.
  """
  return certainty_of_statistics(entropy, jnp.zeros_like(entropy), vocab_size)


def kl_weight(certainty: chex.Array, exponent: chex.Numeric, intercept: chex.Numeric = 0.0) -> chex.Array:
  """Computes the weight of each token's KL penalty, `(1 - c) J^beta + c`.

  Exponent 0 gives weight 1 everywhere (the standard penalty), also at certainty 0.

  Args:
    certainty: float `[...]` the certainty J, between 0 and 1.
    exponent: beta, 0 or more; may be traced.
    intercept: c, at most 1; may be traced.

  Returns:
    float32 `[...]`, without gradient.
  """
  base = jnp.asarray(certainty, jnp.float32)
  log_base = jnp.log(jnp.where(base > 0, base, 1.0))
  # J^beta as exp(beta log J): exact at J = 0 and 1, and for large exponents an underflow to 0 is the right result.
  power = jnp.where(base > 0, jnp.exp(exponent * log_base), jnp.where(jnp.asarray(exponent) == 0, 1.0, 0.0))
  return jax.lax.stop_gradient((1.0 - intercept) * power + intercept)


def exponent_for(half_weight_entropy: float, vocab_size: int) -> float:
  """Computes the exponent beta for which the weight J^beta is 1/2 at a given entropy of the reference.

  `beta = log 2 / -log(1 - entropy / log V)`, for the certainty `negentropy` and intercept 0. For a given exponent this
  entropy grows with log V: with exponent 150 it is 0.017 nats for V = 41 (the addition task) and 0.055 nats for
  V = 151,936.

  Args:
    half_weight_entropy: entropy in nats, greater than 0 and less than log V.
    vocab_size: V, 2 or more.

  Returns:
    The exponent, for `LossConfig.certainty_exponent` or `kl_weight`.

  Raises:
    ValueError: if the vocabulary has fewer than two entries, or the entropy is not between 0 and log V.
  """
  largest = _largest_entropy(vocab_size)
  if not 0 < half_weight_entropy < largest:
    raise ValueError(f'half_weight_entropy: expected a number between 0 and log V = {largest:.4g}, got '
                     f'{half_weight_entropy}.')
  return math.log(2.0) / -math.log1p(-half_weight_entropy / largest)


def half_weight_entropy(exponent: float, vocab_size: int) -> float:
  """Computes the entropy of the reference at which the weight J^beta is 1/2: the inverse of `exponent_for`.

  Args:
    exponent: beta, greater than 0.
    vocab_size: V, 2 or more.

  Returns:
    The entropy in nats, between 0 and log V.

  Raises:
    ValueError: if the vocabulary has fewer than two entries, or the exponent is not positive.
  """
  if not exponent > 0:
    raise ValueError(f'exponent: expected a positive number, got {exponent}.')
  return -math.expm1(-math.log(2.0) / exponent) * _largest_entropy(vocab_size)


def _largest_entropy(vocab_size):
  if vocab_size < 2:
    raise ValueError(f'vocab_size: expected 2 or more, got {vocab_size}.')
  return math.log(vocab_size)


def entropy(log_probs: chex.Array) -> chex.Array:
  """Computes the entropy `[...]` in nats, `-sum p log p`, of normalised log-probabilities `[..., V]`."""
  probs = jnp.exp(log_probs)
  return -jnp.sum(jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0.0), 0.0), -1)
