"""The loss of all benchmarks of the weighted KL: from the operation's token statistics, and naive over all logits.

Letters: R rows (tokens), D width, V vocabulary."""

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import TokenStatistics
from critkl_jax.rl.certainties import certainty, entropy, kl_weight

EXPONENT, ALPHA, BONUS = 150.0, 0.5, 0.01


def token_loss(record: TokenStatistics, advantages: chex.Array) -> chex.Array:
  """Returns the loss of each token: policy gradient, weighted KL and entropy bonus."""
  return -record.log_prob * advantages + ALPHA * record.weight * record.kl - BONUS * record.entropy


def naive_loss(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array, advantages: chex.Array) -> chex.Array:
  """Returns the sum of the same loss, computed from all logits `[R, V]` in plain JAX."""
  log_probs, ref_log_probs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  weight = kl_weight(certainty(ref_logits), EXPONENT)
  kl = jnp.sum(jnp.exp(log_probs) * (log_probs - ref_log_probs), -1)
  log_prob = jnp.take_along_axis(log_probs, actions[:, None], -1)[:, 0]
  return jnp.sum(-log_prob * advantages + ALPHA * weight * kl - BONUS * entropy(log_probs))


def naive_linear_loss(hidden: chex.Array, embedding: chex.Array, ref_hidden: chex.Array, ref_embedding: chex.Array,
                      actions: chex.Array, advantages: chex.Array) -> chex.Array:
  """Returns `naive_loss` of the float32 logits `hidden @ embedding.T`; hidden `[R, D]`, embeddings `[V, D]`."""
  logits, ref_logits = ((x @ y.T).astype(jnp.float32) for x, y in ((hidden, embedding), (ref_hidden, ref_embedding)))
  return naive_loss(logits, ref_logits, actions, advantages)
