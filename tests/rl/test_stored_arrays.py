"""The loss from stored log-probabilities, aggregation, clipping and the rule for the exponent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from tiers import slow_except

from critkl_jax import (
    Batch,
    LossConfig,
    aggregate,
    certainty_from_entropy,
    check_batch,
    exponent_for,
    group_relative,
    half_weight_entropy,
    kl_shaped_rewards,
    kl_weight,
    linear_ppo_loss,
    loss_denominator,
    ppo_loss,
    ppo_loss_from_log_probs,
    reference_statistics,
    token_kl,
    token_kl_from_log_probs,
    truncated_importance_weights,
)
from critkl_jax import config as config_lib
from critkl_jax.rl import losses
from critkl_jax.rl.aggregation import masked_mean
from critkl_jax.rl.loss_metrics import weight_quantiles
from critkl_jax.rl.policy_gradients import policy_loss, sequence_level

B, T, V, D = 4, 6, 11, 5
KEYS = jax.random.split(jax.random.key(0), 9)
LENGTHS = jnp.array([6, 2, 3, 5])
MASK = jnp.arange(T)[None] < LENGTHS[:, None]
HIDDEN, REF_HIDDEN = (jax.random.normal(key, (B, T, D)) for key in KEYS[:2])
EMBEDDING, REF_EMBEDDING = (jax.random.normal(key, (V, D)) for key in KEYS[2:4])
LOGITS, REF_LOGITS = HIDDEN @ EMBEDDING.T, REF_HIDDEN @ REF_EMBEDDING.T
ACTIONS = jax.random.randint(KEYS[4], (B, T), 0, V)
OLD = losses.action_log_probs(LOGITS, ACTIONS) + 0.3 * jax.random.normal(KEYS[5], (B, T))
ADVANTAGES = jax.random.normal(KEYS[6], (B,))
BATCH = Batch(actions=ACTIONS, mask=MASK, log_probs=OLD, advantages=ADVANTAGES)
WITH_CRITIC = BATCH.replace(values=jnp.ones((B, T)), returns=jax.random.normal(KEYS[7], (B, T)))
CONFIG = LossConfig(certainty_exponent=3.0, kl_coefficient=0.7)


def close(one, two, rtol=1e-6, atol=1e-7):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), one, two)


def from_log_probs(logits, batch, config, **options):
  """Computes the loss as a trainer does that stores log-probabilities."""
  stored = reference_statistics(REF_LOGITS / config.temperature, ACTIONS, mask=MASK)
  log_probs = losses.action_log_probs(logits / config.temperature, ACTIONS)
  return ppo_loss_from_log_probs(log_probs, batch, config, ref_log_probs=stored.log_prob, certainty=stored.certainty,
                                 **options)


@pytest.mark.parametrize('values', slow_except((None,), (None, 0.5)))
@pytest.mark.parametrize('changes', slow_except(
    ({}, {'kl': 'none'}, {'ratio': 'sequence', 'clip_ratio': 0.01}, {'aggregation': 'sequences'}),
    ({}, {'kl_estimator': 'k1'}, {'kl_estimator': 'k3'}, {'kl': 'standard'}, {'kl': 'none'}, {'algorithm': 'a2c'},
     {'clip_ratio_high': 0.4}, {'dual_clip': 1.5}, {'ratio': 'sequence', 'clip_ratio': 0.01},
     {'aggregation': 'sequences'}, {'aggregation': 'fixed_length', 'aggregation_length': 9})), ids=str)
def test_all_three_losses_agree(changes, values):
  config = config_lib.replace(CONFIG, **changes)
  batch = BATCH if values is None else WITH_CRITIC
  values = None if values is None else jnp.full((B, T), values)

  def of_logits(logits):
    return ppo_loss(logits, values, REF_LOGITS, batch, config)

  (loss, metrics), gradient = jax.value_and_grad(of_logits, has_aux=True)(LOGITS)
  (stored, some), stored_gradient = jax.value_and_grad(
      lambda logits: from_log_probs(logits, batch, config, values=values), has_aux=True)(LOGITS)
  close((stored, stored_gradient), (loss, gradient), atol=1e-6)
  close({name: some[name] for name in some if name != 'kl_estimate'},
        {name: metrics[name] for name in some if name != 'kl_estimate'})
  for implementation in ('plain', 'chunked'):
    linear, linear_gradient = jax.value_and_grad(
        lambda hidden, name=implementation: linear_ppo_loss(
            hidden, EMBEDDING, values, REF_HIDDEN, REF_EMBEDDING, batch, config, implementation=name)[0])(HIDDEN)
    close((linear, linear_gradient), (loss, jnp.einsum('btv,vd->btd', gradient, EMBEDDING)), rtol=1e-5, atol=1e-6)


def test_an_entropy_bonus_needs_the_entropy():
  config = config_lib.replace(CONFIG, entropy_coefficient=0.1)
  with pytest.raises(ValueError, match=r'entropy: entropy_coefficient=0\.1 needs it'):
    from_log_probs(LOGITS, BATCH, config)
  entropy = losses.weighted_kl(LOGITS, REF_LOGITS, ACTIONS, exponent=0.0).entropy
  close(from_log_probs(LOGITS, BATCH, config, entropy=entropy)[0], ppo_loss(LOGITS, None, REF_LOGITS, BATCH, config)[0])


def test_what_is_missing_is_refused():
  log_probs = losses.action_log_probs(LOGITS, ACTIONS)
  with pytest.raises(ValueError, match=r"ref_log_probs: kl='prioritized' needs it"):
    ppo_loss_from_log_probs(log_probs, BATCH, CONFIG)
  with pytest.raises(ValueError, match=r"certainty: kl='prioritized' needs it"):
    ppo_loss_from_log_probs(log_probs, BATCH, CONFIG, ref_log_probs=log_probs)
  with pytest.raises(ValueError, match=r'batch.weight: another weight'):
    ppo_loss_from_log_probs(log_probs, BATCH.replace(weight=log_probs), CONFIG, ref_log_probs=log_probs,
                            weight=log_probs)
  with pytest.raises(ValueError, match='the exact KL needs logits'):
    ppo_loss_from_log_probs(log_probs, BATCH, config_lib.replace(CONFIG, kl_estimator='exact'), weight=-log_probs,
                            ref_log_probs=log_probs)
  with pytest.raises(ValueError, match=r'batch.returns: .* since values is given'):
    ppo_loss(LOGITS, jnp.zeros((B, T)), REF_LOGITS, BATCH, CONFIG)
  with pytest.raises(ValueError, match=r'values: .* since batch.returns is given'):
    ppo_loss(LOGITS, None, REF_LOGITS, WITH_CRITIC, CONFIG)
  with pytest.raises(ValueError, match=r'batch.values: value_clip=0.2'):
    ppo_loss(LOGITS, jnp.zeros((B, T)), REF_LOGITS, WITH_CRITIC.replace(values=None), LossConfig(value_clip=0.2))
  with pytest.raises(AssertionError):
    ppo_loss(LOGITS, None, REF_LOGITS, BATCH.replace(advantages=jnp.zeros(T)), CONFIG)


def test_masked_tokens_may_be_anything():
  junk = jnp.where(MASK, 1.0, jnp.nan)
  batch = BATCH.replace(log_probs=OLD * junk, importance_weights=junk, weight=junk,
                        actions=jnp.where(MASK, ACTIONS, -100))
  log_probs = losses.action_log_probs(LOGITS, ACTIONS) * junk
  loss, gradient = jax.value_and_grad(lambda x: ppo_loss_from_log_probs(
      x, batch, CONFIG, ref_log_probs=log_probs, entropy=log_probs)[0])(log_probs)
  assert np.isfinite(loss)
  assert np.all(np.isfinite(gradient))
  assert not np.any(np.asarray(gradient)[~np.asarray(MASK)])


def test_estimates_from_log_probabilities():
  log_probs, ref_log_probs = (losses.action_log_probs(x, ACTIONS) for x in (LOGITS, REF_LOGITS))
  for estimator in ('k1', 'k2', 'k3'):
    close(token_kl_from_log_probs(log_probs, ref_log_probs, estimator),
          token_kl(LOGITS, REF_LOGITS, ACTIONS, estimator), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='needs logits'):
    token_kl_from_log_probs(log_probs, ref_log_probs, 'exact')
  gradient = jax.grad(lambda x: jnp.sum(token_kl_from_log_probs(log_probs, x)))(ref_log_probs)
  assert not np.any(gradient)


def test_rewards_shaped_by_the_penalty():
  log_probs, ref_log_probs = (losses.action_log_probs(x, ACTIONS) for x in (LOGITS, REF_LOGITS))
  rewards, weight = jax.random.normal(KEYS[8], (B, T)), jnp.full((B, T), 0.5)
  found = kl_shaped_rewards(rewards, log_probs, ref_log_probs, MASK, coefficient=2.0, weight=weight)
  close(found, jnp.where(MASK, rewards - (log_probs - ref_log_probs), 0.0), rtol=1e-5)


@pytest.mark.parametrize(('aggregation', 'length', 'expected'), [
    ('tokens', 0, lambda x, n: sum(map(np.sum, x)) / sum(n)),
    ('sequences', 0, lambda x, n: np.mean([np.mean(row) for row in x])),
    ('fixed_length', 0, lambda x, n: sum(map(np.sum, x)) / (len(n) * T)),
    ('fixed_length', 9, lambda x, n: sum(map(np.sum, x)) / (len(n) * 9))])
def test_means_over_a_batch(aggregation, length, expected):
  x = jax.random.normal(KEYS[8], (B + 1, T))
  mask = jnp.concatenate([MASK, jnp.zeros((1, T), bool)])  # an episode without tokens does not count
  rows = [np.asarray(x)[b, :n] for b, n in enumerate(LENGTHS.tolist())]
  found = aggregate(jnp.where(mask, x, jnp.nan), mask, aggregation, length)
  np.testing.assert_allclose(found, expected(rows, LENGTHS.tolist()), rtol=1e-6)


@pytest.mark.parametrize('aggregation', ['tokens', 'sequences', 'fixed_length'])
def test_microbatches_add_up(aggregation):
  """Episodes of 6, 2, 3 and 5 tokens: the average of microbatches' gradients is wrong, their sum is exact."""
  config = config_lib.replace(CONFIG, aggregation=aggregation)

  def gradient(rows, **options):
    part = jax.tree.map(lambda x: x[rows], (LOGITS, REF_LOGITS, BATCH))
    own = jax.grad(lambda logits: ppo_loss(logits, None, *part[1:], config, **options)[0])(part[0])
    return jnp.zeros_like(LOGITS).at[rows].set(own)

  whole, halves = gradient(jnp.arange(B)), (jnp.array([0, 3]), jnp.array([1, 2]))  # 11 and 5 tokens
  denominator = loss_denominator(MASK, config)
  assert denominator == loss_denominator(MASK, config.aggregation, config.aggregation_length)
  close(sum(gradient(rows, denominator=denominator) for rows in halves), whole, rtol=1e-5)
  average = sum(gradient(rows) for rows in halves) / 2
  difference = float(jnp.linalg.norm(average - whole) / jnp.linalg.norm(whole))
  assert difference > 0.02 if aggregation == 'tokens' else difference < 1e-6


