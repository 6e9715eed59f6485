import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import compiles_nothing
from letters import TOKENIZER, letter_task
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.ops.weighted_kl import api
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, loop
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
from critkl_jax.training.train_step import Setup, collect, make_batch, make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
KEY = jax.random.key(11)
SMALL = FinetuneConfig(episodes=8, minibatches=2, learning_rate=1e-2)


@pytest.fixture(scope='module')
def model():
  return gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))


@pytest.fixture(scope='module')
def reference(model):
  return model.init(jax.random.key(0))


def advance(model, reference, config, iterations, hyperparameters=None):
  step = make_train_step(model, letter_task(), config)
  state, history = init_finetuning(model, config, reference), []
  for _ in range(iterations):
    state, metrics = step(state, KEY, hyperparameters or Hyperparameters.of(config))
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def assert_trees_close(one, two, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, two)


VARIANTS = {
    'default': SMALL,
    'a2c with gae': config_lib.replace(
        SMALL, algorithm='a2c', advantage='gae', gae_lambda=0.95, whiten_advantages=True),
    'ppo, epochs': config_lib.replace(SMALL, epochs=3, advantage='leave_one_out', kl='standard', kl_estimator='exact'),
    'kl in the reward': config_lib.replace(SMALL, kl_placement='reward', kl_estimator='k1', kl_coefficient=0.1),
    'groups': config_lib.replace(SMALL, episodes_per_problem=4, kl='none'),
}


@pytest.mark.parametrize('name', slow_except(('default', 'a2c with gae'), VARIANTS))
def test_learns(model, reference, name):
  config = config_lib.replace(VARIANTS[name], episodes=64)
  config = config if config.loss.kl == 'none' else config_lib.replace(config, kl_coefficient=0.01)
  _, history = advance(model, reference, config, 40)
  accuracy = [metrics['accuracy'] for metrics in history]
  assert np.mean(accuracy[:3]) < 0.5
  assert np.mean(accuracy[-5:]) > 0.75
  assert all(np.isfinite(value) for metrics in history for value in metrics.values())


@pytest.mark.slow
def test_a_strong_penalty_keeps_the_policy_at_the_reference(model, reference):
  free, held = (advance(model, reference, config_lib.replace(
      SMALL, kl='standard', kl_estimator='exact', kl_coefficient=coefficient), 10)[1][-1]['kl']
                for coefficient in (0.0, 100.0))
  assert held < free / 10


@pytest.mark.slow
def test_is_a_function_of_state_and_key(model, reference):
  one, two = (advance(model, reference, SMALL, 3) for _ in range(2))
  assert_trees_close(one[0].params, two[0].params, rtol=0)
  assert one[1] == two[1]


def test_is_traced_once_for_all_hyperparameters(model, reference):
  step = make_train_step(model, letter_task(), SMALL)
  state = init_finetuning(model, SMALL, reference)
  numbers = [Hyperparameters.of(config_lib.replace(SMALL, certainty_exponent=exponent, learning_rate=rate))
             for exponent, rate in ((0.0, 1e-3), (1.0, 2e-3), (2.0, 3e-3))]
  state, _ = step(state, KEY, numbers[0])
  with compiles_nothing():
    for others in numbers[1:]:
      state, _ = step(state, KEY, others)


def test_the_state_is_donated(model, reference):
  state = init_finetuning(model, SMALL, reference)
  make_train_step(model, letter_task(), SMALL)(state, KEY, Hyperparameters.of(SMALL))
  assert state.params['wte']['embedding'].is_deleted()
  assert not reference['wte']['embedding'].is_deleted()


