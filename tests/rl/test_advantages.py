import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.rl.advantages import gae, group_relative, leave_one_out, whiten


def loop_gae(rewards, values, length, discount, lam):
  advantages, following, next_value = np.zeros(len(rewards)), 0.0, 0.0
  for t in reversed(range(length)):
    delta = rewards[t] + discount * next_value - values[t]
    following = delta + discount * lam * following
    advantages[t], next_value = following, values[t]
  return advantages


@pytest.mark.parametrize(('discount', 'lam'), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_against_a_loop(discount, lam):
  rng = np.random.default_rng(0)
  rewards, values = rng.normal(size=(2, 4, 9)).astype(np.float32)
  lengths = np.array([9, 1, 5, 0])
  mask = np.arange(9) < lengths[:, None]
  advantages, returns = jax.jit(gae)(rewards, values, mask, discount, lam)
  for b, length in enumerate(lengths):
    expected = loop_gae(rewards[b], values[b], length, discount, lam)
    np.testing.assert_allclose(advantages[b], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns[b], np.where(mask[b], expected + values[b], 0), rtol=1e-5, atol=1e-6)


def test_gae_by_hand():
  advantages, returns = gae(jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.5, 0.5]), jnp.ones(3, bool), 1.0, 0.5)
  np.testing.assert_allclose(advantages, [0.125, 0.25, 0.5])
  np.testing.assert_allclose(returns, [0.625, 0.75, 1.0])


def test_gae_skips_holes_by_hand():
  # As the test above with two masked tokens in between: their contents, a reward included, change nothing.
  mask = jnp.array([True, False, True, True, False])
  advantages, returns = gae(jnp.array([0.0, 9.0, 0.0, 1.0, 9.0]), jnp.array([0.5, 7.0, 0.5, 0.5, 7.0]), mask, 1.0, 0.5)
  np.testing.assert_allclose(advantages, [0.125, 0, 0.25, 0.5, 0])
  np.testing.assert_allclose(returns, [0.625, 0, 0.75, 1.0, 0])


def test_gae_with_any_mask_is_that_of_the_tokens_that_count():
  rng = np.random.default_rng(1)
  rewards, values = rng.normal(size=(2, 32, 7)).astype(np.float32)
  mask, final = rng.random((32, 7)) < 0.6, rng.normal(size=32).astype(np.float32)
  assert any(np.any(np.diff(row.astype(int)) > 0) for row in mask)
  found = jax.jit(gae)(rewards, values, mask, 0.9, 0.8, final)
  for b, row in enumerate(mask):
    alone = gae(rewards[b, row], values[b, row], np.ones(row.sum(), bool), 0.9, 0.8, final[b])
    for own, wanted in zip(found, alone):
      np.testing.assert_allclose(own[b, row], wanted, rtol=1e-5, atol=1e-6)
      assert not own[b, ~row].any()


def test_gae_takes_the_value_at_the_cut_by_hand():
  rewards, values = jnp.zeros((2, 2)), jnp.full((2, 2), 0.5)
  advantages, returns = gae(rewards, values, jnp.ones((2, 2), bool), 0.5, 1.0, jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(advantages, [[-0.25, 0.0], [-0.5, -0.5]])
  np.testing.assert_allclose(returns, [[0.25, 0.5], [0.0, 0.0]])


def test_gae_ignores_what_stands_after_the_end_and_has_no_gradient():
  mask = jnp.array([True, True, False])
  clean = gae(jnp.array([0.0, 1.0, 0.0]), jnp.array([0.3, 0.2, 0.0]), mask)
  junk = gae(jnp.array([0.0, 1.0, 9.0]), jnp.array([0.3, 0.2, 7.0]), mask)
  np.testing.assert_array_equal(clean, junk)
  gradient = jax.grad(lambda v: jnp.sum(gae(jnp.ones(3), v, mask)[0]))(jnp.ones(3))
  assert jnp.all(gradient == 0)


def test_group_relative_by_hand():
  values = group_relative(jnp.array([1.0, 0.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0]), 4)
  np.testing.assert_allclose(values, [1, -1, 1, -1, 0, 0, 0, 0], atol=1e-5)


def test_leave_one_out_by_hand():
  values = leave_one_out(jnp.array([3.0, 0.0, 0.0, 1.0, 1.0, 4.0]), 3)
  np.testing.assert_allclose(values, [3.0, -1.5, -1.5, -1.5, -1.5, 3.0], rtol=1e-6)


def test_whiten():
  mask = jnp.array([[True, True], [True, False]])
  values = whiten(jnp.array([[1.0, 2.0], [3.0, 99.0]]), mask)
  np.testing.assert_allclose(values, [[-1.224744, 0.0], [1.224744, 0.0]], atol=1e-5)


@pytest.mark.parametrize('estimator', [group_relative, leave_one_out])
@pytest.mark.parametrize('size', [1, 4])
def test_groups_must_divide_the_episodes(estimator, size):
  with pytest.raises(ValueError, match='group_size'):
    estimator(jnp.ones(6), size)
