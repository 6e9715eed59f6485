"""The reference's statistics alone, against those of policy and reference together and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.ops.weighted_kl import (
    LOG_PROB_FLOOR,
    linear_reference_statistics,
    linear_weighted_kl,
    reference_statistics,
)

KEYS = jax.random.split(jax.random.key(0), 4)


def arrays(shape=(3, 5), vocab_size=1531, width=8, dtype=jnp.float32):
  hidden = 2.0 * jax.random.normal(KEYS[0], (*shape, width))
  embedding, bias = jax.random.normal(KEYS[1], (vocab_size, width)), jax.random.normal(KEYS[2], (vocab_size,))
  actions = jax.random.randint(KEYS[3], shape, 0, vocab_size)
  return hidden.astype(dtype), embedding.astype(dtype), actions, bias


@pytest.mark.parametrize('options', [
    {}, {'temperature': 0.7}, {'temperature': 2.0, 'certainty_temperature': 2.0}, {'certainty': 'min_entropy'},
    {'certainty': 'max_prob', 'certainty_temperature': 0.5}, {'soft_cap': 3.0}, {'with_bias': True}], ids=str)
@pytest.mark.parametrize('memory_budget', [2**26, 2**12])
def test_against_policy_and_reference_together(options, memory_budget):
  hidden, embedding, actions, bias = arrays()
  options = dict(options)
  bias = bias if options.pop('with_bias', False) else None
  mask = jnp.arange(15).reshape(3, 5) % 4 > 0
  junk = jnp.where(mask[..., None], hidden, jnp.nan)
  found = linear_reference_statistics(junk, embedding, actions, bias=bias, mask=mask, memory_budget=memory_budget,
                                      **options)
  both = linear_weighted_kl(hidden, embedding, hidden, embedding, actions, bias=bias, ref_bias=bias, mask=mask,
                            exponent=1.0, implementation='plain', **options)
  np.testing.assert_allclose(found.log_prob, both.ref_log_prob, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(found.entropy, both.entropy, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(found.certainty, both.certainty, rtol=1e-6, atol=1e-6)
  cap = options.pop('soft_cap', None)
  logits = hidden @ embedding.T if bias is None else hidden @ embedding.T + bias[None, None]
  whole = reference_statistics(cap * jnp.tanh(logits / cap) if cap else logits, actions, mask=mask, **options)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-6), found, whole)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 30.0])
def test_against_float64(dtype, scale):
  hidden, embedding, actions, _ = arrays((7,), 1031, dtype=dtype)
  hidden = (scale * hidden).astype(dtype)
  logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
  log_probs = logits - logits.max(-1, keepdims=True)
  log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
  entropy = -(np.exp(log_probs) * log_probs).sum(-1)
  found = linear_reference_statistics(hidden, embedding, actions, memory_budget=2**14)
  size = 1e-6 * max(np.abs(logits).max(), 1.0)
  np.testing.assert_allclose(found.log_prob, np.take_along_axis(log_probs, np.asarray(actions)[:, None], 1)[:, 0],
                             atol=4 * size, rtol=2e-6)
  np.testing.assert_allclose(found.entropy, entropy, atol=4 * size)
  np.testing.assert_allclose(found.certainty, 1 - entropy / np.log(1031), atol=size)


def test_ruled_out_and_unknown_tokens():
  hidden, embedding, actions, _ = arrays((4,), 1100)
  bias = jnp.zeros(1100).at[actions[0]].set(-jnp.inf)
  found = linear_reference_statistics(hidden, embedding, actions, bias=bias)
  assert found.log_prob[0] == LOG_PROB_FLOOR
  assert np.all(np.isfinite(found.entropy))
  mask = jnp.array([True, True, False, True])
  for stats in (linear_reference_statistics(hidden, embedding, jnp.array([-1, 1100, -100, 5]), mask=mask),
                reference_statistics(hidden @ embedding.T, jnp.array([-1, 1100, -100, 5]), mask=mask)):
    np.testing.assert_array_equal(np.isnan(stats.log_prob), [True, True, False, False])
    assert stats.log_prob[2] == stats.entropy[2] == stats.certainty[2] == 0


def test_wrong_shapes_are_named():
  hidden, embedding, actions, _ = arrays()
  for name, call in (('actions', lambda: linear_reference_statistics(hidden, embedding, actions[:2])),
                     ('embedding', lambda: linear_reference_statistics(hidden, embedding[:, :3], actions)),
                     ('bias', lambda: linear_reference_statistics(hidden, embedding, actions, bias=embedding[:2, 0])),
                     ('mask', lambda: linear_reference_statistics(hidden, embedding, actions, mask=actions[0] > 0)),
                     ('soft_cap', lambda: linear_reference_statistics(hidden, embedding, actions, soft_cap=0.0)),
                     ('certainty', lambda: linear_reference_statistics(hidden, embedding, actions, certainty='no')),
                     ('axis_name', lambda: linear_reference_statistics(hidden, embedding, actions, axis_name='m')),
                     ('actions', lambda: reference_statistics(hidden, actions[:2]))):
    with pytest.raises(ValueError, match=name):
      call()


def test_no_gradient():
  hidden, embedding, actions, _ = arrays()
  gradients = jax.grad(lambda h, e: sum(map(jnp.sum, jax.tree.leaves(linear_reference_statistics(h, e, actions)))),
                       (0, 1))(hidden, embedding)
  assert not any(np.any(x) for x in gradients)


def test_no_array_of_all_logits():
  hidden, embedding, actions, _ = arrays((64,), 4099)
  program = jax.make_jaxpr(lambda *x: linear_reference_statistics(*x, memory_budget=2**16))(hidden, embedding, actions)
  assert '64,4099' not in str(program)
