import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import compiles_nothing
from letters import TOKENIZER, letter_task
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.models.language_model import gathered_whole
from critkl_jax.ops.weighted_kl import api
from critkl_jax.records import Batch, Experience, Rollout
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.footprint import collectives
from critkl_jax.sampling.generation import respond
from critkl_jax.tasks.addition import plus_task, pretraining_task
from critkl_jax.tasks.addition.config import Addition, AdditionPretraining
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig, PretrainConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.pretrain_step import init_pretraining, make_pretrain_step, pretraining_keys
from critkl_jax.training.train_step import Setup, make_train_step, update

pytestmark = pytest.mark.usefixtures('standard_promotion')
# Adam turns a rounding error of a gradient near 0 into a step of up to the learning rate: runs are compared only where
# every update has a gradient. Seed 1 has none in its first: no response is right, and the policy is the reference.
BASE = config_lib.replace(FinetuneConfig(episodes=16, minibatches=2, learning_rate=1e-3), kl_coefficient=1.0,
                          kl_estimator='exact', certainty_exponent=1.0)
MODEL = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))
MESHES = ('data:2', 'model:2', 'data:8', 'data:4,model:2')


@pytest.fixture(scope='module')
def reference():
  return MODEL.init(jax.random.key(0))


def places_of(state):
  return [x.sharding for x in jax.tree.leaves(state)]


def advance(config, reference, mesh, num_steps=3, model=MODEL):
  """Returns the state and the learning curve; `mesh` is text, or None for no mesh at all."""
  mesh = mesh and sharding.make_mesh(mesh)
  state, step = init_finetuning(model, config, reference, mesh), make_train_step(model, letter_task(), config, mesh)
  key, numbers = sharding.replicate((finetuning_keys(config)[1], Hyperparameters.of(config)), mesh)
  curve, places = [], places_of(state)
  for i in range(num_steps):
    with compiles_nothing() if i else contextlib.nullcontext():
      state, metrics = step(state, key, numbers)
    curve.append({name: float(value) for name, value in metrics.items()})
  assert mesh is None or places_of(state) == places  # else the second step would have been compiled anew
  return state, curve


@functools.cache
def alone(config):
  state, curve = jax.device_get(advance(config, MODEL.init(jax.random.key(0)), None))
  assert min(metrics['grad_norm'] for metrics in curve) > 0.1
  return state, curve


def assert_same_run(got, wanted):
  for one, two in zip(got[1], wanted[1], strict=True):
    # Quantiles are averaged over devices, where each handles its own tokens.
    one, two = ({name: x for name, x in row.items() if not name.startswith('weight_q')} for row in (one, two))
    assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), got[0].params, wanted[0].params)


@pytest.mark.parametrize('mesh', slow_except(('data:4,model:2',), MESHES))
def test_any_mesh_gives_the_same_learning_curve(reference, mesh):
  assert_same_run(advance(BASE, reference, mesh), alone(BASE))


VARIANTS = {'gae': {'advantage': 'gae', 'gae_lambda': 0.95}, 'kl in the reward': {'kl_placement': 'reward'}}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.slow
def test_other_losses_on_a_mesh(reference, variant):
  config = config_lib.replace(BASE, **VARIANTS[variant])
  assert_same_run(advance(config, reference, 'data:2,model:2'), alone(config))


@pytest.mark.parametrize(('mesh', 'placement'), slow_except(
    [('data:2,model:2', 'loss')], [('data:2', 'loss'), ('data:2,model:2', 'loss'), ('model:2', 'reward')]))
def test_a_large_vocabulary_is_computed_where_its_tokens_are(reference, mesh, placement, monkeypatch):
  config = config_lib.replace(BASE, kl_placement=placement)
  wanted = alone(config)
  monkeypatch.setattr(api, 'SMALL_VOCABULARY', 0)
  assert_same_run(advance(config, reference, mesh), wanted)


@pytest.mark.parametrize('mesh', ['data:4', 'data:2,model:2'])
@pytest.mark.slow
def test_blocks_as_a_loop_on_a_mesh(mesh):
  plain, loop = (gpt2(config_lib.replace(MODEL.config, num_layers=3, scan_layers=on, remat=on)) for on in (False, True))
  params = plain.init(jax.random.key(0))
  assert_same_run(advance(BASE, params, mesh, model=loop), advance(BASE, params, None, model=plain))


