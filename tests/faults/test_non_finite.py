"""What is not finite makes no update, is counted and named, and ends a run that makes no other."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from letters import TOKENIZER, letter_task
from processes import refused, run
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.records import Experience, TrainState
from critkl_jax.runtime import checkpoint, loop
from critkl_jax.sampling import scoring
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.training import finite, population, train_step
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

pytestmark = pytest.mark.usefixtures('standard_promotion')
CONFIG = FinetuneConfig(episodes=8, minibatches=2, learning_rate=1e-2)
MODEL = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))
KEY = jax.random.key(3)
BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture(scope='module')
def reference():
  return MODEL.init(jax.random.key(0))


def assert_same(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


# One update.


@jax.jit
def small_update(terms, params, grads):
  optimizer = optax.adam(0.1)
  before = params, optimizer.init(params)
  updates, opt_state = optimizer.update(grads, before[1], params)
  return before, finite.guarded(before, lambda *_: (optax.apply_updates(params, updates), opt_state), terms, grads)


@pytest.mark.parametrize('from_size', [0, 2**26])
def test_an_update_in_place_is_the_update(standard_promotion, monkeypatch, from_size):
  """It is computed for the check, for the parameters and for the optimizer's state; members of a population differ."""
  monkeypatch.setattr(finite, 'IN_PLACE', from_size)
  optimizer = optax.adam(0.1)

  def update(before, grads):
    updates, opt_state = optimizer.update(grads, before[1], before[0])
    return optax.apply_updates(before[0], updates), opt_state

  @jax.jit
  @jax.vmap
  def step(before, grads):
    return finite.guarded(before, update, {}, grads)

  params = {'a': jnp.arange(12.0).reshape(3, 2, 2), 'b': jnp.ones((3, 5))}
  before = params, jax.vmap(optimizer.init)(params)
  for i in range(3):
    grads = jax.tree.map(lambda x, i=i: x / (i + 1.0) + 1.0, params)
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), grads)
    wanted = jax.jit(jax.vmap(update))(before, grads)
    wanted = jax.tree.map(lambda new, old: new.at[1].set(old[1]), wanted, before)
    before, number = step(before, bad)
    assert np.asarray(number).astype(bool).tolist() == [False, True, False]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), before, wanted)
  assert not np.array_equal(before[0]['a'][0], params['a'][0])
  np.testing.assert_array_equal(before[0]['a'][1], params['a'][1])


def sound():
  params = {'a': jnp.ones((2, 3)), 'b': {'kernel': jnp.ones(4)}}
  return {name: jnp.ones(()) for name in finite.TERMS}, params, jax.tree.map(jnp.ones_like, params)


def spoiled(tree, name, value):
  def one(path, x):
    return x.at[-1].set(value) if jax.tree_util.keystr(path, simple=True, separator='/') == name else x

  return jax.tree_util.tree_map_with_path(one, tree)


def test_a_sound_update_is_made():
  before, (after, number) = small_update(*sound())
  assert number == 0
  assert finite.term_of(number, before[0]) == ''
  np.testing.assert_allclose(after[0]['a'], before[0]['a'] - 0.1, rtol=1e-5)
  assert after[1][0].count == 1


@pytest.mark.parametrize('value', BAD)
@pytest.mark.parametrize('name', finite.TERMS)
def test_every_term_is_named_and_skips_the_update(name, value):
  terms, params, grads = sound()
  before, (after, number) = small_update(terms | {name: jnp.float32(value)}, params, grads)
  assert_same(after, before)
  assert finite.term_of(number, params) == finite.TERMS[name]


@pytest.mark.parametrize('value', [*BAD, 1e30])  # the square of 1e30 is not finite: it would be clipped to 0
@pytest.mark.parametrize('name', ['a', 'b/kernel'])
def test_every_gradient_is_named_and_skips_the_update(name, value):
  terms, params, grads = sound()
  before, (after, number) = small_update(terms, params, spoiled(grads, name, value))
  assert_same(after, before)
  assert finite.term_of(number, params) == f'gradient of {name}'


@pytest.mark.parametrize('name', ['a', 'b/kernel'])
def test_every_parameter_is_named_and_skips_the_update(name):
  terms, params, grads = sound()
  kept, number = finite.guarded((params, ()), lambda *_: (spoiled(params, name, jnp.inf), ()), terms, grads)
  assert_same(kept[0], params)
  assert finite.term_of(number, params) == f'parameter {name}'


def test_members_skip_by_themselves():
  terms, params, grads = jax.tree.map(lambda x: jnp.stack([x, x, x]), sound())
  terms['kl'] = terms['kl'].at[1].set(jnp.nan)
  before, (after, number) = jax.vmap(small_update)(terms, params, grads)
  np.testing.assert_array_equal(number > 0, [False, True, False])
  np.testing.assert_array_equal(jnp.all(after[0]['a'] == before[0]['a'], (1, 2)), [False, True, False])


