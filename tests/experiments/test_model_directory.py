"""A Hugging Face model directory goes through the binaries: tested, fine-tuned, resumed, analysed, exported."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_directories import CONFIG, write_model, write_questions, write_tokenizer
from processes import metrics, refused, run

from critkl_jax.models.huggingface import load_pretrained
from critkl_jax.models.llama import llama
from critkl_jax.records import Solution
from critkl_jax.runtime import checkpoint
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.tasks.questions import Question, TextFinetuning, questions, settings_for

pytest.importorskip('tokenizers')


def half_taught(directory, file):
  """Teaches a model, token by token, until it answers 40 % of the questions."""
  task, model = questions(settings_for(TextFinetuning(prompts=str(file)), directory, CONFIG.vocab_size)), llama(CONFIG)
  params, optimizer = model.init(jax.random.key(0)), optax.adam(3e-3)
  answers = [[*task.tokenizer.encode(json.loads(line)['answer']).tolist(), task.tokenizer.end_ids[0]]
             for line in file.read_text().splitlines()]
  tokens = jnp.array([ids + [0] * (task.response_length - len(ids)) for ids in answers], jnp.int32)
  mask = jnp.arange(task.response_length)[None] < jnp.array([[len(ids)] for ids in answers])

  @jax.jit
  def step(params, state, key):
    problems = jax.vmap(task.sample)(jax.random.split(key, 32))
    right = as_rollout(jax.vmap(task.prompt)(problems), Solution(tokens[problems.line], mask[problems.line]))

    def loss(params):
      log_probs = jax.nn.log_softmax(score(model, params, right)[0])
      chosen = jnp.take_along_axis(log_probs, right.actions[..., None], -1)[..., 0]
      return -jnp.sum(chosen * right.mask) / jnp.sum(right.mask)

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  everything = Question(jnp.arange(len(answers)))
  right = as_rollout(jax.vmap(task.prompt)(everything), Solution(tokens, mask))

  @jax.jit
  def accuracy(params):
    return jnp.mean(jnp.all((jnp.argmax(score(model, params, right)[0], -1) == tokens) | ~mask, axis=1))

  state, i = optimizer.init(params), 0
  while accuracy(params) < 0.4:
    params, state = step(params, state, jax.random.key(i))
    i += 1
    assert i < 1000
  return params


def accuracy_of(flags, path):
  run('evaluate', *flags, f'--json={path}')
  return {row['set']: (row['accuracy'], row['num_problems']) for row in json.loads(path.read_text())['accuracy']}


@pytest.mark.slow
def test_a_model_directory_goes_through_all_binaries(standard_promotion, tmp_path):
  file = write_questions(tmp_path / 'q.jsonl', 200)
  directory = write_model(tmp_path / 'model', half_taught(write_tokenizer(tmp_path / 'tokenizer'), file))
  flags = [f'--model={directory}', '--task=questions', f'--prompts={file}']
  before = accuracy_of(flags, tmp_path / 'before.json')
  assert sum(number for _, number in before.values()) == 200
  assert 0.2 < before['trained'][0] < 0.8

  home = tmp_path / 'run'
  training = [*flags, f'--workdir={home}', '--kl=standard', '--episodes=128', '--episodes_per_problem=8',
              '--minibatches=2', '--learning_rate=4e-4', '--save_every=10']
  out = run('finetune', *training, '--num_iterations=10')
  assert f'{before["trained"][1]} questions of' in out
  (directory / 'model.safetensors').unlink()  # the run has its own copy of the reference
  run('finetune', *training, '--num_iterations=40')
  summary = json.loads((home / 'summary.json').read_text())
  accuracy = summary['accuracy']
  assert accuracy['before']['held_out'] == before['held_out'][0]
  sampled = [row['accuracy'] for row in metrics(home)]
  assert np.mean(sampled[-10:]) > np.mean(sampled[:10])  # greedy answers of a half-taught model may become worse

  exported = tmp_path / 'exported'
  run('export', f'--checkpoint={home}', f'--directory={exported}')
  policy = checkpoint.load_checkpoint(home)
  read = load_pretrained(exported)
  assert read.model.config == policy.info.model
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(read.params), jax.tree.leaves(policy.params)):
    if not read.model.is_critic(tuple(key.key for key in path)):
      np.testing.assert_array_equal(x, y)
  after = accuracy_of([f'--model={exported}', *flags[1:]], tmp_path / 'after.json')
  assert after['held_out'][0] == accuracy['after']['held_out']
  assert accuracy_of([f'--checkpoint={home}'], tmp_path / 'checkpoint.json') == after

  run('analyze', f'--checkpoints={home}', f'--workdir={tmp_path / "analysis"}', '--problems=16')
  with (tmp_path / 'analysis' / 'tokens.csv').open() as opened:
    rows = list(csv.DictReader(opened))
  assert {row['set'] for row in rows} == {'held_out', 'trained'}
  assert all('Answer:' in row['problem'] for row in rows)
  assert {'<|im_end|>'} < {row['text'] for row in rows}
  assert any(len(row['text']) > 1 for row in rows if not row['text'].startswith('<'))
  page = (tmp_path / 'analysis' / 'report.html').read_text()
  assert 'Which tokens are critical is not known' in page
  run('analyze', f'--model={exported}', *flags[1:], f'--workdir={tmp_path / "alone"}', '--problems=4')


@pytest.mark.slow
def test_a_run_that_goes_on_needs_the_same_questions(tmp_path):
  file, directory = write_questions(tmp_path / 'q.jsonl'), write_model(tmp_path / 'model')
  flags = [f'--model={directory}', '--task=questions', f'--prompts={file}', f'--workdir={tmp_path / "run"}',
           '--eval_problems=0', '--episodes=4', '--minibatches=1', '--num_iterations=1']
  run('finetune', *flags)
  write_questions(file, number=41)
  assert 'checksum' in refused('finetune', *flags)
  assert 'has changed since the run began' in refused('evaluate', f'--checkpoint={tmp_path / "run"}')
  (directory / 'tokenizer.json').unlink()
  assert 'has no tokenizer.json' in refused('finetune', *flags)


REWARDS = """
def near(prompts, completions, answer, **columns):
  digits = lambda text: [int(c) for c in text if c.isdigit()]
  return [1.0 / (1 + abs(sum(digits(said)) - sum(digits(right)))) for said, right in zip(completions, answer)]