@pytest.mark.slow
def test_a_loop_over_blocks_gathers_one_at_a_time():
  """The text of an update holds the collectives of one block, however many there are."""
  mesh, (key, numbers) = sharding.make_mesh('data:8'), (finetuning_keys(BASE)[1], Hyperparameters.of(BASE))
  rollout = Rollout(*(jnp.zeros((16, 4), x) for x in (int, bool, int, bool, float, float)))
  batch = Batch(actions=rollout.actions, mask=rollout.mask, **dict.fromkeys(
      ('log_probs', 'advantages', 'values', 'returns'), rollout.values))
  arguments = Experience(rollout, jnp.zeros((16, 4, TOKENIZER.vocab_size)), batch), key, numbers

  def exchanged(num_layers):
    model = gpt2(config_lib.replace(MODEL.config, num_layers=num_layers, scan_layers=True, remat=True))
    state = init_finetuning(model, BASE, model.init(jax.random.key(0)), mesh)
    step = jax.jit(sharding.on_mesh(mesh, functools.partial(update, Setup.of(model, letter_task(), BASE))))
    text = step.lower(state, *sharding.replicate(arguments, mesh)).compile().as_text()
    return {row.kind: row.bytes for row in collectives(text) if row.kind == 'all-gather'}

  assert exchanged(3)
  assert exchanged(3) == exchanged(6)


def test_parameters_at_rest_are_shared_out(reference):
  state, _ = advance(BASE, reference, 'data:4,model:2', 1)
  for tree in (state.params, state.ref_params, state.opt_state):
    arrays = [x for x in jax.tree.leaves(tree) if x.ndim]
    own = sum(x.addressable_shards[0].data.size for x in arrays)
    assert own < 1.2 * sum(x.size for x in arrays) / 8
  kernel = state.params['h_0']['mlp']['c_fc']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(('data',), 'model')


