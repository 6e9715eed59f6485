import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_except

from critkl_jax.config import GPT2Config
from critkl_jax.gpt2 import GPT2
from critkl_jax.presets import PRETRAIN_PRESETS
from critkl_jax.pretrain_step import draw_longest, init_pretraining, make_pretrain_step, pretraining_keys
from critkl_jax.tasks.addition import pretraining_task, prompt_length, solution_length

pytestmark = pytest.mark.usefixtures('standard_promotion')
CONFIG = dataclasses.replace(
    PRETRAIN_PRESETS['smoke'], num_steps=60, learning_rate=1e-2, warmup_steps=5,
    model=GPT2Config(context_length=160, num_layers=1, num_heads=2, width=32))


def train(config, steps):
  model, task = GPT2(config.model), pretraining_task(config.known_digits, 1)
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
  model = GPT2(CONFIG.model)
  shapes = jax.eval_shape(lambda: init_pretraining(model, CONFIG))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, init_pretraining(model, CONFIG))


def test_every_position_is_trained():
  state, _ = train(dataclasses.replace(CONFIG, optimizer='adamw'), 40)
  start = init_pretraining(GPT2(CONFIG.model), CONFIG).params['wpe']['embedding']
  moved = jnp.any(state.params['wpe']['embedding'] != start, axis=1)
  assert moved[:-1].all()  # nothing is predicted from the last one


def test_is_a_function_of_the_seed():
  one, two, other = (train(dataclasses.replace(CONFIG, seed=seed), 3)[1][-1]['loss'] for seed in (1, 1, 2))
  assert one == two != other


def test_longest_operands_follow_the_uniform_lengths():
  config = dataclasses.replace(CONFIG, known_digits=3)
  drawn = np.array([draw_longest(config, step) for step in range(3000)])
  np.testing.assert_allclose(np.bincount(drawn, minlength=4)[1:] / 3000, np.array([1, 3, 5]) / 9, atol=0.03)
  assert draw_longest(config, 7) == draw_longest(config, 7)


def test_a_context_too_short_is_refused():
  model = GPT2(GPT2Config(context_length=100, num_layers=1, num_heads=1, width=8))
  needed = prompt_length(1) + solution_length(1)
  with pytest.raises(ValueError, match=f'context_length: expected {needed} or more'):
    make_pretrain_step(model, pretraining_task(1, 1), CONFIG)