def test_linear_loss_takes_no_option_that_the_config_has():
  with pytest.raises(ValueError, match=r"\['exponent'\]: come from the batch and the config"):
    linear_ppo_loss(HIDDEN, EMBEDDING, None, REF_HIDDEN, REF_EMBEDDING, BATCH, CONFIG, exponent=3.0)


def test_linear_loss_takes_a_denominator():
  arrays = HIDDEN, EMBEDDING, None, REF_HIDDEN, REF_EMBEDDING, BATCH, CONFIG
  one, two = (linear_ppo_loss(*arrays, denominator=n)[0] for n in (None, 2 * loss_denominator(MASK)))
  np.testing.assert_allclose(one, 2 * two, rtol=1e-6)


def test_no_token_in_any_part():
  nothing = jnp.zeros_like(MASK)
  batch = BATCH.replace(mask=nothing)
  loss, gradient = jax.value_and_grad(lambda logits: ppo_loss(
      logits, None, REF_LOGITS, batch, CONFIG, denominator=loss_denominator(nothing))[0])(LOGITS)
  assert loss == 0
  assert not np.any(gradient)


def test_a_weight_replaces_that_of_the_certainty():
  stored, log_probs = reference_statistics(REF_LOGITS, ACTIONS), losses.action_log_probs(LOGITS, ACTIONS)
  config = config_lib.replace(CONFIG, certainty_intercept=0.2)

  def penalty(**arrays):
    return ppo_loss_from_log_probs(log_probs, BATCH, config, ref_log_probs=stored.log_prob, **arrays)[1]['kl_penalty']

  own = kl_weight(stored.certainty, 3.0, 0.2)
  np.testing.assert_allclose(penalty(certainty=stored.certainty), penalty(weight=own), rtol=1e-6)
  assert penalty(certainty=stored.certainty, weight=0.5 * own) == pytest.approx(float(penalty(weight=own)) / 2)


