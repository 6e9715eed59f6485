import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.analysis import evaluation
from critkl_jax.analysis.intervals import share_interval
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime.checkpoint import load_checkpoint
from critkl_jax.tasks.addition import Addition, by_digits_and_distribution, draw_problems, plus_task


@pytest.mark.parametrize(('distribution', 'digits', 'longest', 'shortest'), [
    ('identical', 4, {4}, {4}), ('varying', 3, {3}, {1, 2, 3}), ('plus', 5, {5}, {1, 2, 3, 4, 5}),
    ('plus', 3, {3}, {1, 2, 3})])
def test_drawn_problems(distribution, digits, longest, shortest):
  problems = draw_problems(jax.random.key(0), 200, distribution, digits, 3, 5)
  lengths = np.asarray(problems.lengths)
  assert problems.digits.shape == (200, 2, 5)
  assert set(lengths.max(1)) == longest
  assert set(lengths.min(1)) == shortest


def test_answer_all_gives_each_problem_its_own_reward():
  problems = draw_problems(jax.random.key(0), 23, 'varying', 3, 3, 3)
  calls = []

  def answer(params, batch, key):
    del params, key
    calls.append(batch.lengths.shape)
    return None, batch.digits[:, 0, 0].astype(jnp.float32)

  rewards = evaluation.answer_all(answer, None, problems, jax.random.key(0), batch_size=10)
  np.testing.assert_array_equal(rewards, problems.digits[:, 0, 0])
  assert set(calls) == {(10, 2)}


def test_bootstrap_interval():
  samples = np.array([0.0] * 80 + [1.0] * 20)
  low, high = evaluation.bootstrap_interval(samples)
  assert abs(low - (0.2 - 1.96 * 0.04)) < 0.02
  assert abs(high - (0.2 + 1.96 * 0.04)) < 0.02
  assert evaluation.bootstrap_interval(np.ones(50)) == (1.0, 1.0)


def test_accuracy_interval():
  for right, number in ((0, 4), (4, 4), (3, 8), (97, 200)):
    low, high = evaluation.accuracy_interval(right / number, number)
    np.testing.assert_allclose((low, high), share_interval(right, number)[1:])
    assert 0 <= low <= right / number <= high <= 1
  assert evaluation.accuracy_interval(1.0, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
  assert evaluation.accuracy_interval(0.0, 4)[1] > 0.6  # four wrong answers give a wide interval


def test_what_cannot_be_tested_is_refused_before_anything_is():
  with pytest.raises(ValueError, match=r'digits: 9 need a context of \d+, and the model has 384'):
    next(by_digits_and_distribution(Addition(1), [1, 9], ['plus'], 2, 384))
  with pytest.raises(ValueError, match='digits: expected 1 or more, got 0'):
    next(by_digits_and_distribution(Addition(1), [0], ['plus'], 2, 384))
  with pytest.raises(ValueError, match='distribution: expected one of'):
    next(by_digits_and_distribution(Addition(1), [1], ['equal'], 2, 384))


def test_errors():
  with pytest.raises(ValueError, match='distribution'):
    draw_problems(jax.random.key(0), 2, 'equal', 3, 3, 3)
  with pytest.raises(ValueError, match=r'num_digits: expected 1\.\.3, got 4'):
    draw_problems(jax.random.key(0), 2, 'plus', 4, 3, 3)


def test_statistics_of_solutions_under_a_uniform_model():
  task = plus_task(2, 1)
  model = gpt2(GPT2Config(context_length=512, num_layers=1, num_heads=1, width=8))
  params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
  problems = draw_problems(jax.random.key(0), 4, 'plus', 3, 2, 3)
  found = evaluation.solution_statistics(evaluation.make_reader(model, task), params, problems, batch_size=3)
  for place in ('critical', 'other'):
    np.testing.assert_allclose(found[f'{place}_probability'], 1 / 41, rtol=1e-5)
    np.testing.assert_allclose(found[f'{place}_certainty'], 0, atol=1e-6)


@pytest.fixture(scope='module')
def shipped():
  loaded = load_checkpoint()
  return gpt2(loaded.info.model), loaded.params, loaded.info.task.known_digits


@pytest.mark.slow
def test_the_shipped_reference_knows_what_it_was_taught(shipped):
  model, params, known = shipped
  sets = by_digits_and_distribution(Addition(known), [known], ['varying'], 20, model.config.context_length)
  table = evaluation.accuracy_table(model, params, sets)
  assert table[0]['accuracy'] >= 0.9
  assert table[0]['low'] <= table[0]['accuracy'] <= table[0]['high']


@pytest.mark.slow
def test_the_shipped_reference_is_less_certain_at_critical_tokens(shipped):
  model, params, known = shipped
  problems = draw_problems(jax.random.key(0), 30, 'plus', known + 1, known, known + 1)
  found = evaluation.solution_statistics(evaluation.make_reader(model, plus_task(known, 1)), params, problems)
  assert 1 - found['critical_certainty'] > 5 * (1 - found['other_certainty']) > 0
  assert 1 - found['critical_probability'] > 5 * (1 - found['other_probability'])
  assert found['other_probability'] > 0.9
