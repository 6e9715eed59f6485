import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from critkl_jax.records import Batch
from critkl_jax.rl import losses
from critkl_jax.rl.aggregation import masked_mean
from critkl_jax.rl.certainties import certainty, kl_weight
from critkl_jax.rl.kl import token_kl
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.rl.losses import linear_ppo_loss, ppo_loss, ppo_loss_jit, value_loss
from critkl_jax.rl.policy_gradients import policy_loss

ESTIMATORS = ('exact', 'k1', 'k2', 'k3')
B, T, V = 3, 5, 7


def make_arguments(seed=0, scale=1.0):
  keys = jax.random.split(jax.random.key(seed), 9)
  logits, ref_logits = (scale * jax.random.normal(k, (B, T, V)) for k in keys[:2])
  actions = jax.random.randint(keys[3], (B, T), 0, V)
  mask = jnp.arange(T)[None] < jnp.array([5, 2, 3])[:, None]
  old = losses.action_log_probs(logits, actions) + 0.2 * jax.random.normal(keys[4], (B, T))
  values, old_values, advantages, returns = (jax.random.normal(k, (B, T)) for k in keys[5:])
  batch = Batch(actions=actions, mask=mask, log_probs=old, values=old_values, advantages=advantages, returns=returns)
  return logits, values, ref_logits, batch


