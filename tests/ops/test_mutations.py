"""Mutation tests: each breaks one line of the operation, and the comparison with float64 must fail."""

import jax.numpy as jnp
import numpy as np
import pytest
from truth import TOLERANCE, WAYS, assert_values, error, exact_problem, grads_and_record, linear_truth

from critkl_jax import certainty, kl_weight, linear_weighted_kl, weighted_kl
from critkl_jax.ops.weighted_kl import api, chunked, logits, statistics


def assert_true(way):
  """Compares values, gradients and weight of one implementation with float64, at a vocabulary with a remainder."""
  arrays, cotangents = exact_problem((252, 507, 31), 3, 'apart')
  # Not the cached jitted function, which may have been compiled before the mutation.
  (dhidden, dembedding), record = grads_and_record.__wrapped__(*arrays, cotangents, **WAYS[way])
  values, expected_hidden, expected_embedding = linear_truth(arrays, cotangents)
  assert_values(record, values)
  assert error(dhidden, expected_hidden) <= TOLERANCE
  assert error(dembedding, expected_embedding) <= TOLERANCE
  np.testing.assert_allclose(record.weight, kl_weight(certainty(arrays[2] @ arrays[3].T), 150.0), rtol=1e-3)


def break_gradient(field):
  """Makes a gradient of the logits that lacks one of the three terms."""
  return lambda z, v, is_action, row, g: statistics.logit_gradients(
      z, v, is_action, row, g.replace(**{field: jnp.zeros_like(g.kl)}))


def no_action(z, v, is_action, row, g):
  """Computes gradients of the logits that ignore the action."""
  return statistics.logit_gradients(z, v, jnp.zeros_like(is_action), row, g)


def no_mean(z, v, is_action, row, g):
  """Computes gradients of the logits that do not sum to 0 over the vocabulary."""
  return statistics.logit_gradients(z, v, is_action, row.replace(mean_t=jnp.zeros_like(row.mean_t)), g)


GRADIENTS = {'log_prob': break_gradient('log_prob'), 'entropy': break_gradient('entropy'), 'kl': break_gradient('kl'),
             'action': no_action, 'mean': no_mean}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.slow
def test_nothing_broken(way):
  assert_true(way)


@pytest.mark.parametrize('way', ['chunked', 'chunked, small tiles'])
@pytest.mark.parametrize('broken', GRADIENTS)
def test_a_term_of_the_gradient(monkeypatch, broken, way):
  monkeypatch.setattr(chunked, 'logit_gradients', GRADIENTS[broken])
  with pytest.raises(AssertionError):
    assert_true(way)


@pytest.mark.parametrize('broken', GRADIENTS)
def test_a_term_of_the_gradient_of_logits(monkeypatch, broken):
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem((20, 507, 31), 3, 'apart')
  arrays = hidden @ embedding.T, ref_hidden @ ref_embedding.T, actions

  def check():
    row = statistics.Row.zeros(20).replace(**{
        name: g[:, None] for name, g in zip(('log_prob', 'entropy', 'kl'), cotangents)})
    _, saved = logits._forward(True, *arrays, jnp.float32(1), jnp.float32(1))
    gradient = logits._backward(True, saved, row)[0]
    assert error(gradient @ embedding, linear_truth((hidden, embedding, ref_hidden, ref_embedding, actions),
                                                    cotangents)[1]) <= TOLERANCE

  check()
  monkeypatch.setattr(logits, 'logit_gradients', GRADIENTS[broken])
  with pytest.raises(AssertionError):
    check()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.slow
def test_the_weight(monkeypatch, way):
  monkeypatch.setattr(api, 'kl_weight', lambda certainty, exponent, intercept: jnp.ones_like(certainty))
  with pytest.raises(AssertionError):
    assert_true(way)


@pytest.mark.parametrize('way', ['chunked, small blocks', 'chunked, small tiles'])
@pytest.mark.slow
def test_the_rest_of_the_vocabulary(monkeypatch, way):
  monkeypatch.setattr(chunked, 'divmod', lambda total, size: (total // size, 0), raising=False)
  with pytest.raises(AssertionError):
    assert_true(way)


@pytest.mark.slow
def test_a_token_that_the_reference_rules_out(monkeypatch):
  ref_logits = np.array([[0.0, 0.0, -np.inf]], np.float32)
  assert weighted_kl(np.zeros((1, 3), np.float32), ref_logits, np.zeros(1, np.int32), exponent=1.0).kl > 1e3
  arrays, _ = exact_problem((1, 3, 5), 1, 'apart')
  options = {'exponent': 1.0, 'implementation': 'chunked', 'ref_bias': ref_logits[0]}
  assert 1e2 < linear_weighted_kl(*arrays, **options).kl < 1e4
  monkeypatch.setattr(chunked, 'block_sums', lambda *args, can_rule_out: statistics.block_sums(*args, None, False))
  assert not 1e2 < linear_weighted_kl(*arrays, **options).kl < 1e4
