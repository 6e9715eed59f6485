import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_except

from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.tasks.addition import Addition, curriculum, pretraining_task, prompt_length, solution_length
from critkl_jax.training.presets import PRETRAIN_PRESETS
from critkl_jax.training.pretrain_step import (
  init_pretraining,
  make_pretrain_step,
  pretraining_keys,
  pretraining_optimizer,
)

pytestmark = pytest.mark.usefixtures('standard_promotion')
CONFIG = dataclasses.replace(
    PRETRAIN_PRESETS['smoke'], num_steps=60, learning_rate=1e-2, warmup_steps=5,
    model=GPT2Config(context_length=160, num_layers=1, num_heads=2, width=32))


def train(config, steps):
  model, task = gpt2(config.model), pretraining_task(config.addition.known_digits, 1)
  step = jax.jit(make_pretrain_step(model, task, config))
  state, history = init_pretraining(model, config), []
  for _ in range(steps):
    state, metrics = step(state, pretraining_keys(config)[1])
    history.append(metrics)
  return state, history


@pytest.mark.parametrize('optimizer', slow_except(('muon',), ('muon', 'adamw')))
def test_learns(optimizer):
  _, history = train(dataclasses.replace(CONFIG, optimizer=optimizer), 60)
  assert abs(history[0]['loss'] - np.log(41)) < 0.2
  assert history[-1]['loss'] < 0.7 * history[0]['loss']
  assert history[-1]['accuracy'] > 0.4


def test_the_state_before_the_first_step_can_be_asked_for_its_shapes_alone():
  model = gpt2(CONFIG.model)
  shapes = jax.eval_shape(lambda: init_pretraining(model, CONFIG))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, init_pretraining(model, CONFIG))


def test_every_position_is_trained():
  state, _ = train(dataclasses.replace(CONFIG, optimizer='adamw'), 40)
  start = init_pretraining(gpt2(CONFIG.model), CONFIG).params['wpe']['embedding']
  moved = jnp.any(state.params['wpe']['embedding'] != start, axis=1)
  assert moved[:-1].all()  # nothing is predicted from the last one


def test_is_a_function_of_the_seed():
  one, two, other = (train(dataclasses.replace(CONFIG, seed=seed), 3)[1][-1]['loss'] for seed in (1, 1, 2))
  assert one == two != other


def leaves_of(fn, params):
  """Returns the paths of the arrays for which `fn` holds."""
  return {jax.tree_util.keystr(path, simple=True, separator='/')
          for path, x in jax.tree_util.tree_leaves_with_path(params) if fn(x)}


HIDDEN = {f'h_0/{name}/kernel' for name in ('attn/c_attn', 'attn/c_proj', 'mlp/c_fc', 'mlp/c_proj')}


def first_updates(grads, params, **values):
  config = dataclasses.replace(CONFIG, warmup_steps=0, max_grad_norm=1e9, **values)
  optimizer = pretraining_optimizer(gpt2(CONFIG.model), config)
  return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.fixture(scope='module')
def params():
  params = gpt2(CONFIG.model).init(jax.random.key(0))
  return jax.tree.map(lambda x: x + 0.1, params)  # nothing is 0, and all that decays is seen to


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_weight_decay_moves_the_kernels_of_the_blocks_alone(params, optimizer):
  grads = jax.tree.map(jnp.zeros_like, params)
  moved, all_moved = (leaves_of(jnp.any, first_updates(grads, params, optimizer=optimizer, weight_decay=0.1,
                                                       hidden_only=hidden_only)) for hidden_only in (True, False))
  assert moved == HIDDEN
  if optimizer == 'adamw':
    assert all_moved == leaves_of(lambda _: True, params)
  else:
    assert all_moved == leaves_of(lambda x: x.ndim == 2, params)


def test_muon_takes_the_kernels_of_the_blocks_alone(params):
  grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)

  def of_adam(x):  # whose first update is as large at every element, up to the gradient's sign
    return jnp.std(jnp.abs(x)) < 1e-3 * jnp.mean(jnp.abs(x)) + 1e-12

  by_muon, matrices = (leaves_of(lambda x: not of_adam(x), first_updates(grads, params, hidden_only=hidden_only))
                       for hidden_only in (True, False))
  assert by_muon == HIDDEN
  assert matrices >= HIDDEN | {'wte/embedding', 'wpe/embedding'}


def test_the_shipped_reference_was_trained_as_its_preset_trains():
  config = checkpoint.read_info(checkpoint.latest(checkpoint.SHIPPED_REFERENCE)).training
  assert not config.hidden_only
  assert dataclasses.replace(config, max_skipped=3) == PRETRAIN_PRESETS['tiny']
  assert PRETRAIN_PRESETS['paper'].hidden_only


def test_longest_operands_follow_the_uniform_lengths():
  tasks, pick = curriculum(Addition(known_digits=3))
  drawn = np.array([pick(0, step) for step in range(3000)])
  np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 3000, np.array([1, 3, 5]) / 9, atol=0.03)
  assert pick(0, 7) == pick(0, 7)
  assert [task.prompt_length for task in tasks] == [prompt_length(n) for n in (1, 2, 3)]


def test_a_context_too_short_is_refused():
  model = gpt2(GPT2Config(context_length=100, num_layers=1, num_heads=1, width=8))
  needed = prompt_length(1) + solution_length(1)
  with pytest.raises(ValueError, match=f'context_length: expected {needed} or more'):
    make_pretrain_step(model, pretraining_task(1, 1), CONFIG)
