"""Foreign models, of plain functions and from NNX, go through sampling, training and checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task
from passes import logits
from strangers import nnx_model, plain_model
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.analysis.comparison import parameter_drift
from critkl_jax.analysis.reading import read_steps, read_tokens
from critkl_jax.ops.weighted_kl import api
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, managers
from critkl_jax.sampling.generation import model_generate
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.known_tasks import OwnTask
from critkl_jax.tasks.task import stop_after
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
MODELS = {'plain functions': plain_model(), 'NNX': nnx_model()}
CONFIG = FinetuneConfig(episodes=16, minibatches=2, learning_rate=1e-2)
NEVER = stop_after([[TOKENIZER.vocab_size]])


@pytest.fixture(scope='module', params=MODELS)
def model(request):
  return MODELS[request.param]


@functools.cache
def params_of(model):
  return model.init(jax.random.key(0))


def advance(model, mesh=None, num_steps=3, config=CONFIG):
  mesh = mesh and sharding.make_mesh(mesh)
  state = init_finetuning(model, config, params_of(model), mesh)
  step = make_train_step(model, letter_task(), config, mesh)
  key, numbers = sharding.replicate((finetuning_keys(config)[1], Hyperparameters.of(config)), mesh)
  curve = []
  for _ in range(num_steps):
    state, metrics = step(state, key, numbers)
    curve.append({name: float(value) for name, value in metrics.items()})
  return jax.device_get(state), curve


def assert_same_run(got, wanted):
  for one, two in zip(got[1], wanted[1], strict=True):
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), got[0].params, wanted[0].params)


def test_speculative_rollouts_are_those_token_by_token_and_the_pass_agrees(model):
  prompt = jnp.array([[0, 0, 3, 1], [2, 1, 1, 4], [0, 2, 5, 3]])
  mask = jnp.array([[False, False, True, True], [True] * 4, [False, True, True, True]])
  options = {'max_new_tokens': 10, 'stop': NEVER, 'usual_length': 3}
  plain, drafted = (model_generate(model, params_of(model), prompt, mask, jax.random.key(3), method=method, window=4,
                                   **options) for method in ('cached', 'speculative'))
  np.testing.assert_array_equal(plain.actions, drafted.actions)
  np.testing.assert_allclose(plain.log_probs, drafted.log_probs, atol=1e-5)
  assert plain.mask.all()
  said, values = score(model, params_of(model), plain)
  taken = jnp.take_along_axis(jax.nn.log_softmax(said), plain.actions[..., None], -1)[..., 0]
  np.testing.assert_allclose(taken, plain.log_probs, atol=1e-5)
  np.testing.assert_allclose(values, plain.values, atol=1e-5)


def test_it_learns_with_all_its_parameters(model):
  config = config_lib.replace(CONFIG, episodes=64, kl_coefficient=0.01)
  state, curve = advance(model, num_steps=80, config=config)
  assert curve[0]['accuracy'] < 0.4
  assert np.mean([metrics['accuracy'] for metrics in curve[-5:]]) > 0.7
  moved = jax.tree_util.tree_map_with_path(
      lambda path, x, y: model.is_critic(sharding.path_names(path)) or bool(np.any(x != y)), state.params,
      params_of(model))
  assert all(jax.tree.leaves(moved))


def test_hidden_states_are_held_for_a_large_vocabulary_and_give_the_same_run(model, monkeypatch):
  wanted = advance(model)
  monkeypatch.setattr(api, 'SMALL_VOCABULARY', 0)
  assert_same_run(advance(model), wanted)


@pytest.mark.parametrize('mesh', slow_except(('data:4,model:2',), ('data:8', 'data:4,model:2')))
def test_a_mesh_of_eight_devices_gives_the_same_run(model, mesh):
  assert_same_run(advance(model, mesh), advance(model))


@pytest.mark.parametrize('mapping', slow_except(('vmap',), ('vmap', 'scan', 'shard')))
def test_members_of_a_population_are_single_runs(model, mapping):
  configs = population.product(CONFIG, seed=(0, 1), learning_rate=(1e-2, 1e-3))
  mesh = population.members_mesh(4) if mapping == 'shard' else sharding.make_mesh('data:1')
  state = population.init_population(model, configs, params_of(model), mesh)
  step, numbers = population.make_population_step(model, letter_task(), configs, mesh, mapping), population.numbers_of(
      configs, mesh)
  for _ in range(3):
    state, _ = step(state, *numbers)
  for i in (0, 3):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
                 jax.device_get(population.member(state, i).params), advance(model, config=configs[i])[0].params)


def test_a_checkpoint_names_its_architecture_and_is_read_with_the_model(model, tmp_path):
  info = checkpoint.CheckpointInfo(model=model.config, task=OwnTask('letters'), training=CONFIG,
                                   architecture=model.name)
  state = TrainState(params=params_of(model), opt_state=None, step=np.int32(7))
  with managers.opened(tmp_path) as manager:
    checkpoint.save(manager, state, info, with_optimizer=False)
  with pytest.raises(checkpoint.CheckpointError, match=f'{model.name!r}, which is not one of .*model='):
    checkpoint.load_checkpoint(tmp_path)
  other = next(other for other in MODELS.values() if other is not model)
  with pytest.raises(checkpoint.CheckpointError, match=f'{model.name!r}, not {other.name!r}'):
    checkpoint.load_checkpoint(tmp_path, model=other)
  found = checkpoint.load_checkpoint(tmp_path, model=model)
  jax.tree.map(np.testing.assert_array_equal, found.params, params_of(model))
  assert found.step == 7
  assert found.info.architecture == model.name
  assert logits(found.model, found.params, jnp.array([[1, 2]])).shape == (1, 2, TOKENIZER.vocab_size)


def test_its_tokens_are_read(model, tmp_path):
  info = checkpoint.CheckpointInfo(model.config, OwnTask('letters'), CONFIG, model.name)
  trained = advance(model)[0].params
  checkpoint.save_params(tmp_path / 'reference', params_of(model), info, 1)
  for step, params in ((1, params_of(model)), (2, trained)):
    checkpoint.save_params(tmp_path / 'checkpoints', params, info, step)
  tokens = read_tokens(tmp_path, task=letter_task(), num_problems=6, model=model)
  problems = jnp.array([TOKENIZER.encode(text)[-1] for text in tokens['problem']])
  prompt = jnp.stack([jnp.zeros_like(problems), problems], 1)
  for prefix, params in (('', trained), ('ref_', params_of(model))):
    said = jax.nn.log_softmax(logits(model, params, prompt, prompt > 0)[:, -1])
    first = jnp.take_along_axis(said, tokens['token'][:, :1], 1)[:, 0]
    np.testing.assert_allclose(tokens[f'{prefix}log_prob'][:, 0], first, atol=1e-5)
    np.testing.assert_allclose(tokens[f'{prefix}entropy'][:, 0], -jnp.sum(jnp.exp(said) * said, -1), atol=1e-5)
  assert tokens['critical/oracle'][:, 0].all()
  steps = read_steps(tmp_path, task=letter_task(), num_problems=6, model=model)
  assert steps['step'].tolist() == [0, 1, 2]
  assert steps['critical_kl'][1] == pytest.approx(0, abs=1e-6)
  assert steps['critical_kl'][2] > 0
  drift = parameter_drift(params_of(model), trained, model.layer_of)
  assert {row['layer'] for row in drift} == set(params_of(model))
  assert max(row['distance'] for row in drift) > 0


def test_a_reference_of_another_model_is_refused(model):
  other = next(other for other in MODELS.values() if other is not model)
  with pytest.raises(ValueError, match=r'ref_params: .* has shape none, expected|has shape .*, expected none'):
    init_finetuning(model, CONFIG, params_of(other))


def test_a_model_without_a_cache_does_not_sample():
  deaf = dataclasses.replace(plain_model(), init_cache=None)
  with pytest.raises(ValueError, match="'elman' needs init_cache, rewind and grow"):
    make_train_step(deaf, letter_task(), CONFIG)(
        init_finetuning(deaf, CONFIG, params_of(plain_model())), jax.random.key(0), Hyperparameters.of(CONFIG))