def test_traced_numbers_take_the_place_of_the_config(model, reference):
  other = config_lib.replace(SMALL, learning_rate=1e-4, kl_coefficient=3.0, certainty_exponent=1.0,
                             entropy_coefficient=0.1, temperature=1.3)
  traced, _ = advance(model, reference, SMALL, 2, Hyperparameters.of(other))
  plain, _ = advance(model, reference, other, 2)
  assert_trees_close(traced.params, plain.params, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_four_members_under_vmap_are_four_single_runs(model, reference):
  # Adam turns a rounding error of a gradient near 0 into a step of up to the learning rate: 1e-3 keeps it under 1e-5.
  config = config_lib.replace(SMALL, kl_estimator='exact', kl_coefficient=1.0, learning_rate=1e-3)
  seeds, exponents = [0, 0, 1, 1], [0.0, 50.0, 0.0, 5.0]
  members = [config_lib.replace(config, seed=seed, certainty_exponent=exponent)
             for seed, exponent in zip(seeds, exponents)]
  keys = [jax.random.key(100 + member.seed) for member in members]
  step = make_train_step(model, letter_task(), config)

  stack = lambda *x: jnp.stack(x)
  states = [init_finetuning(model, member, reference) for member in members]
  together = jax.tree.map(stack, *states).replace(ref_params=states[0].ref_params)
  axes = TrainState(params=0, opt_state=0, step=0, ref_params=None)
  study = jax.jit(jax.vmap(step, in_axes=(axes, 0, 0), out_axes=(axes, 0)))
  numbers = jax.tree.map(stack, *map(Hyperparameters.of, members))
  for _ in range(3):
    together, metrics = study(together, jnp.stack(keys), numbers)

  for i, member in enumerate(members):
    state = init_finetuning(model, member, reference)
    for _ in range(3):
      state, single = step(state, keys[i], Hyperparameters.of(member))
    assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together.params), state.params, rtol=1e-5, atol=1e-5)
    assert_trees_close(jax.tree.map(lambda x, i=i: x[i], metrics), single, rtol=1e-4, atol=1e-5)
  embeddings = together.params['wte']['embedding']
  assert jnp.max(jnp.abs(embeddings[0] - embeddings[1])) > 1e-4  # the exponent matters
  assert jnp.max(jnp.abs(embeddings[0] - embeddings[2])) > 1e-4  # the seed matters


def test_the_key_of_an_iteration_depends_on_its_number_alone(model, reference):
  step = make_train_step(model, letter_task(), SMALL)
  frozen = Hyperparameters.of(SMALL).replace(learning_rate=jnp.float32(0))
  state = init_finetuning(model, SMALL, reference)
  lengths = []
  for number in (0, 5, 5):
    at = state.replace(step=jnp.int32(number), **jax.tree.map(jnp.copy, {
        'params': reference, 'opt_state': state.opt_state, 'ref_params': reference}))
    lengths.append(jax.tree.map(float, step(at, KEY, frozen)[1]))
  assert lengths[1] == lengths[2] != lengths[0]


@pytest.mark.parametrize('detached', [True, False])
@pytest.mark.slow
def test_during_the_critics_warm_up_only_the_critic_learns(model, reference, detached):
  model = gpt2(dataclasses.replace(model.config, value_head_detached=detached))
  config = config_lib.replace(SMALL, advantage='gae', critic_warmup=2)
  state, _ = advance(model, reference, config, 2)
  changed = {name: any(jnp.any(x != y) for x, y in zip(jax.tree.leaves(state.params[name]), jax.tree.leaves(old)))
             for name, old in reference.items()}
  assert changed.pop('value_head')
  assert not any(changed.values())
  later, _ = advance(model, reference, config, 3)
  assert jnp.any(later.params['wte']['embedding'] != reference['wte']['embedding'])


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(model, reference, tmp_path):
  config = config_lib.replace(SMALL, kl_coefficient=0.01, certainty_exponent=1.0)
  info = checkpoint.CheckpointInfo(model=model.config, task=Addition(1), training=config)
  step, numbers = make_train_step(model, letter_task(), config), Hyperparameters.of(config)

  def advance(state, number):
    with contextlib.nullcontext() if number == 0 else compiles_nothing():  # 3 is the first one after resuming
      return step(state, KEY, numbers)

  def run(workdir, iterations):
    start = init_finetuning(model, config, reference)
    return loop.run(advance, start, iterations, info, workdir, save_every=2)

  whole = run(tmp_path / 'whole', 6)
  run(tmp_path / 'parts', 3)
  resumed = run(tmp_path / 'parts', 6)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert jnp.any(whole.params['wte']['embedding'] != reference['wte']['embedding'])


@pytest.mark.slow
def test_the_critic_is_trained_only_where_it_is_asked(model, reference):
  for advantage, trained in (('gae', True), ('group_relative', False), ('leave_one_out', False)):
    state, _ = advance(model, reference, config_lib.replace(SMALL, advantage=advantage), 2)
    assert jnp.any(state.params['value_head']['c_proj']['kernel'] != 0) == trained


def test_another_value_head_starts_anew(reference, model):
  mlp = gpt2(dataclasses.replace(model.config, value_head='mlp'))
  state = init_finetuning(mlp, SMALL, reference)
  assert set(state.params['value_head']) == {'c_fc_0', 'c_fc_1', 'c_proj'}
  same = init_finetuning(model, SMALL, reference)
  assert_trees_close(same.params, reference, rtol=0)