# The updates of an iteration.


@functools.cache
def iteration(advantage):
  """A rollout and what an update takes, and the update, compiled."""
  config = config_lib.replace(CONFIG, advantage=advantage)
  state = init_finetuning(MODEL, config, MODEL.init(jax.random.key(0)))
  numbers = Hyperparameters.of(config)
  setup = train_step.Setup.of(MODEL, letter_task(), config)
  _, rollout, rewards = train_step.collect(setup, state.params, KEY, 1.0)
  reference = train_step.reference_pass(setup, state.ref_params, rollout)
  batch = train_step.make_batch(setup, state, rollout, 1.0 + rewards, reference, numbers)
  update = jax.jit(functools.partial(train_step.update, setup))
  return update, state, Experience(rollout, reference, batch.replace(weight=jnp.ones(rollout.mask.shape))), numbers


@pytest.mark.parametrize('value', slow_except((np.nan,), BAD))
@pytest.mark.parametrize('name', ['reference', 'log_probs', 'advantages', 'returns', 'values', 'weight'])
def test_only_the_minibatch_with_the_fault_is_skipped(name, value):
  update, state, experience, numbers = iteration('gae')
  if name == 'reference':
    experience = experience.replace(reference=experience.reference.at[5, 0].set(value))
  else:
    batch = experience.batch
    experience = experience.replace(batch=batch.replace(**{name: getattr(batch, name).at[5, 0].set(value)}))
  after, metrics = update(state, experience, KEY, numbers)
  assert metrics['skipped_updates'] == 1
  term = finite.TERMS['penalty_weight' if name == 'weight' else name]
  assert finite.term_of(metrics['not_finite'], state.params) == term
  assert not finite.not_finite_in((after.params, after.opt_state))
  assert jnp.any(after.params['wte']['embedding'] != state.params['wte']['embedding'])
  assert after.opt_state.inner_state[1][0].count == 1


def test_what_is_masked_may_be_anything():
  update, state, experience, numbers = iteration('gae')
  batch, masked = experience.batch, jnp.argwhere(~experience.rollout.mask)
  assert masked.size
  b, t = masked[0]
  clean = update(state, experience, KEY, numbers)
  batch = batch.replace(**{name: getattr(batch, name).at[b, t].set(jnp.nan)
                           for name in ('log_probs', 'values', 'advantages', 'returns', 'weight')})
  reference = experience.reference.at[b, t].set(jnp.nan)
  after, metrics = update(state, experience.replace(reference=reference, batch=batch), KEY, numbers)
  assert metrics['skipped_updates'] == 0
  assert_same(after.params, clean[0].params)


def test_a_learning_rate_beyond_all_bounds_leaves_the_last_finite_parameters():
  update, state, experience, numbers = iteration('gae')
  after, metrics = update(state, experience, KEY, numbers.replace(learning_rate=jnp.float32(3e38)))
  assert metrics['skipped_updates'] >= 1
  assert not finite.not_finite_in((after.params, after.opt_state))


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_where_the_loss_is(monkeypatch):
  def loss(logits, *rest):
    value, metrics = ppo_loss(logits, *rest)
    return value + jnp.sum(jnp.sqrt(0.0 * logits)), metrics

  ppo_loss = scoring.ppo_loss
  monkeypatch.setattr(scoring, 'ppo_loss', loss)
  _, state, experience, numbers = iteration('group_relative')
  setup = train_step.Setup.of(MODEL, letter_task(), CONFIG)
  after, metrics = train_step.update(setup, state, experience, KEY, numbers)
  assert finite.term_of(metrics['not_finite'], state.params).startswith('gradient of ')
  assert metrics['skipped_updates'] == 2
  assert jnp.isfinite(metrics['loss'])
  assert_same((after.params, after.opt_state), (state.params, state.opt_state))


@pytest.mark.slow
def test_rewards_are_named(reference):
  task = letter_task()
  task = task.__class__(**vars(task) | {'reward': lambda *_: jnp.float32(jnp.nan)})
  state = init_finetuning(MODEL, CONFIG, reference)
  before = jax.device_get(state.params)
  state, metrics = train_step.make_train_step(MODEL, task, CONFIG)(state, KEY, Hyperparameters.of(CONFIG))
  assert metrics['skipped_updates'] == 2
  assert finite.term_of(metrics['not_finite'], state.params) == finite.TERMS['rewards']
  assert_same(state.params, before)
  assert state.step == 1


