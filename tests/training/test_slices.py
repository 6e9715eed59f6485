import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax import config as config_lib
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.records import Experience, Rollout
from critkl_jax.tasks.addition import plus_task
from critkl_jax.training import initial_state, slices, train_step
from critkl_jax.training.config import FinetuneConfig


def test_sizes_divide_and_keep_within_the_tokens():
  assert slices.pick_size(32, 573) == 2
  assert slices.pick_size(32, 512) == 4
  assert slices.pick_size(6, 512) == 3
  assert slices.pick_size(7, 300) == 1
  assert slices.pick_size(4, 10) == 4
  assert slices.pick_size(5, 10_000) == 1


def test_accelerators_take_all(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert slices.pick_size(32, 573) == 32


def test_means_are_those_over_all_tokens():
  mask = jax.random.bernoulli(jax.random.key(0), 0.4, (6, 9)).at[2].set(False).at[3].set(False)
  values = jax.random.normal(jax.random.key(1), (6, 9))

  def mean(part):
    values, mask = part
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return {'mean': total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)}

  for size in (1, 2, 3, 6):
    found = slices.weighted_mean(mean, (values, mask), jnp.sum(mask, 1, dtype=jnp.float32), size)['mean']
    np.testing.assert_allclose(found, values[mask].mean(), rtol=1e-6)


def test_the_shortest_sufficient_length_is_taken():
  taken = jax.jit(lambda mask: slices.at_length(lambda n: jnp.int32(n), (2, 5, 9), mask))
  for longest, length in ((0, 2), (2, 2), (3, 5), (5, 5), (6, 9), (9, 9)):
    mask = jnp.arange(9)[None] < jnp.array([1, longest])[:, None]
    assert taken(mask) == length
  both = jax.vmap(taken)(jnp.stack([jnp.arange(9)[None] < 1, jnp.arange(9)[None] < 4]))
  np.testing.assert_array_equal(both, [5, 5])  # members share a length, so that only one is executed


def test_an_episode_with_a_hole_is_as_long_as_it_reaches():
  taken = jax.jit(lambda mask: slices.at_length(lambda n: jnp.int32(n), (2, 5, 9), mask))
  assert taken(jnp.array([[True, False, False, False, True, False, False, False, False]])) == 5
  np.testing.assert_array_equal(slices.by_length(jnp.array([[True, True, False], [True, False, True]])), [0, 1])
  np.testing.assert_array_equal(slices.by_length(jnp.array([[True, False, True], [True, True, False]])), [1, 0])


def test_under_vmap_one_branch_alone_is_executed():
  fn = jax.vmap(lambda mask: slices.at_length(lambda n: jnp.sum(mask[:, :n]), (2, 9), mask))
  jaxpr = str(jax.make_jaxpr(fn)(jnp.ones((3, 1, 9), bool)))
  assert 'cond[' in jaxpr
  assert 'select_n' not in jaxpr


def test_cut_keeps_prompts():
  ones = jnp.ones((2, 7))
  rollout = slices.cut(Rollout(prompt=ones, prompt_mask=ones, actions=ones, mask=ones, log_probs=ones, values=ones), 3)
  assert rollout.prompt.shape == rollout.prompt_mask.shape == (2, 7)
  assert rollout.actions.shape == rollout.mask.shape == rollout.log_probs.shape == rollout.values.shape == (2, 3)


@pytest.fixture(scope='module')
def iteration():
  """A rollout of right solutions and junk of full length, all of which the update has to see."""
  task, config = plus_task(1, 0), FinetuneConfig(episodes=8, minibatches=2, learning_rate=1e-3)
  model = gpt2(config.model_of(GPT2Config(context_length=384, num_layers=2, num_heads=2, width=16)))
  params = model.init(jax.random.key(0))
  state = initial_state.init_finetuning(model, config, params)
  state = state.replace(params=jax.tree.map(lambda x: 1.05 * x, state.params))
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(1), 8))
  prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
  actions, mask = solution.tokens.at[0].set(5), solution.mask.at[0].set(True)
  blank = jnp.where(mask, -1.0, 0.0)
  rollout = Rollout(prompt=prompt.tokens, prompt_mask=prompt.mask, actions=actions, mask=mask, log_probs=blank,
                    values=0 * blank)
  rewards = jnp.arange(8, dtype=jnp.float32)
  return model, task, config, state, rollout, rewards


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.slow
@pytest.mark.parametrize('aggregation', ['tokens', 'sequences', 'fixed_length'])
def test_slices_and_lengths_change_nothing(iteration, monkeypatch, aggregation):
  model, task, config, state, rollout, rewards = iteration
  config = config_lib.replace(config, aggregation=aggregation)
  numbers = initial_state.Hyperparameters.of(config)
  setup = train_step.Setup.of(model, task, config)
  assert setup.lengths == (task.solution_length,)
  assert rollout.mask.sum(1).max() == task.response_length > task.solution_length >= rollout.mask.sum(1)[1:].max()
  results = []
  usual = task.solution_length
  for size, lengths in ((4, ()), (1, (usual,)), (2, (usual, usual + 50))):
    monkeypatch.setattr(slices, 'pick_size', lambda *_, size=size: size)
    own = dataclasses.replace(setup, lengths=lengths)
    ref_output = train_step.reference_pass(own, state.ref_params, rollout)
    ref_output = jnp.where(rollout.mask[..., None], ref_output, 0.0)
    batch = train_step.make_batch(own, state, rollout, rewards, ref_output, numbers)
    new, metrics = train_step.update(own, state, Experience(rollout, ref_output, batch), jax.random.key(2), numbers)
    if aggregation != 'tokens':  # means over tokens are then averaged over microbatches by episodes
      metrics = {name: metrics[name] for name in ('loss', 'policy_loss', 'kl_penalty', 'grad_norm')}
    metrics = {name: x for name, x in metrics.items() if '_q' not in name}  # quantiles too
    results.append((ref_output, new.params, metrics))
  for found in results[1:]:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, results[0])
