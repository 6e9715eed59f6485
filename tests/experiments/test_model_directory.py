"""A Hugging Face model directory goes through the binaries: tested, fine-tuned, resumed, analysed, exported."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_directories import CONFIG, write_model, write_questions, write_tokenizer
from processes import refused, run

from critkl_jax.models.huggingface import load_pretrained
from critkl_jax.models.llama import llama
from critkl_jax.records import Solution
from critkl_jax.runtime import checkpoint
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.tasks.questions import TextFinetuning, questions, settings_for

pytest.importorskip('tokenizers')


def half_taught(directory, file):
  """Teaches a model, token by token, until it answers about half of the questions."""
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

  state = optimizer.init(params)
  for i in range(120):
    params, state = step(params, state, jax.random.key(i))
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
              '--minibatches=2', '--learning_rate=5e-4', '--save_every=10']
  out = run('finetune', *training, '--num_iterations=10')
  assert f'{before["trained"][1]} questions of' in out
  (directory / 'model.safetensors').unlink()  # the run has its own copy of the reference
  run('finetune', *training, '--num_iterations=40')
  summary = json.loads((home / 'summary.json').read_text())
  accuracy = summary['accuracy']
  assert accuracy['before']['held_out'] == before['held_out'][0]
  assert accuracy['after']['trained'] > accuracy['before']['trained']

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


def test_what_questions_do_not_know_is_refused(tmp_path):
  flags = [f'--model={write_model(tmp_path / "model")}', '--task=questions',
           f'--prompts={write_questions(tmp_path / "q.jsonl")}']
  assert "kl_gate: 'oracle' needs critical tokens" in refused('finetune', *flags, '--kl_gate=oracle')
  assert '--response_length: prompts of' in refused('evaluate', *flags, '--response_length=200')
  assert "--responses: 'solution' needs one right response" in refused('analyze', *flags, '--responses=solution')
  assert '--stop: no single token of' in refused('evaluate', *flags, '--stop=Question: none')
