import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.rl.certainties import certainty, entropy, kl_weight, mean_distribution

KINDS = ('negentropy', 'min_entropy', 'max_prob')


def truth(logits, kind, temperature):
  z = np.asarray(logits, np.float64) / temperature
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  if kind == 'negentropy':
    return 1 + np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1) / np.log(p.shape[-1])
  return 1 + np.log(p.max(-1)) / np.log(p.shape[-1]) if kind == 'min_entropy' else p.max(-1)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('scale', [0.0, 1.0, 10.0])
def test_certainty_against_float64(kind, temperature, scale):
  logits = scale * np.random.default_rng(0).normal(size=(5, 7, 41)).astype(np.float32)
  logits[0, 0, 3:] = -np.inf
  value = certainty(jnp.asarray(logits), kind, temperature)
  assert value.shape == (5, 7)
  np.testing.assert_allclose(value, truth(logits, kind, temperature), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_certainty_at_the_ends(kind):
  one_hot = jnp.array([0.0, -jnp.inf, -jnp.inf])
  assert certainty(one_hot, kind) == 1
  uniform = 1 / 3 if kind == 'max_prob' else 0
  np.testing.assert_allclose(certainty(jnp.zeros(3), kind), uniform, atol=1e-6)
  assert 0 <= certainty(jnp.full(50257, 7.0), kind) < 1e-4  # rounding stays within [0, 1]


@pytest.mark.parametrize('kind', KINDS)
def test_certainty_has_no_gradient(kind):
  gradient = jax.grad(lambda z: jnp.sum(kl_weight(certainty(z, kind), 3.0)))(jnp.arange(4.0))
  assert jnp.all(gradient == 0)


def test_hand_computed_negentropy():
  logits = jnp.log(jnp.array([0.5, 0.25, 0.25, 1e-30]))
  np.testing.assert_allclose(certainty(logits), 1 - 1.5 * np.log(2) / np.log(4), rtol=1e-6)


def test_weight_by_hand():
  np.testing.assert_allclose(kl_weight(jnp.array([0.5, 1.0, 0.0]), 2.0), [0.25, 1.0, 0.0])
  np.testing.assert_allclose(kl_weight(jnp.array([0.5, 1.0, 0.0]), 2.0, 0.2), [0.4, 1.0, 0.2], rtol=1e-6)
  np.testing.assert_allclose(kl_weight(jnp.array([0.5]), 1.0, -0.5), [0.25])


def test_exponent_zero_is_the_standard_penalty():
  assert jnp.all(kl_weight(jnp.array([0.0, 0.3, 1.0]), 0.0) == 1)


@pytest.mark.parametrize('exponent', [0.5, 150.0, 10000.0])
def test_weight_is_safe_for_large_exponents(exponent):
  base = np.array([0.0, 1e-30, 1e-3, 0.5, 0.999, 0.9999, 1.0], np.float32)
  weight = jax.jit(kl_weight)(base, exponent)
  np.testing.assert_allclose(weight, base.astype(np.float64)**exponent, rtol=2e-3, atol=1e-37)
  assert weight[-1] == 1


def test_exponent_may_be_a_vector_of_members():
  weights = jax.vmap(lambda beta: kl_weight(jnp.array([0.5, 0.0]), beta))(jnp.array([0.0, 1.0, 2.0]))
  np.testing.assert_allclose(weights, [[1, 1], [0.5, 0], [0.25, 0]])


def test_entropy():
  np.testing.assert_allclose(entropy(jnp.log(jnp.full(8, 1 / 8))), np.log(8), rtol=1e-6)
  ruled_out = jnp.array([jnp.log(0.5), jnp.log(0.5), -jnp.inf])
  np.testing.assert_allclose(entropy(ruled_out), np.log(2), rtol=1e-6)
  gradient = jax.grad(lambda z: entropy(jax.nn.log_softmax(z)))(jnp.array([1.0, 2.0, -jnp.inf]))
  assert jnp.all(jnp.isfinite(gradient))


def test_errors():
  with pytest.raises(ValueError, match="got 'entropy'"):
    certainty(jnp.zeros(3), 'entropy')
  with pytest.raises(ValueError, match='vocabulary of 2 or more'):
    certainty(jnp.zeros((4, 1)))


def test_references_that_contradict_each_other_are_uncertain_together():
  one, two = jnp.array([[20.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), jnp.array([[0.0, 20.0, 0.0], [1.0, 2.0, 3.0]])
  mean = mean_distribution([one, two], 2.0)
  probs = (jax.nn.softmax(one / 2) + jax.nn.softmax(two / 2)) / 2
  np.testing.assert_allclose(jnp.exp(mean), probs, atol=1e-6)
  assert certainty(mean)[0] < 0.4 < 0.99 < certainty(one, temperature=2.0)[0]
  np.testing.assert_allclose(certainty(mean)[1], certainty(one, temperature=2.0)[1], atol=1e-6)
  np.testing.assert_allclose(mean_distribution([one]), jax.nn.log_softmax(one), atol=1e-6)