def test_clipping():
  old, advantages = jnp.zeros(5), jnp.array([1.0, 1.0, -1.0, -1.0, -1.0])
  new = jnp.log(jnp.array([1.25, 1.5, 0.5, 1.5, 4.0]))
  loss, clipped = policy_loss(new, old, advantages, 'ppo', 0.2, 0.3)
  np.testing.assert_allclose(loss, [-1.25, -1.3, 0.8, 1.5, 4.0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [False, True, True, False, False])
  loss, clipped = policy_loss(new, old, advantages, 'ppo', 0.2, 0.3, dual_clip=3.0)
  np.testing.assert_allclose(loss, [-1.25, -1.3, 0.8, 1.5, 3.0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [False, True, True, False, True])
  with pytest.raises(ValueError, match='dual_clip: expected a number greater than 1'):
    LossConfig(dual_clip=0.5)
  with pytest.raises(ValueError, match='dual_clip: has no effect'):
    LossConfig(algorithm='a2c', dual_clip=3.0)


def test_ratio_of_a_sequence():
  """The gradient equals that of GSPO's objective, written down as in its equation 5."""
  config = LossConfig(kl='none', ratio='sequence', clip_ratio=0.1, aggregation='sequences')

  def objective(logits):
    log_ratio = jnp.where(MASK, losses.action_log_probs(logits, ACTIONS) - OLD, 0.0)
    ratio = jnp.exp(jnp.sum(log_ratio, 1) / LENGTHS.astype(jnp.float32))
    return -jnp.mean(jnp.minimum(ratio * ADVANTAGES, jnp.clip(ratio, 0.9, 1.1) * ADVANTAGES))

  expected = jax.value_and_grad(objective)(LOGITS)
  found = jax.value_and_grad(lambda logits: ppo_loss(logits, None, REF_LOGITS, BATCH, config)[0])(LOGITS)
  close(found, expected, rtol=1e-5)
  assert not np.any(sequence_level(OLD, OLD + 1.0, MASK)[~MASK])


def test_importance_weights_multiply_the_policy_gradient_alone():
  ratios = jnp.linspace(0.5, 4.0, B * T).reshape(B, T)
  weights = truncated_importance_weights(OLD, OLD - jnp.log(ratios), MASK)
  np.testing.assert_allclose(weights, jnp.where(MASK, jnp.minimum(ratios, 2.0), 0.0), rtol=1e-5)
  plain, weighted = (ppo_loss(LOGITS, None, REF_LOGITS, batch, CONFIG)[1]
                     for batch in (BATCH, BATCH.replace(importance_weights=weights)))
  per_token, _ = policy_loss(losses.action_log_probs(LOGITS, ACTIONS), OLD, ADVANTAGES[:, None], 'ppo', 0.2)
  np.testing.assert_allclose(weighted['policy_loss'], masked_mean(weights * per_token, MASK), rtol=1e-5)
  assert weighted['kl_penalty'] == plain['kl_penalty']


def test_the_behaviour_policy_may_be_the_policy():
  log_probs = losses.action_log_probs(LOGITS, ACTIONS)
  for changes in ({}, {'algorithm': 'a2c'}, {'ratio': 'sequence'}):
    config = config_lib.replace(CONFIG, **changes)
    expected, found = (jax.value_and_grad(lambda logits, batch=batch, config=config: ppo_loss(
        logits, None, REF_LOGITS, batch, config)[0])(LOGITS) for batch in (
            BATCH.replace(log_probs=log_probs), BATCH.replace(log_probs=None)))
    close(found, expected, rtol=1e-5)
    arrays = HIDDEN, EMBEDDING, None, REF_HIDDEN, REF_EMBEDDING, BATCH.replace(log_probs=None), config
    np.testing.assert_allclose(linear_ppo_loss(*arrays)[0], found[0], rtol=1e-5)
    np.testing.assert_allclose(from_log_probs(LOGITS, BATCH.replace(log_probs=None), config)[0], found[0], rtol=1e-5)


def test_certainty_from_an_entropy():
  stored = reference_statistics(REF_LOGITS, ACTIONS)
  np.testing.assert_allclose(certainty_from_entropy(stored.entropy, V), stored.certainty, atol=1e-6)


def test_deviation_of_a_group():
  returns = jax.random.normal(KEYS[8], (8,))
  groups = np.asarray(returns, np.float64).reshape(2, 4)
  centred = groups - groups.mean(1, keepdims=True)
  one, two = (np.asarray(group_relative(returns, 4, ddof=ddof)) for ddof in (0, 1))
  np.testing.assert_allclose(one / two, math.sqrt(4 / 3), rtol=1e-4)
  np.testing.assert_allclose(two, (centred / groups.std(1, ddof=1, keepdims=True)).ravel(), rtol=1e-4)
  np.testing.assert_allclose(group_relative(returns.tolist(), 4, scale='none'), centred.ravel(), rtol=1e-5)
  np.testing.assert_allclose(group_relative(returns, 4, scale='batch'), (centred / groups.std()).ravel(), rtol=1e-4)
  np.testing.assert_allclose(group_relative(returns, 4, eps=1.0),
                             (centred / (groups.std(1, keepdims=True) + 1)).ravel(), rtol=1e-5)
  for wrong in ({'scale': 'std'}, {'ddof': 2}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      group_relative(returns, 4, **wrong)


def test_rule_for_the_exponent():
  for vocab_size, entropy in ((41, 0.01712), (32_000, 0.04782), (151_936, 0.05500)):
    assert half_weight_entropy(150.0, vocab_size) == pytest.approx(entropy, rel=1e-3)
    exponent = exponent_for(entropy, vocab_size)
    assert half_weight_entropy(exponent, vocab_size) == pytest.approx(entropy, rel=1e-9)
    certainty = 1 - entropy / math.log(vocab_size)
    np.testing.assert_allclose(kl_weight(jnp.float32(certainty), exponent), 0.5, rtol=1e-3)
  for wrong in ((0.0, 41), (4.0, 41), (0.1, 1)):
    with pytest.raises(ValueError, match=r'half_weight_entropy|vocab_size'):
      exponent_for(*wrong)
  with pytest.raises(ValueError, match='exponent'):
    half_weight_entropy(0.0, 41)


def test_quantiles_of_the_weight():
  weight = jnp.linspace(0.0, 1.0, 200).reshape(10, 20)
  mask = weight < 0.5
  found = weight_quantiles(weight, mask)
  ordered = np.sort(np.asarray(weight)[np.asarray(mask)])
  assert [float(x) for x in found.values()] == [float(ordered[i]) for i in (0, 49, 98)]
  assert not any(weight_quantiles(weight, jnp.zeros_like(mask)).values())


def test_checks_inside_jit():
  def loss(batch):
    return ppo_loss(LOGITS, None, REF_LOGITS, batch, CONFIG, checks=True)[0]

  checked = jax.jit(checkify.checkify(loss))
  assert checked(BATCH)[0].get() is None
  for wrong, words in (({'actions': ACTIONS.at[0, 0].set(-100)}, '1 unmasked tokens have ids outside 0..10'),
                       ({'log_probs': OLD.at[0, 0].set(0.5)}, 'log-probability above 0'),
                       ({'advantages': ADVANTAGES.at[1].set(jnp.nan)}, 'batch.advantages: 1 unmasked entries'),
                       ({'importance_weights': -MASK.astype(jnp.float32)}, '16 unmasked entries are negative')):
    assert words in checked(BATCH.replace(**wrong))[0].get()
  masked = BATCH.replace(actions=jnp.where(MASK, ACTIONS, -100), log_probs=jnp.where(MASK, OLD, jnp.nan))
  assert checked(masked)[0].get() is None
  with pytest.raises(Exception, match='ids outside'):
    check_batch(BATCH.replace(actions=ACTIONS + V), V)