@pytest.mark.slow
def test_no_device_gathers_the_cache_or_the_weights_of_others():
  """The loop of a rollout moves activations between devices along `model`, and no array of many episodes."""
  task, model = plus_task(1, 1), gpt2(GPT2Config(context_length=384, num_layers=1, num_heads=2, width=16))
  mesh = sharding.make_mesh('data:4,model:2')

  def sample(params, key):
    problems = sharding.episodes(jax.vmap(task.sample)(jax.random.split(key, 16)))
    return respond(model, gathered_whole(model, params), task, problems, key, method='speculative', window=4)

  params = model.init(jax.random.key(0))
  places = sharding.shardings(params, mesh, model.partition)
  key = sharding.replicate(jax.random.key(1), mesh)
  text = jax.jit(sharding.on_mesh(mesh, sample)).lower(jax.device_put(params, places), key).compile().as_text()
  gathers = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather\(', text)
  assert gathers  # of parameters
  largest = max(math.prod(map(int, shape.split(','))) for shape in gathers if shape)
  assert largest <= max(x.size for x in jax.tree.leaves(params))
  assert ' all-reduce(' in text


@pytest.mark.slow
def test_a_speculative_rollout_on_a_mesh_samples_the_same_tokens():
  task, model = plus_task(1, 1), gpt2(GPT2Config(context_length=384, num_layers=2, num_heads=2, width=16))
  params, key = model.init(jax.random.key(0)), jax.random.key(1)

  def sample(params, key):
    problems = sharding.episodes(jax.vmap(task.sample)(jax.random.split(key, 16)))
    return respond(model, gathered_whole(model, params), task, problems, key, method='speculative', window=4)

  wanted = jax.jit(sample)(params, key)
  for text in ('data:4,model:2', 'data:8'):
    mesh = sharding.make_mesh(text)
    own = sharding.place(params, mesh, model.partition), sharding.replicate(key, mesh)
    got = jax.jit(sharding.on_mesh(mesh, sample))(*own)
    np.testing.assert_array_equal(got.actions, wanted.actions)
    np.testing.assert_allclose(got.log_probs, wanted.log_probs, atol=1e-4)


@pytest.mark.slow
def test_pretraining_on_a_mesh():
  config = PretrainConfig(model=GPT2Config(context_length=384, num_layers=2, num_heads=2, width=16),
                          addition=AdditionPretraining(1),
                          batch_size=8, num_steps=10, warmup_steps=1)
  curves = []
  for mesh in (None, sharding.make_mesh('data:4,model:2')):
    state = init_pretraining(gpt2(config.model), config, mesh)
    step = jax.jit(make_pretrain_step(gpt2(config.model), pretraining_task(1, 1), config, mesh), donate_argnums=0)
    key = sharding.replicate(pretraining_keys(config)[1], mesh)
    losses = []
    for _ in range(3):
      state, metrics = step(state, key)
      losses.append(float(metrics['loss']))
    curves.append(losses)
  assert curves[0] == pytest.approx(curves[1], rel=1e-4)
  assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize('vocabulary', ['small', 'large'])
@pytest.mark.slow
def test_members_episodes_and_model_share_a_mesh(reference, vocabulary, monkeypatch):
  if vocabulary == 'large':
    monkeypatch.setattr(api, 'SMALL_VOCABULARY', 0)
  configs = population.product(BASE, certainty_exponent=(0.0, 150.0), seed=(0, 2))
  mesh = sharding.make_mesh('member:2,data:2,model:2')
  step = population.make_population_step(MODEL, letter_task(), configs, mesh)
  state, numbers = population.init_population(MODEL, configs, reference, mesh), population.numbers_of(configs, mesh)
  places = places_of(state)
  for i in range(3):
    with compiles_nothing() if i else contextlib.nullcontext():
      state, metrics = step(state, *numbers)
  assert places_of(state) == places
  state, metrics = jax.device_get((state, metrics))
  for i, config in enumerate(configs):
    wanted, curve = alone(config)
    got = population.member(state, i)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), got.params, wanted.params)
    assert {name: float(value[i]) for name, value in metrics.items()} == pytest.approx(curve[-1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize('mesh', slow_except(
    ('data:2,model:2',), (None, 'data:2,model:2', 'member:2,data:2,model:2')))
def test_episodes_without_a_signal_have_no_gradient_on_any_mesh(reference, mesh):
  config = config_lib.replace(BASE, seed=1, minibatches=1)
  if mesh and 'member' in mesh:
    configs, mesh = (config, config_lib.replace(config, seed=0)), sharding.make_mesh(mesh)
    state, numbers = population.init_population(MODEL, configs, reference, mesh), population.numbers_of(configs, mesh)
    _, metrics = population.make_population_step(MODEL, letter_task(), configs, mesh)(state, *numbers)
    metrics = {name: value[0] for name, value in metrics.items()}
  else:
    _, (metrics,) = advance(config, reference, mesh, 1)
  assert metrics['accuracy'] == 0
  assert metrics['grad_norm'] < 1e-6


@pytest.mark.parametrize(('made_on', 'read_on'), slow_except(
    [('data:4,model:2', None)], [('data:4,model:2', None), (None, 'data:4,model:2')]))
def test_checkpoints_are_read_on_other_devices(reference, tmp_path, made_on, read_on):
  state, _ = advance(BASE, reference, made_on, 2)
  info = checkpoint.CheckpointInfo(MODEL.config, Addition(1), BASE)
  manager = checkpoint.open_manager(tmp_path)
  checkpoint.save(manager, state, info)
  manager.close()
  mesh = read_on and sharding.make_mesh(read_on)
  fresh = init_finetuning(MODEL, BASE, reference, mesh)
  restored = checkpoint.restore(tmp_path / '2', fresh)
  for got, wanted, like in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (restored, state, fresh))):
    np.testing.assert_array_equal(got, wanted)
    assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
  assert restored.step == 2
  loaded = checkpoint.load_checkpoint(tmp_path, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, state.params)
  assert len(jax.tree.leaves(loaded.params)[0].devices()) == (8 if read_on else 1)


def test_meshes_from_text():
  assert dict(sharding.make_mesh().shape) == {'member': 1, 'data': 8, 'model': 1}
  assert dict(sharding.make_mesh('model:2').shape) == {'member': 1, 'data': 1, 'model': 2}
  assert dict(sharding.make_mesh('member:2,data:-1').shape) == {'member': 2, 'data': 4, 'model': 1}
  for text in ('data', 'data:x', 'batch:2', 'data:2,data:4', 'data:0', 'data:3,model:-1', 'data:16',
               'data:-1,model:-1'):
    with pytest.raises(ValueError, match='mesh: '):
      sharding.make_mesh(text)


def test_episodes_that_a_mesh_does_not_divide_are_refused():
  sharding.check_episodes(sharding.make_mesh('data:4'), 32)
  with pytest.raises(ValueError, match='an update takes 2 episodes, which data:8 does not divide'):
    sharding.check_episodes(sharding.make_mesh('data:8'), 2)


def test_on_one_device_nothing_is_annotated(reference):
  step = make_train_step(MODEL, letter_task(), BASE)
  state, numbers = init_finetuning(MODEL, BASE, reference), Hyperparameters.of(BASE)
  text = step.lower(state, jax.random.key(0), numbers).compile().as_text()
  assert not collectives(text)
  assert sharding.constrain(x := jnp.ones(3), 'data') is x
