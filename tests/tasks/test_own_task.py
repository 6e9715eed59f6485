"""A minimal task: a prompt and a graded reward on the device, and no right solution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task

from critkl_jax import config as config_lib
from critkl_jax.analysis import charts, comparison, detectors, evaluation, page, reading, summary
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.records import Solution
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.checkpoint import CheckpointError, CheckpointInfo
from critkl_jax.sampling.generation import respond
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.known_tasks import KNOWN_TASKS, OwnTask, from_json_object, to_json_object
from critkl_jax.tasks.questions.config import Questions
from critkl_jax.tasks.stories.config import Stories
from critkl_jax.tasks.task import Task, check_vocabulary, knows_critical_tokens, successes
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
from critkl_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
MODEL = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))
CONFIG = FinetuneConfig(episodes=32, minibatches=2, learning_rate=5e-3, rollout='cached')


def reward(problem, actions, mask):
  """Gives 2 for the letter of the prompt, 0.5 for another letter, -3 otherwise: graded, and not 1 for success."""
  letter = mask[0] & (actions[0] > 0) & (actions[0] < TOKENIZER.vocab_size - 1)
  return jnp.where(letter, jnp.where(actions[0] == problem, 2.0, 0.5), -3.0).astype(jnp.float32)


def own_task(**changes):
  letters = letter_task()
  kept = {name: getattr(letters, name) for name in (
      'tokenizer', 'prompt_length', 'response_length', 'stop', 'sample', 'prompt')}
  return Task(**kept, reward=reward, success=2.0, **changes)


@pytest.fixture(scope='module')
def trained():
  """Runs a few iterations and returns the parameters before and after, and the metrics."""
  params, rows = MODEL.init(jax.random.key(0)), []
  with jax.numpy_dtype_promotion('standard'):  # for Optax
    state, step = init_finetuning(MODEL, CONFIG, params), make_train_step(MODEL, own_task(), CONFIG)
    for _ in range(8):
      state, metrics = step(state, jax.random.key(1), Hyperparameters.of(CONFIG))
      rows.append(jax.device_get(metrics))
  return params, state.params, rows


def test_it_trains_on_its_rewards_as_they_are(trained):
  *_, rows = trained
  rewards, accuracies = ([float(row[name]) for row in rows] for name in ('reward', 'accuracy'))
  assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.5
  assert all(0 <= share <= 1 for share in accuracies)
  assert all(-3 <= mean <= 0.5 + 1.5 * share + 1e-6 for mean, share in zip(rewards, accuracies))
  assert not [name for name in rows[0] if 'critical' in name or name == 'format_errors']
  assert all(np.isfinite(value) for row in rows for value in row.values())


@pytest.mark.slow
def test_the_first_metrics_are_those_of_the_rollout(trained):
  params, _, rows = trained
  task = own_task()
  rollout_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))
  problem_key, sample_key = jax.random.split(rollout_key)
  problems = jax.vmap(task.sample)(jax.random.split(problem_key, CONFIG.episodes))
  rollout = respond(MODEL, params, task, problems, sample_key, method='cached', temperature=1.0)
  rewards = jax.vmap(reward)(problems, rollout.actions, rollout.mask)
  assert rows[0]['reward'] == pytest.approx(float(rewards.mean()), abs=1e-6)
  assert rows[0]['accuracy'] == pytest.approx(float((rewards == 2).mean()), abs=1e-6)


@pytest.mark.slow
def test_a_population_trains_on_it(trained):
  params, *_ = trained
  configs = population.product(CONFIG, kl_coefficient=[CONFIG.loss.kl_coefficient, 0.0])
  mesh = population.members_mesh(1)
  state = population.init_population(MODEL, configs, params, mesh)
  step = population.make_population_step(MODEL, own_task(), configs, mesh)
  _, metrics = step(state, *population.numbers_of(configs, mesh))
  assert metrics['reward'].shape == (2,)
  assert 'critical_right' not in metrics


def test_success_is_what_the_task_says():
  task = dataclasses.replace(own_task(), success=0.5)
  np.testing.assert_array_equal(successes(task, np.array([2.0, 0.5, 0.49, -3.0], np.float32)), [1, 1, 0, 0])
  np.testing.assert_array_equal(successes(letter_task(), np.array([1.0, 0.0, -1.0], np.float32)), [1, 0, 0])


def test_what_it_does_not_know_is_refused_by_name():
  task = own_task()
  with pytest.raises(ValueError, match=r"kl_gate: 'oracle' needs critical tokens"):
    make_train_step(MODEL, task, config_lib.replace(CONFIG, kl_gate='oracle'))
  with pytest.raises(ValueError, match='oracle needs right solutions'):
    detectors.oracle(task)
  larger = gpt2(dataclasses.replace(MODEL.config, vocab_size=11))
  for make in (lambda: make_train_step(larger, task, CONFIG), lambda: evaluation.make_answer(larger, task)):
    with pytest.raises(ValueError, match=r'the task has 6 tokens, got a model of 11; .*vocab_size=11'):
      make()
  check_vocabulary(dataclasses.replace(task, tokenizer=dataclasses.replace(TOKENIZER, vocab_size=11)), 11)


@pytest.mark.slow
def test_solutions_need_no_critical_tokens():
  known = dataclasses.replace(letter_task(), solution=lambda problem: Solution(
      tokens=letter_task().solution(problem).tokens, mask=jnp.arange(4) < 2))
  assert knows_critical_tokens(letter_task())
  assert not knows_critical_tokens(known)
  state = init_finetuning(MODEL, CONFIG, MODEL.init(jax.random.key(0)))
  _, metrics = make_train_step(MODEL, known, CONFIG)(state, jax.random.key(1), Hyperparameters.of(CONFIG))
  assert not [name for name in metrics if 'critical' in name]
  test = evaluation.make_test(MODEL, known, lambda key: {'all': jax.vmap(known.sample)(jax.random.split(key, 5))})
  result, right = test(MODEL.init(jax.random.key(0)))
  assert result['tokens']['critical_probability'] is None
  assert 0 < result['tokens']['other_probability'] < 1
  assert result['all'] == right['all'].mean()


def test_its_name_and_settings_are_saved(tmp_path, trained):
  own = OwnTask('letters', {'rewards': [2, 0.5, -3]})
  assert from_json_object(to_json_object(own)) == own
  others = {Addition(4), Stories(4), Questions(
      prompts='p.jsonl', checksum=1, tokenizer='directory', tokenizer_checksum=2, vocab_size=99)}
  assert {type(settings) for settings in others} == {known.settings for known in KNOWN_TASKS.values()}
  for settings in others:
    assert from_json_object(to_json_object(settings)) == settings
  with pytest.raises(ValueError, match='expected a name other'):
    OwnTask('addition')
  checkpoint.save_params(tmp_path, trained[1], CheckpointInfo(MODEL.config, own, CONFIG), 8)
  found = checkpoint.load_checkpoint(tmp_path)
  assert found.info.task == own
  with pytest.raises(ValueError, match=r"'letters', which is none of \('addition', 'questions', 'stories'\); give it"):
    reading.read_tokens(found, found)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, trained):
  home, info = tmp_path_factory.mktemp('own'), CheckpointInfo(MODEL.config, OwnTask('letters'), CONFIG)
  before, after, _ = trained
  checkpoint.save_params(home / 'reference', before, info, 1)
  checkpoint.save_params(home / 'checkpoints', before, info, 4)
  checkpoint.save_params(home / 'checkpoints', after, info, 8)
  return home


def test_its_tokens_are_read(workdir, tmp_path):
  task = own_task()
  found = {'counterfactual': detectors.counterfactual(MODEL, checkpoint.load_checkpoint(workdir).params, task,
                                                      jax.random.key(0), num_samples=2)}
  with pytest.raises(ValueError, match="responses: 'solution' needs right solutions"):
    reading.read_tokens(workdir, task=task, responses='solution')
  own = found | reading.standard_detectors(task)
  tokens = reading.read_tokens(workdir, task=task, num_problems=5, responses='sampled', detectors=own)
  assert set(own) == {'counterfactual', 'threshold', 'quantile'}
  assert not {'on_path', 'right', 'right_prob', 'ref_right_prob', 'critical/oracle'} & set(tokens)
  assert set(tokens['set']) == {'all'}
  np.testing.assert_array_equal(tokens['success'], tokens['reward'] >= 2)
  assert (tokens['kl'][tokens['mask']] >= 0).all()
  summarized = summary.summarize(tokens)
  assert summarized['accuracy']['all']['num_problems'] == 5
  assert set(summarized['agreement']['counterfactual']) == {'threshold', 'quantile'}
  charts.plot_certainty(tokens, tmp_path / 'certainty.png', 'own')
  charts.plot_positions(tokens, tmp_path / 'positions.png', 'own')
  run = page.Run('own', 'from here', tokens, {'certainty': tmp_path / 'certainty.png'})
  page.write_page(tmp_path / 'report.html', [run], TOKENIZER, 'about')
  assert '"solutions":false' in (tmp_path / 'report.html').read_text()


@pytest.mark.slow
def test_its_steps_and_differences_are_read(workdir, tmp_path):
  task = own_task()
  steps = reading.read_steps(workdir, task=task, num_problems=6)
  assert set(steps) == {'step', 'accuracy', 'sets'}
  assert steps['accuracy'].shape == (len(steps['step']), 1)
  charts.plot_steps(steps, tmp_path / 'steps.png', 'own')
  one, two = checkpoint.load_checkpoint(workdir / 'reference'), checkpoint.load_checkpoint(workdir)
  found = comparison.compare(one, two, num_problems=6, task=task)
  assert 'kl' not in found
  assert found['answers']['all']['num_problems'] == 6
  charts.plot_comparison(found, tmp_path / 'comparison.png')


def test_checkpoints_of_two_tasks_do_not_belong_together(workdir, tmp_path, trained):
  checkpoint.save_params(tmp_path, trained[0], CheckpointInfo(MODEL.config, OwnTask('others'), CONFIG), 1)
  with pytest.raises(CheckpointError, match='task is letters, but others in the reference'):
    reading.load_pair(workdir, tmp_path)