@pytest.mark.slow
@pytest.mark.parametrize('mapping', population.MAPPINGS)
def test_a_member_that_fails_changes_no_other(reference, mapping):
  configs = population.product(CONFIG, learning_rate=(1e-3, 3e38, 2e-3, 1e-4))
  mesh = sharding.make_mesh('data:1') if mapping != 'shard' else population.members_mesh(4)
  keys, numbers = population.numbers_of(configs, mesh)
  step = population.make_population_step(MODEL, letter_task(), configs, mesh, mapping)

  def trained(numbers):
    state = population.init_population(MODEL, configs, reference, mesh)
    for _ in range(3):
      state, metrics = step(state, keys, numbers)
    return jax.device_get((state, metrics))

  state, metrics = trained(numbers)
  np.testing.assert_array_equal(metrics['skipped_updates'] > 0, [False, True, False, False])
  assert not finite.not_finite_in((state.params, state.opt_state))
  others, _ = trained(numbers.replace(learning_rate=numbers.learning_rate.at[1].set(1e-3)))
  for i in (0, 2, 3):
    assert_same(population.member(state, i).params, population.member(others, i).params)


@pytest.mark.slow
def test_all_devices_of_a_mesh_decide_alike(reference):
  mesh = sharding.make_mesh('data:4,model:2')
  step = train_step.make_train_step(MODEL, letter_task(), CONFIG, mesh)
  state = init_finetuning(MODEL, CONFIG, reference, mesh)
  key, numbers = sharding.replicate((KEY, Hyperparameters.of(CONFIG)), mesh)
  state, metrics = step(state, key, numbers)
  assert metrics['skipped_updates'] == 0
  before = jax.device_get((state.params, state.opt_state))
  broken = state.ref_params | {'ln_f': jax.tree.map(lambda x: x * jnp.nan, state.ref_params['ln_f'])}
  state, metrics = step(state.replace(ref_params=broken), key, numbers)
  assert metrics['skipped_updates'] == 2
  assert finite.term_of(metrics['not_finite'], state.params) == finite.TERMS['reference']
  assert_same((state.params, state.opt_state), before)


# Runs.


INFO = checkpoint.CheckpointInfo(
    model=PRETRAIN_PRESETS['smoke'].model, task=Addition(1), training=FINETUNE_PRESETS['smoke'])
UPDATES, PATIENCE = INFO.training.num_updates, INFO.training.max_skipped


def skipping(bad):
  """A step that adds 1 and, in the given steps, makes no update, as the reference is not finite."""

  def step(state, number):
    idle = number + 1 in bad
    metrics = {'loss': jnp.float32(np.nan if idle else 0), 'num_tokens': jnp.float32(1),
               'skipped_updates': jnp.float32(UPDATES if idle else 0),
               'not_finite': jnp.float32(1 + list(finite.TERMS).index('reference') if idle else 0)}
    return state.replace(params={'w': state.params['w'] + (0 if idle else 1)}, step=state.step + 1), metrics

  return step


def run_of(workdir, bad, num_steps=8, save_every=2):
  state = TrainState(params={'w': jnp.zeros(2)}, opt_state={'m': jnp.ones(2)}, step=jnp.int32(0))
  return loop.run(skipping(bad), state, num_steps, INFO, workdir, save_every, track=lambda *_: ())


def saved(workdir):
  steps = checkpoint.steps_in(workdir / 'checkpoints')
  like = TrainState(params={'w': jnp.zeros(2)}, opt_state={'m': jnp.ones(2)}, step=jnp.int32(0))
  return {step: float(checkpoint.restore(workdir / 'checkpoints' / str(step), like).params['w'][0]) for step in steps}


def test_a_run_goes_on_after_some_steps_without_an_update(tmp_path, caplog):
  state = run_of(tmp_path, bad=(2, 3, 5))
  assert state.step == 8
  assert state.params['w'][0] == 5
  rows = loop.read_metrics(tmp_path / 'metrics.jsonl')
  assert [row['skipped_updates'] for row in rows] == [0, UPDATES, UPDATES, 0, UPDATES, 0, 0, 0]
  assert all('not_finite' not in row for row in rows)
  warnings = [record.getMessage() for record in caplog.records if 'not finite' in record.getMessage()]
  assert len(warnings) == 1
  assert finite.TERMS['reference'] in warnings[0]
  assert 'step 2' in warnings[0]
  assert saved(tmp_path) == {1: 1, 4: 2, 6: 3, 8: 5}


@pytest.mark.parametrize('save_every', [1, 2, 5])
def test_a_run_stops_with_the_last_update_saved_and_says_why(tmp_path, save_every):
  for _ in range(2):  # the same command again comes to the same end
    with pytest.raises(finite.NonFinite, match=rf'steps 4 to [67] of 8 .*{finite.TERMS["reference"]}'):
      run_of(tmp_path, bad=range(4, 9), save_every=save_every)
    assert max(saved(tmp_path).items()) == (3, 3)


