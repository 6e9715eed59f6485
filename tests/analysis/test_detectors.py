import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task

from critkl_jax.analysis.detectors import counterfactual, detect_all, low_certainty, oracle, read_logits
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.records import Rollout
from critkl_jax.sampling.generation import respond, respond_from
from critkl_jax.sampling.scoring import as_rollout
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import on_path, stop_after

V = TOKENIZER.vocab_size
MODEL = gpt2(GPT2Config(vocab_size=V, context_length=8, num_layers=1, num_heads=2, width=16))


@pytest.fixture(scope='module')
def params():
  return MODEL.init(jax.random.key(0))


def rollout_of(actions, mask):
  actions = jnp.asarray(actions, jnp.int32)
  mask = jnp.asarray(mask, bool)
  blank = jnp.zeros(actions.shape)
  prompt = jnp.ones((actions.shape[0], 2), jnp.int32)
  return Rollout(prompt=prompt, prompt_mask=prompt > 0, actions=actions, mask=mask, log_probs=blank, values=blank)


def solved(task, num=3, seed=0):
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(seed), num))
  return problems, as_rollout(jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems))


def test_the_oracle_marks_the_critical_tokens_of_right_responses():
  task = plus_task(2, 1)
  problems, rollout = solved(task)
  found = oracle(task)(problems, rollout, None)
  np.testing.assert_array_equal(found.critical, jax.vmap(task.solution)(problems).critical)
  assert found.critical.any(1).all()
  np.testing.assert_array_equal(found.weight, rollout.mask)


def test_the_oracle_looks_no_further_than_the_first_error():
  task = plus_task(2, 1)
  problems, rollout = solved(task)
  solution = jax.vmap(task.solution)(problems)
  place = jnp.argmax(solution.critical, 1)  # a wrong token at a critical position is still critical
  wrong = rollout.replace(actions=rollout.actions.at[jnp.arange(3), place].add(1))
  here = on_path(task, problems, wrong)
  np.testing.assert_array_equal(here, jnp.arange(here.shape[1])[None] <= place[:, None])
  found = oracle(task)(problems, wrong, None)
  np.testing.assert_array_equal(found.critical.sum(1), 1)
  assert found.critical[jnp.arange(3), place].all()
  np.testing.assert_array_equal(found.weight, here)


def test_low_certainty():
  flat, sure = jnp.zeros(V), jnp.zeros(V).at[2].set(30.0)
  between = jnp.zeros(V).at[2].set(2.0)
  logits = jnp.stack([jnp.stack([sure, between, flat, flat]), jnp.stack([between, sure, sure, flat])])
  rollout = rollout_of(jnp.ones((2, 4)), [[1, 1, 1, 0], [1, 1, 1, 0]])
  found = low_certainty(threshold=0.9)(None, rollout, logits)
  np.testing.assert_array_equal(found.critical, [[0, 1, 1, 0], [1, 0, 0, 0]])
  np.testing.assert_array_equal(found.weight, rollout.mask)
  np.testing.assert_allclose(found.score[0], [0, found.score[1, 0], 1, 0], atol=1e-5)
  by_quantile = low_certainty(quantile=0.34)(None, rollout, logits)  # one of three
  np.testing.assert_array_equal(by_quantile.critical, [[0, 0, 1, 0], [1, 0, 0, 0]])
  several = jax.random.normal(jax.random.key(0), (3, 100, V))
  long = rollout_of(jnp.ones((3, 100)), jnp.arange(100)[None] < jnp.array([[100], [50], [4]]))
  for quantile, numbers in ((0.02, [2, 1, 0]), (0.5, [50, 25, 2]), (1.0, [100, 50, 4]), (0.0, [0, 0, 0])):
    found = low_certainty(quantile=quantile)(None, long, several)
    np.testing.assert_array_equal(found.critical.sum(1), numbers)
  for wrong in ({}, {'threshold': 0.5, 'quantile': 0.5}, {'quantile': 1.5}):
    with pytest.raises(ValueError, match='threshold, quantile'):
      low_certainty(**wrong)


