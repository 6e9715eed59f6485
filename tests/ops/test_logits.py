"""The weighted KL from logits against float64 NumPy: values, gradients, low precision, certainty and weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import TOLERANCE, assert_values, combined, error, truth

from critkl_jax import certainty, kl_weight, token_kl, weighted_kl

LOGITS = {
    'scale 1': lambda rng, n, v: (rng.normal(size=(n, v)), rng.normal(size=(n, v))),
    'scale 10': lambda rng, n, v: (10 * rng.normal(size=(n, v)), 10 * rng.normal(size=(n, v))),
    'scale 50': lambda rng, n, v: (50 * rng.normal(size=(n, v)), 50 * rng.normal(size=(n, v))),
    'near': lambda rng, n, v: near(rng.normal(size=(n, v)), rng),
    'near at 50': lambda rng, n, v: near(50 * rng.normal(size=(n, v)), rng),
    'near, far apart in level': lambda rng, n, v: (lambda z, w: (z, w + 64))(*near(rng.normal(size=(n, v)), rng)),
    'equal': lambda rng, n, v: (lambda z: (z, z.copy()))(10 * rng.normal(size=(n, v))),
    'one-hot reference': lambda rng, n, v: (
        rng.normal(size=(n, v)), 200.0 * (np.arange(v) == rng.integers(0, v, (n, 1)))),
    'reference rules out': lambda rng, n, v: (rng.normal(size=(n, v)), ruled_out(rng.normal(size=(n, v)), rng)),
    'policy rules out': lambda rng, n, v: (ruled_out(rng.normal(size=(n, v)), rng), rng.normal(size=(n, v))),
    'both rule out': lambda rng, n, v: (lambda r: (r, r + rng.normal(size=r.shape)))(
        ruled_out(rng.normal(size=(n, v)), rng)),
    'near, both rule out': lambda rng, n, v: (lambda z, w: (z, np.where(np.isneginf(z), z, w)))(
        *near(ruled_out(rng.normal(size=(n, v)), rng), rng)),
    'near, but for the most probable': lambda rng, n, v: (lambda z: (z, z - 20 * (z == z.max(-1, keepdims=True))))(
        1e-3 * rng.normal(size=(n, v))),
    'nearly uniform': lambda rng, n, v: (1e-3 * rng.normal(size=(n, v)), 1e-3 * rng.normal(size=(n, v))),
}


def near(z, rng):
  z = z.astype(np.float32)
  return z, z + (4e-4 * rng.normal(size=z.shape)).astype(np.float32)


def ruled_out(x, rng):
  x = x.copy()
  x[rng.random(x.shape) < 0.3] = -np.inf
  x[:, 0] = 0
  return x


@pytest.mark.parametrize('implementation', ['plain', 'fused'])
@pytest.mark.parametrize('kind', LOGITS)
@pytest.mark.parametrize('size', [(3, 47), (4, 50257)])
def test_logits_against_float64(kind, implementation, size):
  rng = np.random.default_rng(0)
  z, v = (x.astype(np.float32) for x in LOGITS[kind](rng, *size))
  actions, cotangents = np.argmax(z, -1), rng.normal(size=(3, size[0])).astype(np.float32)

  def loss(z, v):
    record = weighted_kl(z, v, actions, exponent=150.0, implementation=implementation)
    return combined(record, cotangents), record

  gradient, record = jax.jit(jax.grad(loss, has_aux=True))(z, v)
  values, expected = truth(z, v, actions, cotangents)
  assert error(gradient, expected) <= TOLERANCE
  if kind == 'equal':
    np.testing.assert_allclose(record.kl, 0, atol=1e-12)
    values.pop('kl')
  assert_values(record, values)
  if kind == 'near':
    assert 1e-8 < values['kl'].mean() < 1e-6


@pytest.mark.slow
def test_values_and_gradients_of_low_precision_logits():
  rng = np.random.default_rng(1)
  z, v = (jnp.asarray(3 * rng.normal(size=(20, 99)), jnp.bfloat16) for _ in range(2))
  actions, cotangents = np.argmax(np.asarray(z, np.float32), -1), np.ones((3, 20), np.float32)
  gradient, record = jax.grad(lambda z: (lambda r: (combined(r, cotangents), r))(
      weighted_kl(z, v, actions, exponent=2.0)), has_aux=True)(z)
  values, expected = truth(z, v, actions, cotangents)
  assert gradient.dtype == jnp.bfloat16
  assert error(gradient, expected) <= 2**-8
  assert_values(record, values)


@pytest.mark.parametrize('implementation', ['plain', 'fused'])
@pytest.mark.parametrize('kind', ['negentropy', 'min_entropy', 'max_prob'])
def test_certainty_and_weight_are_those_of_confidence(kind, implementation):
  rng = np.random.default_rng(2)
  z, v = (rng.normal(size=(4, 6, 9)).astype(np.float32) for _ in range(2))
  record = weighted_kl(z, v, np.zeros((4, 6), np.int32), exponent=3.0, intercept=0.1, certainty=kind,
                       certainty_temperature=0.7, temperature=1.5, implementation=implementation)
  sure = certainty(v, kind, 0.7)
  np.testing.assert_allclose(record.certainty, sure, rtol=1e-5)
  np.testing.assert_allclose(record.weight, kl_weight(sure, 3.0, 0.1), rtol=1e-5)
  np.testing.assert_allclose(record.kl, token_kl(z / 1.5, v / 1.5), rtol=1e-4)
