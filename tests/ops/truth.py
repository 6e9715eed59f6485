"""The weighted KL in float64 NumPy, and the errors of implementations against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax import linear_weighted_kl
from critkl_jax.ops.weighted_kl import LOG_PROB_FLOOR

TOLERANCE = 1e-5  # of float32 against float64, relative to the largest entry


def truth(z, v, actions, cotangents, v_sure=None):
  """Computes values and the gradient with respect to z in float64; ruled-out tokens as in `statistics`."""
  z, v = np.asarray(z, np.float64), np.asarray(v, np.float64)
  v_sure = v if v_sure is None else np.asarray(v_sure, np.float64)
  log_p, log_q, log_s = map(log_softmax, (z, v, v_sure))
  p, s, rows = np.exp(log_p), np.exp(log_s), np.arange(len(actions))
  log_p, log_q, log_s = (np.maximum(x, -1e300) for x in (log_p, log_q, log_s))
  log_ratio = np.where(np.isneginf(v), log_p - LOG_PROB_FLOOR, log_p - log_q)
  log_ratio = np.where(p > 0, log_ratio, 0)
  kl, entropy = (p * log_ratio).sum(-1), -(p * np.where(p > 0, log_p, 0)).sum(-1)
  values = {
      'log_prob': log_p[rows, actions], 'ref_log_prob': np.maximum(log_q[rows, actions], LOG_PROB_FLOOR),
      'entropy': entropy, 'kl': kl, 'certainty': 1 + (s * np.where(s > 0, log_s, 0)).sum(-1) / np.log(z.shape[-1])}
  one_hot = np.arange(z.shape[-1]) == np.asarray(actions)[:, None]
  a, h, k = (g[:, None] for g in np.asarray(cotangents, np.float64))
  gradient = (a * (one_hot - p) - h * p * (np.where(p > 0, log_p, 0) + entropy[:, None])
              + k * p * (log_ratio - kl[:, None]))
  return values, gradient


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def error(found, expected, unit=1e-12):
  """Returns the largest error, relative to the largest entry, or to `unit` where that is larger."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert np.all(np.isfinite(found))
  return np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), unit)


def assert_values(record, values, tolerance=TOLERANCE):
  """Compares a record with float64: the KL by its relative error however small it is, other fields in nats."""
  for name, value in values.items():
    assert error(getattr(record, name), value, 1e-12 if name == 'kl' else 1.0) <= tolerance, name


def combined(record, cotangents):
  return jnp.sum(record.log_prob * cotangents[0] + record.entropy * cotangents[1] + record.kl * cotangents[2])


def exact_problem(size, scale, kind, seed=0):
  """Makes operands whose logits are exact in float32, so that errors exclude the rounding of matrix products."""
  num_tokens, vocab_size, width = size
  rng = np.random.default_rng(seed)
  grid = lambda x, step: (np.round(x / step) * step).astype(np.float32)
  embedding = grid(rng.normal(size=(vocab_size, width)), 1 / 8)
  hidden = grid(scale / np.sqrt(width) * rng.normal(size=(num_tokens, width)), 1 / 32)
  ref_hidden = grid(scale / np.sqrt(width) * rng.normal(size=(num_tokens, width)), 1 / 32)
  ref_embedding = embedding
  if kind == 'near':
    ref_hidden = hidden.copy()
    ref_hidden[:, 0] += grid(3e-4 * rng.choice([-1, 1], size=num_tokens), 2**-13)
  elif kind == 'other width':
    ref_hidden = np.concatenate([ref_hidden, ref_hidden[:, :1]], 1)
    ref_embedding = np.concatenate([embedding, embedding[:, :1]], 1)
  actions = rng.integers(0, vocab_size, num_tokens)
  return (hidden, embedding, ref_hidden, ref_embedding, actions), rng.normal(size=(3, num_tokens)).astype(np.float32)


def linear_truth(arrays, cotangents):
  hidden, embedding, ref_hidden, ref_embedding, actions = (np.asarray(x, np.float64) for x in arrays)
  actions = arrays[4]
  values, gradient = truth(hidden @ embedding.T, ref_hidden @ ref_embedding.T, actions, cotangents)
  return values, gradient @ embedding, gradient.T @ hidden


WAYS = {
    'plain': {'implementation': 'plain'},
    'fused': {'implementation': 'fused'},
    'chunked': {'implementation': 'chunked'},
    'chunked, small blocks': {'implementation': 'chunked', 'memory_budget': 8 * 128 * 252},
    'chunked, small tiles': {'implementation': 'chunked', 'memory_budget': 8 * 128 * 100},
}


@functools.partial(jax.jit, static_argnames=('implementation', 'memory_budget'))
def grads_and_record(hidden, embedding, ref_hidden, ref_embedding, actions, cotangents, **options):
  def loss(hidden, embedding):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=150.0, **options)
    return combined(record, cotangents), record
  return jax.grad(loss, (0, 1), has_aux=True)(hidden, embedding)
