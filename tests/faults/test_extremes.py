"""Extreme settings that are allowed give finite metrics; others are refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.records import Batch
from critkl_jax.rl.advantages import gae, group_relative, leave_one_out, whiten
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.rl.losses import Coefficients, ppo_loss
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.tokenizers import CharTokenizer
from critkl_jax.training import finite
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
from critkl_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
CONFIG = FinetuneConfig(episodes=8, minibatches=2)
SETTINGS = {
    'nothing extreme': {},
    'exponent': {'certainty_exponent': 10000.0},
    'cold': {'temperature': 0.01},
    'hot': {'temperature': 100.0},
    'cold certainty': {'certainty_temperature': 0.01},
    'hot certainty': {'certainty_temperature': 100.0},
    'coefficient': {'kl_coefficient': 1000.0},
    'entropy': {'entropy_coefficient': 1000.0},
    'intercept': {'certainty_intercept': -1000.0},
    'no clipping': {'clip_ratio': 1e6},
}


# The loss.


@functools.cache
def loss_of(estimator, shape):
  """Returns `(logits, ref_logits, numbers) -> ((loss, metrics), gradient)`, compiled once for all numbers."""
  ones = jnp.ones(shape[:2])
  actions = jax.random.randint(jax.random.key(0), shape[:2], 0, shape[2])
  batch = Batch(actions=actions, mask=ones > 0, log_probs=-ones, values=ones, advantages=ones, returns=ones)

  def loss(logits, ref_logits, numbers):
    return ppo_loss(logits, 0 * ones, ref_logits, batch, LossConfig(kl_estimator=estimator), numbers)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('estimator', ['exact', 'k1', 'k2', 'k3'])
@pytest.mark.parametrize('name', SETTINGS)
def test_the_loss_and_its_gradient_are_finite(name, estimator):
  numbers = jax.tree.map(jnp.float32, Coefficients.of(config_lib.replace(LossConfig(), **SETTINGS[name])))
  logits, ref_logits = (5 * jax.random.normal(jax.random.key(seed), (2, 3, 7)) for seed in (1, 2))
  sure = jnp.full((2, 3, 7), -80.0).at[..., 0].set(80.0)
  for own, other in ((logits, ref_logits), (logits, logits), (sure, -sure), (sure, sure), (0 * sure, sure)):
    assert not finite.not_finite_in(loss_of(estimator, (2, 3, 7))(own, other, numbers))


def test_a_vocabulary_of_one_token():
  ones, numbers = jnp.ones((2, 3, 1)), jax.tree.map(jnp.float32, Coefficients.of(LossConfig()))
  (loss, metrics), grads = loss_of('k2', ones.shape)(ones, ones, numbers)
  assert not finite.not_finite_in((loss, metrics, grads))
  assert metrics['kl'] == metrics['entropy'] == 0


# Advantages.


@pytest.mark.parametrize('value', [0.0, 1.0, -3.0])
def test_returns_that_are_all_equal_give_no_advantage(value):
  returns = jnp.full(8, value)
  for estimate in (group_relative, leave_one_out):
    np.testing.assert_array_equal(estimate(returns, 4), 0.0)
  np.testing.assert_array_equal(whiten(returns, returns == value), 0.0)


def test_no_token_at_all():
  none = jnp.zeros((2, 3), bool)
  np.testing.assert_array_equal(gae(jnp.ones((2, 3)), jnp.ones((2, 3)), none), 0.0)
  np.testing.assert_array_equal(whiten(jnp.ones((2, 3)), none), 0.0)


# The step.


def letters_in(length):
  """The letter task, its responses cut at `length` tokens."""
  task = letter_task()
  cut = lambda x: x[:length]

  def solution(problem):
    return jax.tree.map(cut, task.solution(problem))

  return dataclasses.replace(task, response_length=length, solution=solution)


def constant(task, reward):
  return dataclasses.replace(task, reward=lambda *_: jnp.float32(reward))


def endless(task):
  """A task whose responses never end."""
  return dataclasses.replace(task, stop=stop_after([[99]]))


def one_token():
  """A task of a single token, which is all that can be said."""
  task = letter_task()
  return Task(**vars(task) | {
      'tokenizer': CharTokenizer('%'),
      'prompt': lambda _: jax.tree.map(lambda x: 0 * x, task.prompt(jnp.int32(1))).replace(mask=jnp.ones(2, bool)),
      'solution': lambda _: jax.tree.map(jnp.zeros_like, task.solution(jnp.int32(1))).replace(mask=jnp.ones(4, bool)),
      'stop': stop_after([[99]])})


STEPS = {
    'learning rate': (letter_task, {'learning_rate': 10.0}),
    'temperature': (letter_task, {'temperature': 0.01}),
    'hot': (letter_task, {'temperature': 100.0}),
    'coefficient': (letter_task, {'kl_coefficient': 1000.0, 'learning_rate': 0.1}),
    'exponent': (letter_task, {'certainty_exponent': 10000.0}),
    'equal rewards': (lambda: constant(letter_task(), 1.0), {}),
    'equal rewards, gae': (lambda: constant(letter_task(), 1.0), {'advantage': 'gae', 'whiten_advantages': True}),
    'one token a response': (lambda: letters_in(1), {}),
    'one token a response, gae': (lambda: letters_in(1), {'advantage': 'gae', 'whiten_advantages': True}),
    'one episode an update': (letter_task, {'episodes': 2, 'minibatches': 2}),
    'one episode, gae': (letter_task, {'episodes': 1, 'minibatches': 1, 'advantage': 'gae', 'whiten_advantages': True}),
    'all cut': (lambda: endless(letter_task()), {}),
    'all cut, gae': (lambda: endless(letter_task()), {'advantage': 'gae', 'bootstrap_truncated': True}),
    'one token in the vocabulary': (one_token, {}),
    'penalty in the reward': (letter_task, {'kl_placement': 'reward', 'kl_coefficient': 1000.0}),
}


@pytest.mark.parametrize('name', slow_except(('all cut, gae',), STEPS))
def test_steps_with_extreme_settings_have_finite_metrics(name):
  make_task, values = STEPS[name]
  task, config = make_task(), config_lib.replace(CONFIG, **values)
  vocab_size = 1 if make_task is one_token else TOKENIZER.vocab_size
  model = gpt2(GPT2Config(vocab_size=vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))
  state = init_finetuning(model, config, model.init(jax.random.key(0)))
  step, numbers = make_train_step(model, task, config), Hyperparameters.of(config)
  for _ in range(3):
    state, metrics = step(state, jax.random.key(1), numbers)
    wanted = {key for key, value in metrics.items() if not np.isfinite(value)}
    assert wanted <= {'critical_right', 'kl_critical', 'weight_critical'}  # without critical tokens there is none
    assert metrics['skipped_updates'] == 0
  assert not finite.not_finite_in((state.params, state.opt_state))
  assert metrics['truncated'] == 1 or 'cut' not in name
  assert metrics['max_response_length'] <= task.response_length


@pytest.mark.parametrize(('values', 'words'), [
    ({'episodes': 1, 'minibatches': 1}, 'advantage: .*episodes'),
    ({'episodes_per_problem': 1, 'episodes': 1, 'minibatches': 1, 'advantage': 'leave_one_out'}, 'advantage'),
    ({'temperature': 0.0}, 'temperature'),
    ({'bootstrap_truncated': True}, "bootstrap_truncated: has no effect with advantage='group_relative'"),
])
def test_what_cannot_be_is_refused_by_name(values, words):
  with pytest.raises(ValueError, match=words):
    config_lib.replace(CONFIG, **values)