def make_inputs(model, reference, config, task=None):
  setup, numbers = Setup.of(model, task or letter_task(), config), Hyperparameters.of(config)
  _, rollout, rewards = collect(setup, reference, KEY, numbers.loss.temperature)
  other = jax.tree.map(lambda x: 1.3 * x, reference)
  ref_logits, _ = score(model, other, rollout)
  state = init_finetuning(model, config, reference)
  return rollout, rewards, ref_logits, make_batch(setup, state, rollout, rewards, ref_logits, numbers)


@pytest.mark.slow
def test_the_reward_stands_at_the_last_token(model, reference):
  config = config_lib.replace(SMALL, advantage='gae', gae_lambda=1.0)
  rollout, rewards, _, batch = make_inputs(model, reference, config)
  assert len(set(np.asarray(rewards).tolist())) == 2
  np.testing.assert_allclose(batch.returns, jnp.where(rollout.mask, rewards[:, None], 0), atol=1e-6)


def test_a_mask_with_a_hole_gives_the_reward_once(model, reference):
  config = config_lib.replace(SMALL, advantage='gae', gae_lambda=1.0)
  rollout, rewards, ref_logits, _ = make_inputs(model, reference, config)
  long = rollout.mask.sum(1) > 2
  assert long.any()
  rollout = rollout.replace(mask=rollout.mask.at[:, 1].set(False))
  state, numbers = init_finetuning(model, config, reference), Hyperparameters.of(config)
  for values in ({}, {'advantage': 'group_relative'}):
    config = config_lib.replace(config, **values)
    holed = make_batch(Setup.of(model, letter_task(), config), state, rollout, rewards, ref_logits, numbers)
    np.testing.assert_allclose(holed.returns, jnp.where(rollout.mask, rewards[:, None], 0), atol=1e-6)


def test_gae_may_take_the_critics_value_where_an_episode_was_cut(model, reference):
  reference = reference | {'value_head': {'c_proj': reference['value_head']['c_proj'] | {'bias': jnp.full(1, 0.25)}}}
  config = config_lib.replace(SMALL, advantage='gae', gae_lambda=1.0, bootstrap_truncated=True)
  rollout, rewards, _, batch = make_inputs(model, reference, config)
  assert 0 < rollout.truncated.sum() < 8
  expected = rewards + 0.25 * rollout.truncated
  np.testing.assert_allclose(batch.returns, jnp.where(rollout.mask, expected[:, None], 0), atol=1e-6)


def test_rewards_are_taken_as_they_are(model, reference):
  config, letters = config_lib.replace(SMALL, advantage='gae', gae_lambda=1.0), letter_task()
  graded = dataclasses.replace(letters, reward=lambda *answer: 2.5 * letters.reward(*answer) - 1.0)
  rollout, rewards, _, batch = make_inputs(model, reference, config, graded)
  assert set(np.asarray(rewards).tolist()) == {-1.0, 1.5}
  np.testing.assert_allclose(batch.returns, jnp.where(rollout.mask, rewards[:, None], 0), atol=1e-6)


@pytest.mark.slow
def test_metrics_at_critical_tokens_are_those_of_the_first_letters(model, reference):
  """The critical token of a letter is the first one; before the first update the policy is as when it sampled."""
  config = config_lib.replace(SMALL, minibatches=1, kl_coefficient=0.0, certainty_exponent=3.0)
  other = jax.tree.map(lambda x: 1.3 * x, reference)
  state = init_finetuning(model, config, other).replace(params=jax.tree.map(jnp.copy, reference))
  numbers = Hyperparameters.of(config)
  key, _ = jax.random.split(jax.random.fold_in(KEY, 0))
  problems, rollout, rewards = collect(Setup.of(model, letter_task(), config), reference, key, 1.0)
  record = api.weighted_kl(score(model, reference, rollout)[0], score(model, other, rollout)[0], rollout.actions,
                           mask=rollout.mask, exponent=3.0)

  def probe(params):
    return {'probed': jnp.sum(params['wte']['embedding'])}

  _, metrics = make_train_step(model, letter_task(), config, probe=probe)(state, KEY, numbers)
  assert metrics['critical_right'] == pytest.approx(float(jnp.mean(rollout.actions[:, 0] == problems)))
  assert metrics['kl_critical'] == pytest.approx(float(record.kl[:, 0].mean()), rel=1e-4)
  assert metrics['weight_critical'] == pytest.approx(float(record.weight[:, 0].mean()), rel=1e-4)
  assert metrics['probed'] == pytest.approx(float(jnp.sum(reference['wte']['embedding'])), rel=1e-4)
  assert metrics['accuracy'] == rewards.mean()
  assert 'format_errors' not in metrics  # a task that does not judge form
  formed = dataclasses.replace(letter_task(), well_formed=lambda problem, actions, mask: actions[0] == 1)
  state = init_finetuning(model, config, reference)
  _, metrics = make_train_step(model, formed, config)(state, KEY, numbers)
  assert metrics['format_errors'] == pytest.approx(float(jnp.mean(rollout.actions[:, 0] != 1)))