def test_counterfactuals_find_the_token_that_decides(params):
  """The reward depends on the first token alone: with all alternatives, success probabilities are known exactly."""
  task = letter_task()
  problems = jnp.array([1, 2, 3])
  right_then_wrong = rollout_of([[1, 1, 5, 0], [2, 5, 0, 0], [1, 2, 2, 2]], [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
  logits = read_logits(MODEL, params, right_then_wrong)
  detector = counterfactual(
      MODEL, params, task, jax.random.key(0), num_alternatives=V - 1, num_samples=2, batch_size=16)
  found = detector(problems, right_then_wrong, logits)
  np.testing.assert_array_equal(found.weight, right_then_wrong.mask)
  assert not found.score[:, 1:].any()
  np.testing.assert_allclose(found.score[:2, 0], 1.0, atol=1e-6)
  others = jax.nn.softmax(logits[2, 0].at[1].set(-jnp.inf))
  np.testing.assert_allclose(found.score[2, 0], others[3], atol=1e-5)
  np.testing.assert_array_equal(found.critical[:, 0], [True, True, others[3] >= 0.5])


@pytest.mark.slow
def test_counterfactuals_at_some_places_stand_for_all(params):
  task = letter_task()
  problems, rollout = jnp.array([1, 2]), rollout_of(jnp.full((2, 4), 3), [[1, 1, 1, 1], [1, 1, 1, 0]])
  logits = read_logits(MODEL, params, rollout)
  first = low_certainty(threshold=1.0)

  def always(problems, rollout, ref_logits):
    found = first(problems, rollout, ref_logits)
    return dataclasses.replace(found, critical=rollout.mask & (jnp.arange(4) == 1)[None])

  detector = counterfactual(MODEL, params, task, jax.random.key(1), num_alternatives=1, num_samples=1, num_positions=1,
                            always=always)
  found = detector(problems, rollout, logits)
  np.testing.assert_array_equal((found.weight > 0).sum(1), 2)
  np.testing.assert_allclose(found.weight[:, 1], 1.0)
  np.testing.assert_allclose(found.weight.sum(1), [4, 3])
  again = detector(problems, rollout, logits)
  jax.tree.map(np.testing.assert_array_equal, found, again)
  with pytest.raises(ValueError, match='num_samples: expected 1 or more, got 0'):
    counterfactual(MODEL, params, task, jax.random.key(0), num_samples=0)
  with pytest.raises(ValueError, match='num_alternatives: expected less than the vocabulary of 6, got 6'):
    counterfactual(MODEL, params, task, jax.random.key(0), num_alternatives=V)


@pytest.mark.slow
def test_a_token_that_changes_nothing_has_no_effect_under_common_noise():
  """Success depends on a random last token; without common noise, success rates would differ by alternative."""
  model = gpt2(dataclasses.replace(MODEL.config, num_layers=1))
  flat = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))  # uniform distributions

  def reward(problem, actions, mask):
    return (actions[3] <= 2).astype(jnp.float32)

  task = dataclasses.replace(letter_task(), stop=stop_after([[99]]), reward=reward)
  problems, rollout = jnp.ones(8, jnp.int32), rollout_of(jnp.ones((8, 4)), jnp.ones((8, 4)))
  detector = counterfactual(model, flat, task, jax.random.key(0), num_alternatives=3, num_samples=4)
  found = detector(problems, rollout, read_logits(model, flat, rollout))
  assert not found.score[:, :3].any()
  assert found.score[:, 3].any()


def test_detectors_have_one_signature(params):
  task = letter_task()
  problems, rollout = jnp.array([1, 2]), rollout_of([[1, 5, 0, 0], [2, 5, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]])
  logits = read_logits(MODEL, params, rollout)
  found = detect_all({'oracle': oracle(task), 'threshold': low_certainty(threshold=0.9), 'counterfactual':
                      counterfactual(MODEL, params, task, jax.random.key(0))}, problems, rollout, logits)
  assert list(found) == ['oracle', 'threshold', 'counterfactual']
  for one in found.values():
    assert one.score.shape == one.critical.shape == one.weight.shape == (2, 4)


@pytest.mark.parametrize('with_draft', [True, False])
@pytest.mark.slow
def test_a_response_goes_on_as_it_was(with_draft):
  """Greedy decoding resumed at any position gives the same rest; the automaton's state is restored too."""
  task = plus_task(1, 1)
  task = task if with_draft else dataclasses.replace(task, draft=None)
  model = gpt2(GPT2Config(context_length=384, num_layers=2, num_heads=2, width=16))
  params = model.init(jax.random.key(0))
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(1), 4))
  rollout = respond(model, params, task, problems, jax.random.key(2), greedy=True)
  position = jnp.array([0, 5, 100, 237])
  token = rollout.actions[jnp.arange(4), position]
  again = jax.jit(lambda *x: respond_from(model, params, task, *x, greedy=True))(
      problems, rollout, position, token, jax.random.key(3))
  np.testing.assert_array_equal(again.actions, rollout.actions)
  np.testing.assert_array_equal(again.mask, rollout.mask)

  _, right = solved(task, 4, seed=1)
  last = right.mask.sum(1) - 1  # the line break that ends the answer
  position, token = jnp.array([int(last[0]), int(last[1]), int(last[2]) - 1, 3]), jnp.full(4, right.actions[0, last[0]])
  ended = respond_from(model, params, task, problems, right, position, token, jax.random.key(3))
  np.testing.assert_array_equal(ended.mask.sum(1)[:3], position[:3] + 1)
  assert ended.mask.sum(1)[3] > 4
  np.testing.assert_array_equal(ended.actions[:2], right.actions[:2])
  np.testing.assert_array_equal(jax.vmap(task.reward)(problems, ended.actions, ended.mask)[:2], 1.0)
