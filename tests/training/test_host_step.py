"""The step with rewards in Python: what it computes, in which order it sees prompts, and what stops it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import TOKENIZER, letter_task
from model_directories import CONFIG, write_tokenizer

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.models.llama import llama
from critkl_jax.tasks.host_side import Answers, HostSide
from critkl_jax.tasks.questions import prompted_task
from critkl_jax.tasks.rewards import RewardError
from critkl_jax.tasks.text_tokenizer import TextTokenizer
from critkl_jax.training import setup
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.host_step import make_host_step
from critkl_jax.training.initial_state import Hyperparameters, init_finetuning
from critkl_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures('standard_promotion')
KEY = jax.random.key(11)
SMALL = FinetuneConfig(episodes=16, episodes_per_problem=4, minibatches=2, learning_rate=1e-2)
LETTERS = gpt2(GPT2Config(vocab_size=TOKENIZER.vocab_size, context_length=8, num_layers=1, num_heads=2, width=16))


def right(prompts, completions, **columns):
  return [float(said[:1] == asked) for asked, said in zip(prompts, completions)]


def letters_on_host(problems=(2, 2, 2, 2), functions=(right,), weights=(1.0,)):
  """The task of `letters` with problems and rewards on the host."""
  own = letter_task()

  def draw(seed, first, number):
    return np.asarray(problems, np.int32)[(first + np.arange(number)) % len(problems)]

  def read(problems, actions, mask):
    said = [own.tokenizer.decode(*one) for one in zip(actions, mask)]
    return Answers([own.tokenizer.decode([one]) for one in problems], said, {}, (1 + problems).tolist())

  names = [function.__name__ for function in functions]
  return dataclasses.replace(own, sample=None, reward=None, host=HostSide(
      draw, read, dict(zip(names, functions)), dict(zip(names, weights))))


def advance(step, state, number):
  history = []
  for _ in range(number):
    state, metrics = step(state, KEY, Hyperparameters.of(SMALL))
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def assert_same(one, two, **tolerance):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(x, y, **(tolerance or {'rtol': 0, 'atol': 0}))


@pytest.fixture(scope='module')
def reference():
  return LETTERS.init(jax.random.key(0))


def test_two_programs_compute_what_one_computes(reference, monkeypatch):
  """The same problems, noise and rewards: states and metrics are those of the step with a reward on the device."""
  monkeypatch.setattr(setup, '_PARTS', ())  # other lengths of the passes change rounding
  on_device = dataclasses.replace(letter_task(), sample=lambda key: jnp.int32(2))
  one, two = (advance(make(LETTERS, task, SMALL), init_finetuning(LETTERS, SMALL, reference), 3)
              for make, task in ((make_train_step, on_device), (make_host_step, letters_on_host())))
  assert_same(one[0].params, two[0].params, rtol=1e-5, atol=1e-6)
  for before, after in zip(one[1], two[1]):
    assert after.pop('reward/right') == pytest.approx(before['reward'])
    assert after == pytest.approx(before, rel=1e-3, abs=1e-5)


def test_it_learns_from_a_weighted_sum(reference):

  def short(completions, **columns):
    return [1.0 / len(said) for said in completions]

  config = config_lib.replace(SMALL, kl='none', episodes=64)
  task = letters_on_host((1, 2, 3, 4), (right, short), (2.0, -0.5))
  step, state, history = make_host_step(LETTERS, task, config), init_finetuning(LETTERS, config, reference), []
  for number in range(30):
    state, metrics = step(state, KEY, Hyperparameters.of(config), number)
    history.append({name: float(value) for name, value in metrics.items()})
  for row in history:
    assert row['reward'] == pytest.approx(2 * row['reward/right'] - 0.5 * row['reward/short'], rel=1e-5, abs=1e-5)
  assert history[-1]['reward/right'] > history[0]['reward/right'] + 0.3
  assert [sample['row'] for sample in step.samples] == [2, 3, 4, 5]  # a response to each of the prompts
  for sample in step.samples:
    assert sample['reward/right'] == float(sample['completion'][:1] == sample['prompt'])


@pytest.mark.parametrize('text', ['data:4', 'data:2,model:2'])
def test_a_mesh_changes_rounding_alone(reference, text):
  task, mesh = letters_on_host((1, 2, 3, 4)), sharding.make_mesh(text)
  one, two = (advance(make_host_step(LETTERS, task, SMALL, own), init_finetuning(LETTERS, SMALL, reference, own), 2)
              for own in (None, mesh))
  assert_same(one[0].params, two[0].params, rtol=1e-4, atol=1e-5)
  assert [row['reward'] for row in one[1]] == [row['reward'] for row in two[1]]


def test_a_resumed_run_sees_the_prompts_it_would_have_seen(reference):
  seen = []

  def noted(prompts, completions):
    seen.append(list(prompts))
    return right(prompts, completions)

  task = letters_on_host((1, 2, 3, 4, 1, 1, 2), (noted,))
  whole, _ = advance(make_host_step(LETTERS, task, SMALL), init_finetuning(LETTERS, SMALL, reference), 4)
  half, _ = advance(make_host_step(LETTERS, task, SMALL), init_finetuning(LETTERS, SMALL, reference), 2)
  half, _ = advance(make_host_step(LETTERS, task, SMALL), half, 2)  # another process would make a new step
  assert_same(whole.params, half.params)
  assert seen[:4] == seen[4:]
  assert seen[0] != seen[1]


def test_a_faulty_reward_leaves_the_state_as_it_was(reference):
  broken = True

  def fails(prompts, completions):
    return [float('nan') if broken and said else 0.0 for said in completions]

  step, state = make_host_step(LETTERS, letters_on_host((1, 2), (fails,)), SMALL), init_finetuning(
      LETTERS, SMALL, reference)
  before = jax.device_get(state.params)
  with pytest.raises(RewardError, match=r"fails returned nan instead of a finite number, at row 2 \(prompt: 'a'\)"):
    advance(step, state, 1)
  assert_same(before, state.params)
  broken = False
  state, _ = advance(step, state, 1)
  assert int(state.step) == 1


def test_a_step_is_made_for_its_kind_of_task():
  with pytest.raises(ValueError, match='train it with make_host_step'):
    make_train_step(LETTERS, letters_on_host(), SMALL)
  with pytest.raises(ValueError, match='train it with make_train_step'):
    make_host_step(LETTERS, letter_task(), SMALL)
  with pytest.raises(ValueError, match='missing: sample'):
    dataclasses.replace(letter_task(), sample=None)
  with pytest.raises(ValueError, match='both are given'):
    dataclasses.replace(letters_on_host(), sample=letter_task().sample)


# Texts.


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  pytest.importorskip('tokenizers')
  return TextTokenizer(write_tokenizer(tmp_path_factory.mktemp('tokenizer')), CONFIG.vocab_size)


def test_prompts_of_any_length_need_few_programs(tokenizer):
  rows = [{'prompt': 'word ' * (1 + i % 11), 'number': i} for i in range(40)]
  numbers, texts = [], []

  def reward(prompts, completions, number, completion_ids):
    numbers.append(number)
    texts.extend(zip(completions, completion_ids))
    return [float(len(text)) for text in completions]

  task = prompted_task(rows, [reward], tokenizer, response_length=6)
  model = llama(dataclasses.replace(CONFIG, context_length=task.prompt_length + 6))
  config = config_lib.replace(SMALL, episodes=8, episodes_per_problem=8, minibatches=1)
  step, state = make_host_step(model, task, config), init_finetuning(model, config, model.init(KEY))
  for number in range(40):
    state, _ = step(state, KEY, Hyperparameters.of(config), number)
  assert sorted(n for [n, *rest] in numbers) == list(range(40))  # each row once before any comes twice
  assert all(len({*some}) == 1 for some in numbers)
  assert [n for [n, *rest] in numbers] != sorted(n for [n, *rest] in numbers)
  assert step._rollout._cache_size() <= 3
  assert any('<|im_end|>' in tokenizer.decode(ids) for _, ids in texts)
  assert not any('<|im_end|>' in text for text, _ in texts)


def test_messages_come_back_as_messages(tokenizer):
  pytest.importorskip('transformers')
  seen = []

  def reward(prompts, completions):
    seen.extend(zip(prompts, completions))
    return [0.0] * len(prompts)

  messages = [{'role': 'user', 'content': 'What is 1 plus 1?'}]
  task = prompted_task([{'prompt': messages}], [reward], tokenizer, response_length=4, chat=True)
  model = llama(CONFIG)
  config = config_lib.replace(SMALL, episodes=4, minibatches=1)
  make_host_step(model, task, config)(init_finetuning(model, config, model.init(KEY)), KEY, Hyperparameters.of(config))
  assert all(prompt == messages and said[0]['role'] == 'assistant' and isinstance(said[0]['content'], str)
             for prompt, said in seen)


def test_a_task_of_prompts_is_checked(tokenizer):
  for rows, rewards, weights, message in (
      ([], [right], (), 'has no lines'), ([{'answer': '1'}], [right], (), "line 1 of rows needs a 'prompt'"),
      ([{'prompt': 'a'}], [], (), 'rewards: expected one or more'),
      ([{'prompt': 'a'}], [right, right], (), 'of different names'),
      ([{'prompt': 'a'}], [right], (1.0, 2.0), 'weights: expected 1 of them')):
    with pytest.raises(ValueError, match=message):
      prompted_task(rows, rewards, tokenizer, response_length=4, weights=weights)