def log_softmax(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def numpy_loss(logits, values, ref_logits, batch, config):
  """Computes the loss with loops over episodes and tokens, in float64."""
  total, count = 0.0, 0
  for b in range(B):
    for t in range(T):
      if not batch.mask[b, t]:
        continue
      count += 1
      a = int(batch.actions[b, t])
      logp = log_softmax(np.asarray(logits[b, t], np.float64) / config.temperature)
      logq = log_softmax(np.asarray(ref_logits[b, t], np.float64) / config.temperature)
      advantage = float(batch.advantages[b, t])
      ratio = np.exp(logp[a] - float(batch.log_probs[b, t]))
      clipped = np.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
      policy = -logp[a] * advantage if config.algorithm == 'a2c' else -min(ratio * advantage, clipped * advantage)
      value, old, target = (float(x[b, t]) for x in (values, batch.values, batch.returns))
      critic = (value - target) ** 2
      if config.value_clip:
        moved = old + np.clip(value - old, -config.value_clip, config.value_clip)
        critic = max(critic, (moved - target) ** 2)
      sure = log_softmax(np.asarray(ref_logits[b, t], np.float64) / config.certainty_temperature)
      j = {'negentropy': 1 + np.sum(np.exp(sure) * sure) / np.log(V), 'min_entropy': 1 + sure.max() / np.log(V),
           'max_prob': np.exp(sure.max())}[config.certainty]
      c = config.certainty_intercept
      weight = {'prioritized': (1 - c) * j**config.certainty_exponent + c, 'standard': 1.0, 'none': 0.0}[config.kl]
      d = logp[a] - logq[a]
      kl = {'exact': np.sum(np.exp(logp) * (logp - logq)), 'k1': d, 'k2': d * d / 2, 'k3': np.exp(-d) - 1 + d}[
          config.kl_estimator]
      total += policy + config.value_coefficient * critic / 2
      total += config.entropy_coefficient * np.sum(np.exp(logp) * logp)
      total += config.kl_coefficient * weight * kl
  return total / count


CONFIGS = {
    'default': LossConfig(certainty_exponent=2.0),
    'exact': LossConfig(kl_estimator='exact', certainty_exponent=0.5, certainty='min_entropy', kl_coefficient=3.0),
    'k1': LossConfig(kl_estimator='k1', certainty='max_prob', certainty_exponent=1.0, certainty_intercept=-0.3),
    'k3': LossConfig(kl_estimator='k3', kl='standard', entropy_coefficient=0.1),
    'none': LossConfig(kl='none', value_clip=0.1),
    'a2c': LossConfig(algorithm='a2c', kl='standard', kl_coefficient=5.0, value_clip=0.3),
    'temperatures': LossConfig(temperature=2.0, certainty_temperature=4.0, certainty_exponent=3.0),
    'in the reward': LossConfig(kl_coefficient=0.0, kl='standard'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_loss_against_loops_in_float64(name):
  arguments = make_arguments()
  loss, metrics = ppo_loss(*arguments, CONFIGS[name])
  np.testing.assert_allclose(loss, numpy_loss(*arguments, CONFIGS[name]), rtol=2e-5)
  assert metrics['loss'] == loss
  assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.parametrize('name', CONFIGS)
def test_gradient_of_the_loss(name):
  logits, values, ref_logits, batch = make_arguments()
  check_grads(lambda z, v: ppo_loss(z, v, ref_logits, batch, CONFIGS[name])[0], (logits, values), order=1,
              modes=['rev'], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_jitted_is_the_same_and_needs_no_config():
  arguments = make_arguments()
  for config in CONFIGS.values():
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ppo_loss_jit(*arguments, config),
                 ppo_loss(*arguments, config))
  assert ppo_loss_jit(*arguments)[0] == ppo_loss_jit(*arguments, LossConfig())[0]


def test_coefficients_replace_the_config_and_may_be_traced():
  arguments = make_arguments()
  exponents = jnp.array([0.0, 1.0, 3.0])
  coefficients = losses.Coefficients.of(LossConfig())
  loss = lambda e: ppo_loss(*arguments, LossConfig(), coefficients.replace(certainty_exponent=e))[0]
  found = jax.vmap(loss)(exponents)
  expected = [ppo_loss(*arguments, LossConfig(certainty_exponent=float(e)))[0] for e in exponents]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert len(set(np.asarray(found).tolist())) == 3


def test_the_reference_and_the_weight_get_no_gradient():
  logits, values, ref_logits, batch = make_arguments()
  gradient = jax.grad(lambda r: ppo_loss(logits, values, r, batch, LossConfig(kl_estimator='exact'))[0])(ref_logits)
  assert jnp.all(gradient == 0)


def test_weighted_gradient_is_the_weighted_sum_of_gradients():
  logits, _, ref_logits, batch = make_arguments()
  weights = kl_weight(certainty(ref_logits), 2.0)
  per_token = jax.grad(lambda z: jnp.sum(token_kl(z, ref_logits)))(logits)
  zero = batch.replace(advantages=jnp.zeros((B, T)))
  config = LossConfig(kl_estimator='exact', certainty_exponent=2.0, value_coefficient=0.0)
  found = jax.grad(lambda z: ppo_loss(z, zero.values, ref_logits, zero, config)[0])(logits)
  expected = jnp.where(batch.mask[..., None], 0.5 * weights[..., None] * per_token, 0.0) / float(jnp.sum(batch.mask))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
  assert jnp.std(weights) > 0.02


def test_masked_places_change_nothing_and_may_hold_anything():
  logits, values, ref_logits, batch = make_arguments()
  hidden = ~batch.mask
  spoil = lambda x: jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - 2)), jnp.nan, x)
  spoilt = batch.replace(**{
      name: spoil(getattr(batch, name)) for name in ('log_probs', 'values', 'advantages', 'returns')})
  loss = lambda z, v, r, b: ppo_loss(z, v, r, b, LossConfig())[0]
  clean = jax.value_and_grad(loss, argnums=(0, 1))(logits, values, ref_logits, batch)
  dirty = jax.value_and_grad(loss, argnums=(0, 1))(spoil(logits), spoil(values), spoil(ref_logits), spoilt)
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize('form', ['logits', 'hidden states'])
def test_an_action_outside_the_vocabulary_is_nan_unless_it_is_masked(form):
  logits, values, ref_logits, batch = make_arguments()

  def loss(logits, actions):
    some = batch.replace(actions=actions)
    if form == 'logits':
      return ppo_loss(logits, values, ref_logits, some)[0]
    table = jnp.eye(V)
    return losses.linear_ppo_loss(logits, table, values, ref_logits, table, some, implementation='chunked')[0]

  clean = jax.value_and_grad(loss)(logits, batch.actions)
  for unknown in (V, -1, -100, 2**31 - 1):
    masked = jax.value_and_grad(loss)(logits, jnp.where(batch.mask, batch.actions, unknown))
    jax.tree.map(np.testing.assert_array_equal, masked, clean)
    value, gradient = jax.value_and_grad(loss)(logits, batch.actions.at[0, 1].set(unknown))
    assert np.isnan(value)
    assert np.isnan(gradient[0, 1]).all()