def short(completions):
  return [float(len(said)) for said in completions]

def fails(prompts, completions, **columns):
  return [1 / 0 for _ in prompts]
"""


@pytest.mark.slow
def test_rewards_in_python_train_resume_and_stop_a_run(tmp_path):
  (tmp_path / 'my_rewards.py').write_text(REWARDS)
  file, directory = write_questions(tmp_path / 'q.jsonl'), write_model(tmp_path / 'model')
  flags = [f'--model={directory}', '--task=questions', f'--prompts={file}', '--episodes=16', '--episodes_per_problem=4',
           '--minibatches=2', '--save_every=1', '--eval_problems=4', '--reward=my_rewards:near,my_rewards:short',
           '--reward_weights=1,-0.1', '--response_length=6', '--success=0.4']
  for name, steps in (('whole', (4,)), ('resumed', (2, 4))):
    for number in steps:
      run('finetune', *flags, f'--workdir={tmp_path / name}', f'--num_iterations={number}', cwd=tmp_path)
  assert metrics(tmp_path / 'whole') == metrics(tmp_path / 'resumed')
  whole, resumed = (checkpoint.load_checkpoint(tmp_path / name).params for name in ('whole', 'resumed'))
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  for row in metrics(tmp_path / 'whole'):
    near, short = (row[f'reward/my_rewards:{name}'] for name in ('near', 'short'))
    assert row['reward'] == pytest.approx(near - 0.1 * short, abs=1e-5)
  samples = (tmp_path / 'whole' / 'samples.jsonl').read_text()
  assert samples == (tmp_path / 'resumed' / 'samples.jsonl').read_text()
  rows = [json.loads(line) for line in samples.splitlines()]
  assert [row['step'] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
  assert all(row['completion'] and row['prompt'].startswith('What is') for row in rows)

  failing = [*flags[:8], '--reward=my_rewards:fails', '--response_length=6', f'--workdir={tmp_path / "failing"}']
  line = refused('finetune', *failing, '--eval_problems=0', status=1, cwd=tmp_path)
  assert 'my_rewards:fails raised ZeroDivisionError: division by zero (my_rewards.py:10) at row' in line
  assert 'no checkpoint is in' in line
  out = run('evaluate', f'--checkpoint={tmp_path / "whole"}', '--num_problems=4', cwd=tmp_path)
  assert 'held_out' in out
  run('analyze', f'--checkpoints={tmp_path / "whole"}', f'--workdir={tmp_path / "analysis"}', '--problems=2',
      cwd=tmp_path)
  assert rows[0]['prompt'] in (tmp_path / 'analysis' / 'report.html').read_text()


@pytest.mark.slow
def test_a_dataset_of_reasoning_gym_is_a_task(tmp_path):
  pytest.importorskip('reasoning_gym')
  flags = [f'--model={write_model(tmp_path / "model")}', '--task=reasoning_gym:basic_arithmetic', '--response_length=6',
           '--dataset_options={"size": 20, "min_terms": 2, "max_terms": 2, "max_digits": 1, "min_digits": 1}']
  out = run('finetune', *flags, f'--workdir={tmp_path / "run"}', '--episodes=8', '--minibatches=1',
            '--num_iterations=1', '--eval_problems=4')
  assert 'reasoning_gym:basic_arithmetic' in out
  assert 'reward/reasoning_gym' in metrics(tmp_path / 'run')[0]
  run('evaluate', *flags, '--num_problems=4')


def test_rewards_are_checked_before_the_start(tmp_path):
  flags = [f'--model={write_model(tmp_path / "model")}', '--task=questions',
           f'--prompts={write_questions(tmp_path / "q.jsonl")}']
  for wrong, said in (
      (['--reward=nowhere:f', '--response_length=4'], "--reward: 'nowhere:f' cannot be loaded (ModuleNotFoundError"),
      (['--reward=f1'], '--response_length: with reward functions, say how long'),
      (['--reward=reasoning_gym', '--response_length=4'],
       "--reward: 'reasoning_gym' needs 'metadata', and the columns of the prompts are 'answer'."),
      (['--reward=f1', '--response_length=4', '--reward_weights=1,2'], '--reward_weights: expected 1 numbers'),
      (['--success=0.5'], '--success: has no effect without reward'),
      (['--dataset_options={"size": 3}'], '--dataset_options: has no effect without task=reasoning_gym:NAME')):
    assert said in refused('finetune', *flags, *wrong)
  assert '--reward: the members of a study are one program' in refused(
      'sweep', *flags, '--reward=f1', '--response_length=4')
  assert '--response_length: with reward functions' in refused(
      'finetune', flags[0], '--task=reasoning_gym:leg_counting')
  assert '--prompts: has no effect with --task=reasoning_gym:x' in refused(
      'finetune', flags[0], flags[2], '--task=reasoning_gym:x')


def test_what_questions_do_not_know_is_refused(tmp_path):
  flags = [f'--model={write_model(tmp_path / "model")}', '--task=questions',
           f'--prompts={write_questions(tmp_path / "q.jsonl")}']
  assert "kl_gate: 'oracle' needs critical tokens" in refused('finetune', *flags, '--kl_gate=oracle')
  assert '--response_length: prompts of' in refused('evaluate', *flags, '--response_length=200')
  assert "--responses: 'solution' needs one right response" in refused('analyze', *flags, '--responses=solution')
  assert '--stop: no single token of' in refused('evaluate', *flags, '--stop=Question: none')