def test_a_run_whose_last_step_makes_no_update_fails(tmp_path):
  with pytest.raises(finite.NonFinite, match=r'step 8 of 8.*step 7 is saved'):
    run_of(tmp_path, bad=(8,))
  with pytest.raises(finite.NonFinite):
    run_of(tmp_path / 'never', bad=range(1, 9))
  assert saved(tmp_path / 'never') == {}


def test_a_population_stops_when_no_member_makes_an_update(tmp_path):
  configs = population.product(INFO.training, seed=(0, 1))
  infos = {name: checkpoint.CheckpointInfo(INFO.model, Addition(1), config)
           for name, config in zip(population.names(configs), configs)}

  def run_population(workdir, bad):
    def step(state, number):
      idle = np.array([number + 1 >= first for first in bad])
      metrics = {'loss': jnp.zeros(2), 'num_tokens': jnp.ones(2), 'skipped_updates': jnp.float32(UPDATES * idle),
                 'not_finite': jnp.float32(idle)}
      moved = {'w': state.params['w'] + jnp.float32(~idle)[:, None]}
      return state.replace(params=moved, step=state.step + 1), metrics

    state = TrainState(params={'w': jnp.zeros((2, 3))}, opt_state={'m': jnp.ones((2, 3))}, step=jnp.int32(0))
    return loop.run_population(step, state, 8, infos, workdir, 2, track=lambda *_: ())

  state = run_population(tmp_path / 'one', (99, 3))
  np.testing.assert_array_equal(state.params['w'][:, 0], [8, 2])
  with pytest.raises(finite.NonFinite, match='steps 5 to'):
    run_population(tmp_path / 'both', (5, 3))
  assert {max(checkpoint.steps_in(path)) for path in (tmp_path / 'both').glob('members/*/checkpoints')} == {4}


def test_parameters_that_are_not_finite_are_not_read(tmp_path):
  params = MODEL.init(jax.random.key(0))
  params['ln_f']['scale'] = params['ln_f']['scale'].at[3].set(np.nan)
  checkpoint.save_params(tmp_path, params, checkpoint.CheckpointInfo(MODEL.config, Addition(1), INFO.training), 1)
  with pytest.raises(checkpoint.CheckpointError, match='params is not finite: ln_f/scale'):
    checkpoint.load_checkpoint(tmp_path)


# Binaries. The reference of the preset `smoke` finds no reward: the entropy bonus alone gives a gradient.

ABSURD = ('--learning_rate=1e30', '--entropy_coefficient=0.1')


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pretrain')
  run('pretrain', '--preset=smoke', '--eval_problems=0', f'--workdir={workdir}')
  return workdir / 'reference'


@pytest.mark.slow
def test_finetune_with_an_absurd_learning_rate(pretrained, tmp_path):
  flags = ('--preset=smoke', f'--reference={pretrained}', *ABSURD, '--num_iterations=4', '--eval_problems=0',
           f'--workdir={tmp_path}')
  for _ in range(2):
    assert 'not finite' in refused('finetune', *flags, status=1)
  for step in checkpoint.steps_in(tmp_path / 'checkpoints'):
    checkpoint.load_checkpoint(tmp_path, step)  # refuses what is not finite


@pytest.mark.slow
def test_pretrain_with_an_absurd_learning_rate(tmp_path):
  assert 'not finite' in refused('pretrain', '--preset=smoke', '--learning_rate=1e38', '--num_steps=6',
                                 '--optimizer=adamw', f'--workdir={tmp_path}', status=1)
  assert not (tmp_path / 'reference').exists()


@pytest.mark.slow
def test_sweep_names_the_members_that_failed(pretrained, tmp_path):
  line = refused('sweep', '--preset=smoke', f'--reference={pretrained}', '--learning_rates=1e-4,1e30', '--seeds=1',
                 '--entropy_coefficient=0.1', '--num_iterations=4', '--eval_problems=2', f'--workdir={tmp_path}',
                 status=1)
  assert 'learning_rate=1e+30: no update' in line
  assert 'learning_rate=0.0001' not in line
  assert len(json.loads((tmp_path / 'results.json').read_text())['members']) == 2


@pytest.mark.slow
def test_debug_nans_says_where_and_lets_sound_runs_alone(pretrained, tmp_path):
  flags = ('--preset=smoke', f'--reference={pretrained}', '--eval_problems=0', '--debug_nans')
  run('finetune', *flags, f'--workdir={tmp_path / "sound"}')
  run('pretrain', '--preset=smoke', '--eval_problems=0', '--debug_nans', f'--workdir={tmp_path / "pretrain"}')
  line = refused('finetune', *flags, *ABSURD, f'--workdir={tmp_path / "run"}', status=1)
  assert 'nan' in line
  assert 'critkl_jax/' in line