def test_an_empty_mask_gives_zero():
  logits, values, ref_logits, batch = make_arguments()
  loss, _ = ppo_loss(logits, values, ref_logits, batch.replace(mask=jnp.zeros((B, T), bool)))
  assert loss == 0


def test_shapes_are_checked():
  logits, values, ref_logits, batch = make_arguments()
  with pytest.raises(AssertionError):
    ppo_loss(logits, values[:, 1:], ref_logits, batch)
  with pytest.raises(AssertionError):
    ppo_loss(logits, values, ref_logits[:, :, 1:], batch)
  with pytest.raises(AssertionError):
    ppo_loss(logits[:, 1:], values, ref_logits[:, 1:], batch)


# The KL divergence.


def test_kl_against_float64():
  logits, _, ref_logits, batch = make_arguments(scale=10.0)
  logp, logq = log_softmax(logits), log_softmax(ref_logits)
  d = np.take_along_axis(logp - logq, np.asarray(batch.actions)[..., None], -1)[..., 0]
  expected = {'exact': np.sum(np.exp(logp) * (logp - logq), -1), 'k1': d, 'k2': d * d / 2,
              'k3': np.expm1(-np.maximum(d, -20)) + np.maximum(d, -20)}
  for estimator, value in expected.items():
    np.testing.assert_allclose(token_kl(logits, ref_logits, batch.actions, estimator), value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_estimators_agree_in_expectation_where_they_should():
  logits, ref_logits = 0.3 * jax.random.normal(jax.random.key(0), (2, V))
  actions = jax.random.categorical(jax.random.key(1), logits, shape=(200_000,))
  exact = token_kl(logits, ref_logits)
  repeat = lambda z: jnp.broadcast_to(z[None], (actions.size, V))
  for estimator, tolerance in (('k1', 0.02), ('k3', 0.02), ('k2', 0.15)):  # k2 is biased, at third order
    mean = jnp.mean(token_kl(repeat(logits), repeat(ref_logits), actions, estimator))
    np.testing.assert_allclose(mean, exact, rtol=tolerance)


@pytest.mark.slow
def test_expected_gradients_of_the_estimators():
  logits, ref_logits = jax.random.normal(jax.random.key(0), (2, V))
  actions = jnp.arange(V)

  def expected_gradient(estimator):
    probs = jax.nn.softmax(logits)  # of the samples: a constant
    tile = lambda z: jnp.broadcast_to(z[None], (V, V))
    return jax.grad(lambda z: jnp.sum(probs * token_kl(tile(z), tile(ref_logits), actions, estimator)))(logits)

  forward = jax.grad(token_kl)(logits, ref_logits)
  reverse = jax.grad(lambda z: jnp.sum(jax.nn.softmax(ref_logits) * -jax.nn.log_softmax(z)))(logits)
  np.testing.assert_allclose(expected_gradient('k2'), forward, atol=1e-6)
  np.testing.assert_allclose(expected_gradient('k3'), reverse, atol=1e-6)
  np.testing.assert_allclose(expected_gradient('k1'), jnp.zeros(V), atol=1e-6)


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_equal_policies(estimator):
  logits = jax.random.normal(jax.random.key(0), (4, V))
  value = lambda z: jnp.sum(token_kl(z, logits, jnp.zeros(4, jnp.int32), estimator))
  assert value(logits) == 0
  gradient = jax.grad(value)(logits)
  assert jnp.all(jnp.isfinite(gradient))
  if estimator != 'k1':
    np.testing.assert_allclose(gradient, jnp.zeros((4, V)), atol=1e-6)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('where', ['both', 'reference', 'policy'])
def test_ruled_out_tokens_keep_everything_finite(estimator, where):
  logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 4, V))
  if where != 'reference':
    logits = logits.at[:, 2].set(-jnp.inf)
  if where != 'policy':
    ref_logits = ref_logits.at[:, 2].set(-jnp.inf)
  for action in (0,) if where != 'reference' else (0, 2):
    actions = jnp.full(4, action, jnp.int32)
    value, gradient = jax.value_and_grad(
        lambda z, a=actions: jnp.sum(token_kl(z, ref_logits, a, estimator)))(logits)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))
  if where == 'both' and estimator == 'exact':
    keep = jnp.array([0, 1, 3, 4, 5, 6])
    np.testing.assert_allclose(token_kl(logits, ref_logits), token_kl(logits[:, keep], ref_logits[:, keep]), rtol=1e-5)