@pytest.mark.slow
def test_the_certainty_of_an_ensemble(model, reference, monkeypatch):
  config = config_lib.replace(SMALL, certainty_exponent=3.0, kl_coefficient=1.0, learning_rate=1e-3)
  both = config_lib.replace(config, certainty_ensemble='another')

  def train(config, ensemble=()):
    state, step = init_finetuning(model, config, reference, ensemble=ensemble), make_train_step(
        model, letter_task(), config)
    for _ in range(2):
      state, metrics = step(state, KEY, Hyperparameters.of(config))
    return state, metrics

  plain, metrics = train(config)
  itself, same = train(both, (reference,))  # the mean of two equal distributions
  assert_trees_close(itself.params, plain.params, rtol=1e-4, atol=1e-5)
  assert same['weight'] == pytest.approx(float(metrics['weight']), rel=1e-4)
  assert metrics['kl_penalty'] > 0
  assert same['kl_penalty'] == pytest.approx(float(metrics['kl_penalty']), rel=1e-3)
  other = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), reference)
  _, changed = train(both, ({**other, 'value_head': None},))  # its critic is not used
  assert abs(changed['weight'] - metrics['weight']) > 1e-2
  with pytest.raises(ValueError, match='ensemble: expected parameters of 1 references, got 0'):
    train(both)
  with pytest.raises(ValueError, match="certainty_ensemble: needs kl_placement='loss'"):
    config_lib.replace(both, kl_placement='reward')
  assert not config_lib.replace(both, kl='standard').certainty_ensemble
  monkeypatch.setattr(api, 'SMALL_VOCABULARY', 0)
  with pytest.raises(ValueError, match='certainty_ensemble: needs the logits'):
    train(both, (reference,))


def test_group_relative_advantages_are_the_episodes(model, reference):
  rollout, rewards, _, batch = make_inputs(model, reference, SMALL)
  expected = (rewards - rewards.mean()) / rewards.std()
  np.testing.assert_allclose(batch.advantages, jnp.where(rollout.mask, expected[:, None], 0), atol=1e-4)


def test_episodes_of_a_group_answer_one_problem(model, reference):
  config = config_lib.replace(SMALL, episodes_per_problem=4)
  rollout, *_ = make_inputs(model, reference, config)
  groups = np.asarray(rollout.prompt).reshape(2, 4, -1)
  assert np.all(groups == groups[:, :1])


@pytest.mark.slow
def test_kl_in_the_reward_lowers_the_returns_by_the_weighted_kl(model, reference):
  config = config_lib.replace(SMALL, advantage='gae', gae_lambda=1.0, kl='standard', kl_estimator='exact',
                              kl_coefficient=0.7)
  plain = make_inputs(model, reference, config)[-1]
  rollout, _, ref_logits, batch = make_inputs(model, reference, config_lib.replace(config, kl_placement='reward'))
  logits, _ = score(model, reference, rollout)
  log_probs, ref_log_probs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  kl = jnp.where(rollout.mask, jnp.sum(jnp.exp(log_probs) * (log_probs - ref_log_probs), -1), 0)
  assert kl.sum() > 1e-4
  np.testing.assert_allclose((plain.returns - batch.returns)[:, 0], 0.7 * kl.sum(-1), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_large_vocabulary_trains_on_hidden_states_as_on_logits(reference, model, monkeypatch):
  """The step holds logits below `SMALL_VOCABULARY`; with that at 0 the same model must learn the same."""
  config = config_lib.replace(SMALL, kl_estimator='exact', kl_coefficient=1.0, certainty_exponent=2.0,
                              entropy_coefficient=0.01, learning_rate=1e-3)
  for variant in (config, config_lib.replace(config, kl_placement='reward', advantage='gae')):
    plain, history = advance(model, reference, variant, 2)
    with monkeypatch.context() as patch:
      patch.setattr(api, 'SMALL_VOCABULARY', 0)
      fused, fused_history = advance(model, reference, variant, 2)
    assert_trees_close(fused.params, plain.params, rtol=1e-4, atol=1e-5)
    for one, two in zip(history, fused_history):
      assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
