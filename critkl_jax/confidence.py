"""How certain a reference distribution is, and the weight of the KL penalty that follows from it.

Vassoyan et al. (arXiv 2502.06533), section 5: the penalty of a token is weighted by J(s)^beta, J(s) the normalised
negentropy of the reference, so that the policy may explore where the reference is unsure. Certainty and weight never
carry a gradient.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp


def certainty(ref_logits: chex.Array, kind: str = 'negentropy', temperature: chex.Numeric = 1.0) -> chex.Array:
  """Returns how certain a reference distribution is, between 0 and 1.

  `negentropy`: `1 - H(p) / log V` (arXiv 2502.06533, section 5.1), 0 for the uniform distribution, 1 for a one-hot one.
  `min_entropy`: `1 + log(max p) / log V` (the paper's released code).
  `max_prob`: `max p`.

  Args:
    ref_logits: float `[..., V]` unnormalised log-probabilities of the reference; -inf rules a token out.
    kind: `negentropy`, `min_entropy` or `max_prob`.
    temperature: the logits are divided by it first; may be traced.

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
  """Returns the log-probabilities of the mean of several references' distributions, for `certainty`: where references
  contradict each other the mean is uncertain, however sure each of them is (arXiv 2502.06533, footnote 2).

  Args:
    ref_logits: of each reference, float `[..., V]`.
    temperature: all logits are divided by it first; may be traced.

  Returns:
    float32 `[..., V]`, without gradient.
  """
  log_probs = [jax.nn.log_softmax(jax.lax.stop_gradient(x).astype(jnp.float32) / temperature) for x in ref_logits]
  return jax.nn.logsumexp(jnp.stack(log_probs), 0) - jnp.log(jnp.float32(len(log_probs)))


def certainty_of_statistics(entropy: chex.Array, log_max: chex.Array, vocab_size: int, kind: str = 'negentropy'
                            ) -> chex.Array:
  """Returns what `certainty` does, of a distribution of which entropy and largest log-probability are known.

  Args:
    entropy: float `[...]` in nats.
    log_max: float `[...]` log of the largest probability.
    vocab_size: V, 2 or more.
    kind: `negentropy`, `min_entropy` or `max_prob`.

  Returns:
    float32 `[...]`, without gradient.

  Raises:
    ValueError: if the kind is unknown.
  """
  most_uncertain = jnp.log(jnp.float32(vocab_size))
  if kind == 'negentropy':
    value = 1.0 - entropy / most_uncertain
  elif kind == 'min_entropy':
    value = 1.0 + log_max / most_uncertain
  elif kind == 'max_prob':
    value = jnp.exp(log_max)
  else:
    raise ValueError(f"certainty: expected 'negentropy', 'min_entropy' or 'max_prob', got {kind!r}.")
  return jax.lax.stop_gradient(jnp.clip(value, 0.0, 1.0))


def kl_weight(
    certainty: chex.Array, exponent: chex.Numeric, intercept: chex.Numeric = 0.0) -> chex.Array:
  """Returns the weight of each token's KL penalty, `(1 - c) J^beta + c`.

  Exponent 0 gives weight 1 everywhere, the standard penalty, also where the certainty is 0.

  Args:
    certainty: float `[...]` J, between 0 and 1.
    exponent: beta, 0 or more; may be traced.
    intercept: c, at most 1; may be traced.

  Returns:
    float32 `[...]`, without gradient.
  """
  base = jnp.asarray(certainty, jnp.float32)
  log_base = jnp.log(jnp.where(base > 0, base, 1.0))
  # J^beta as exp(beta log J): exact at the ends, and an underflow to 0 is the right answer for large exponents.
  power = jnp.where(base > 0, jnp.exp(exponent * log_base), jnp.where(jnp.asarray(exponent) == 0, 1.0, 0.0))
  return jax.lax.stop_gradient((1.0 - intercept) * power + intercept)


def entropy(log_probs: chex.Array) -> chex.Array:
  """Returns the entropy in nats, `-sum p log p`, of normalised log-probabilities `[..., V]` as `[...]`."""
  probs = jnp.exp(log_probs)
  return -jnp.sum(jnp.where(probs > 0, probs * jnp.where(probs > 0, log_probs, 0.0), 0.0), -1)
