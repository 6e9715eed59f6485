"""The loss of all benchmarks, its gradients and the statistics of each token, in NumPy's float64.

Letters: R rows (tokens), D width, V vocabulary."""

import numpy as np

from benchmarks.losses import ALPHA, BONUS, EXPONENT


def weighted_kl_truth(hidden: np.ndarray, embedding: np.ndarray, ref_hidden: np.ndarray, ref_embedding: np.ndarray,
                      actions: np.ndarray, advantages: np.ndarray) -> dict[str, np.ndarray]:
  """Computes `losses.token_loss` and its gradients for arrays of any float type.

  Args:
    hidden: `[R, D]` hidden states of the policy.
    embedding: `[V, D]` output embedding of the policy.
    ref_hidden: `[R, D]` hidden states of the reference.
    ref_embedding: `[V, D]` output embedding of the reference.
    actions: int `[R]`.
    advantages: `[R]`.

  Returns:
    `log_prob`, `entropy`, `kl`, `certainty`, `weight`, `[R]` each, and the gradients `hidden` `[R, D]` and `embedding`
    `[V, D]` of the summed loss.
  """
  hidden, embedding, ref_hidden, ref_embedding, advantages = (
      np.asarray(x).astype(np.float64) for x in (hidden, embedding, ref_hidden, ref_embedding, advantages))
  rows, actions = np.arange(len(actions)), np.asarray(actions)
  log_p, log_q = (log_softmax(x @ y.T) for x, y in ((hidden, embedding), (ref_hidden, ref_embedding)))
  p, q = np.exp(log_p), np.exp(log_q)
  kl, entropy = np.sum(p * (log_p - log_q), 1), -np.sum(p * log_p, 1)
  certainty = np.clip(1 + np.sum(q * log_q, 1) / np.log(len(embedding)), 0, 1)
  weight = certainty**EXPONENT
  gradient = (ALPHA * weight)[:, None] * p * (log_p - log_q - kl[:, None])
  gradient += BONUS * p * (log_p + entropy[:, None]) + advantages[:, None] * p
  gradient[rows, actions] -= advantages
  return {'log_prob': log_p[rows, actions], 'entropy': entropy, 'kl': kl, 'certainty': certainty, 'weight': weight,
          'hidden': gradient @ embedding, 'embedding': gradient.T @ hidden}


def log_softmax(x: np.ndarray) -> np.ndarray:
  """Returns the logarithm of the softmax over the last axis."""
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def relative_error(found: np.ndarray, expected: np.ndarray, unit: float = 1e-12) -> float:
  """Returns the largest error relative to the largest entry or `unit`, whichever is larger; inf if not finite."""
  found = np.asarray(found).astype(np.float64)
  if not np.all(np.isfinite(found)):
    return float('inf')
  return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), unit))