def test_very_different_policies_keep_k3_finite():
  logits = jnp.array([[200.0, 0.0]])
  value, gradient = jax.value_and_grad(
      lambda z: token_kl(z, -logits, jnp.array([1]), 'k3')[0])(logits)
  assert jnp.isfinite(value)
  assert jnp.all(jnp.isfinite(gradient))


def test_k3_never_pushes_away_from_the_reference():
  ref_logits, actions = jnp.zeros((1, 3)), jnp.array([0])
  for gap in (1.0, 15.0, 19.0, 21.0, 60.0):
    logits = jnp.array([[-gap, 0.0, 0.0]])  # the policy gives the action far less than the reference does
    gradient = jax.grad(lambda z: token_kl(z, ref_logits, actions, 'k3')[0])(logits)
    assert gradient[0, 0] <= 0  # a step down the gradient makes it more probable, or stays
    assert gradient[0, 0] < 0 or gap > 20


@pytest.mark.parametrize('exponent', [0.0, 1.0, 150.0, 10000.0])
def test_loss_is_finite_for_any_exponent_and_ruled_out_tokens(exponent):
  logits, values, ref_logits, batch = make_arguments()
  batch = batch.replace(actions=jnp.minimum(batch.actions, V - 2))
  logits, ref_logits = logits.at[..., -1].set(-jnp.inf), ref_logits.at[..., -1].set(-jnp.inf)
  value, gradient = jax.value_and_grad(
      lambda z: ppo_loss(z, values, ref_logits, batch, LossConfig(certainty_exponent=exponent))[0])(logits)
  assert jnp.isfinite(value)
  assert jnp.all(jnp.isfinite(gradient))


def test_kl_errors():
  with pytest.raises(ValueError, match='needs the sampled actions'):
    token_kl(jnp.zeros((2, V)), jnp.zeros((2, V)), estimator='k2')
  with pytest.raises(ValueError, match="got 'k4'"):
    token_kl(jnp.zeros((2, V)), jnp.zeros((2, V)), jnp.zeros(2, jnp.int32), 'k4')


# Parts.


def test_masked_mean():
  x = jnp.array([[1.0, 2.0], [4.0, jnp.nan]])
  np.testing.assert_allclose(masked_mean(x, jnp.array([[True, False], [True, False]])), 2.5)
  assert masked_mean(x, jnp.zeros((2, 2), bool)) == 0


def test_ppo_clips_only_what_would_move_further():
  ratios, advantages = jnp.array([1.5, 0.5, 1.5, 0.5, 1.1]), jnp.array([1.0, -1.0, -1.0, 1.0, 2.0])
  loss, clipped = policy_loss(jnp.log(ratios), jnp.zeros(5), advantages, 'ppo', 0.2)
  np.testing.assert_allclose(loss, [-1.2, 0.8, 1.5, -0.5, -2.2], rtol=1e-6)
  assert clipped.tolist() == [True, True, False, False, False]
  gradient = jax.grad(lambda x: jnp.sum(policy_loss(x, jnp.zeros(5), advantages, 'ppo', 0.2)[0]))(jnp.log(ratios))
  np.testing.assert_allclose(gradient, [0, 0, 1.5, -0.5, -2.2], rtol=1e-6)


def test_a2c_uses_no_ratio():
  log_probs, advantages = jnp.array([-1.0, -2.0]), jnp.array([2.0, -1.0])
  loss, clipped = policy_loss(log_probs, log_probs + 3.0, advantages, 'a2c', 0.2)
  np.testing.assert_allclose(loss, [2.0, -2.0])
  assert not jnp.any(clipped)


def test_value_loss():
  values, old, returns = jnp.array([1.0, 1.0]), jnp.array([0.0, 0.9]), jnp.array([2.0, 0.0])
  np.testing.assert_allclose(value_loss(values, old, returns), [0.5, 0.5])
  np.testing.assert_allclose(value_loss(values, old, returns, 0.2), [0.5 * 1.8**2, 0.5], rtol=1e-6)


@pytest.mark.parametrize('estimator', ['exact', 'k1', 'k2', 'k3'])
def test_an_action_that_the_policy_rules_out_leaves_kl_and_gradient_finite(estimator):
  logits, actions = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([2])
  for ref_logits in (logits, jnp.zeros((1, 3))):
    value, gradient = jax.value_and_grad(
        lambda x, ref_logits=ref_logits: jnp.sum(token_kl(x, ref_logits, actions, estimator)))(logits)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


def test_a_weight_of_ones_own_is_the_weight_of_the_penalty():
  logits, values, ref_logits, batch = make_arguments()
  config = LossConfig(certainty_exponent=3.0, certainty_temperature=2.0, kl_coefficient=2.0)
  own = kl_weight(certainty(ref_logits, temperature=2.0), 3.0)
  given = batch.replace(weight=jnp.where(batch.mask, own, jnp.nan))
  for with_other_weight in (config, LossConfig(kl='standard', kl_coefficient=2.0)):
    (loss, metrics), (expected, others) = (ppo_loss(logits, values, ref_logits, b, c)
                                           for b, c in ((given, with_other_weight), (batch, config)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics, others)
  double = batch.replace(weight=2 * own)
  np.testing.assert_allclose(ppo_loss(logits, values, ref_logits, double, config)[1]['kl_penalty'],
                             2 * others['kl_penalty'], rtol=1e-5)


def test_a_foreign_loop_gives_its_weight_to_both_losses():
  key = jax.random.split(jax.random.key(5), 4)
  _, values, _, batch = make_arguments()
  hidden, ref_hidden = (0.3 * jax.random.normal(k, (B, T, 8)) for k in key[:2])
  embedding, ref_embedding = (jax.random.normal(k, (V, 8)) for k in key[2:])
  batch = batch.replace(weight=jax.random.uniform(jax.random.key(6), (B, T)))

  def from_logits(hidden, weight):
    return ppo_loss(hidden @ embedding.T, values, ref_hidden @ ref_embedding.T, batch.replace(weight=weight))[0]

  def from_hidden(hidden, weight):
    return linear_ppo_loss(hidden, embedding, values, ref_hidden, ref_embedding, batch.replace(weight=weight))[0]

  found, expected = (jax.value_and_grad(f, argnums=(0, 1))(hidden, batch.weight) for f in (from_hidden, from_logits))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(found[1][0], expected[1][0], rtol=1e-4, atol=1e-6)
  assert not jnp.any(found[1][1])  # a weight carries no gradient
  assert not jnp.any(expected[1][1])
  without = jax.grad(from_logits)(hidden, jnp.zeros((B, T)))
  assert jnp.max(jnp.abs(without - expected[1][0])) > 1e-4


def test_a_weight_without_a_penalty_is_refused():
  logits, values, ref_logits, batch = make_arguments()
  with pytest.raises(ValueError, match=r"batch\.weight: kl='none' has no penalty"):
    ppo_loss(logits, values, ref_logits, batch.replace(weight=jnp.ones((B, T))), LossConfig(kl='none'))
