"""The task `questions`: rewards, ends, held-out lines, and files that are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_directories import write_questions, write_tokenizer

from critkl_jax.tasks.questions import Question, TextFinetuning, question_sets, questions, settings_for, sizes_of_sets
from critkl_jax.tasks.text_tokenizer import TextTokenizer, TokenizerError

pytest.importorskip('tokenizers')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  return write_questions(tmp_path_factory.mktemp('questions') / 'q.jsonl')


def settings(file, directory, **changes):
  return settings_for(TextFinetuning(prompts=str(file), **changes), directory, 416)


def rewarded(task, problem, text, end=(2,)):
  """Returns reward and form of a response, cut at the response length."""
  ids = [*task.tokenizer.encode(text).tolist(), *end][:task.response_length]
  actions = jnp.asarray(ids + [task.tokenizer.pad_id] * (task.response_length - len(ids)), jnp.int32)
  mask = jnp.arange(task.response_length) < len(ids)
  return float(task.reward(problem, actions, mask)), bool(task.well_formed(problem, actions, mask))


def test_an_answer_is_right_with_or_without_a_blank_and_ends_there(directory, file):
  task = questions(settings(file, directory, response_length=8))
  problem = Question(jnp.int32(3))
  right = json.loads(file.read_text().splitlines()[3])['answer'].strip()
  for text in (right, f' {right}'):
    assert rewarded(task, problem, text) == (1.0, True)
    assert rewarded(task, problem, text, end=(0,)) == (1.0, True)  # another end-of-sequence token
    assert rewarded(task, problem, text, end=()) == (0.0, False)
  for text in (f'  {right}', f'{right}0', f'{right} ', str(int(right) + 1), ''):
    assert rewarded(task, problem, text) == (0.0, True)
  assert rewarded(task, problem, 'word ' * 8) == (0.0, False)  # cut at the limit


def test_prompts_are_padded_on_the_left_and_no_single_response_is_the_solution(directory, file):
  task = questions(settings(file, directory))
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  prompt = jax.vmap(task.prompt)(Question(jnp.arange(len(rows))))
  assert prompt.tokens.shape == (len(rows), task.prompt_length)
  assert bool(jnp.all(prompt.mask[:, -1]))
  for i, (tokens, mask, row) in enumerate(zip(np.asarray(prompt.tokens), np.asarray(prompt.mask), rows)):
    assert task.tokenizer.decode(tokens, mask) == row['prompt']
    assert rewarded(task, Question(jnp.int32(i)), row['answer'])[0] == 1.0
  assert task.solution is None
  assert 2 <= task.response_length <= 4


def test_a_stop_text_ends_an_answer(directory, file):
  task = questions(settings(file, directory, stop='\n', response_length=8))
  right = json.loads(file.read_text().splitlines()[0])['answer']
  assert rewarded(task, Question(jnp.int32(0)), f'{right}\n', end=()) == (1.0, True)
  ends = TextTokenizer(directory).containing('\n')
  assert all(task.stop[0, token] == len(task.stop) for token in (*ends, 0, 2))
  assert sum(task.stop[0] == len(task.stop)) == len({*ends, 0, 2})
  with pytest.raises(ValueError, match=r'stop: no single token of .* contains'):
    questions(settings(file, directory, stop='\\n'))  # two characters, as a shell passes them


def words(path, *texts, decoder='Metaspace'):
  """Writes a tokenizer of whole words, which marks the space before a word as SentencePiece does."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  found = tokenizers.Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=texts[0]))
  found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split('\n', 'isolated'), pre_tokenizers.Metaspace(
      prepend_scheme='first')])
  found.decoder = decoders.Metaspace()
  path.mkdir()
  found.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': texts[1]}))
  return path


def test_an_answer_at_the_beginning_of_a_line_has_no_space_before_it(tmp_path):
  """SentencePiece puts a space before a text that stands alone, which no model writes after a line break."""
  directory = words(tmp_path / 'words', '<unk>', '</s>', '\u2581sky', 'blue', '\u2581blue', '\n', 'a', '\u2581a')
  file = tmp_path / 'q.jsonl'
  file.write_text('{"prompt": "sky\\n", "answer": "blue"}\n')
  task = questions(settings_for(TextFinetuning(prompts=str(file)), directory, 8))
  for token, right in ((3, 1.0), (4, 1.0), (2, 0.0)):
    actions = jnp.array([token, 1], jnp.int32)
    assert float(task.reward(Question(jnp.int32(0)), actions, jnp.ones(2, bool))) == right


def test_a_stop_that_is_merged_with_the_answer(tmp_path):
  directory = words(tmp_path / 'words', '<unk>', '</s>', 'a', '\u2581a', '(', '3', ')', ').', '.', '\u2581(', 'x.')
  path = directory / 'tokenizer.json'
  values = json.loads(path.read_text())
  values['pre_tokenizer'] = {'type': 'Split', 'pattern': {'Regex': '[a(3x]|\\)?\\.|\\)'}, 'behavior': 'Isolated',
                             'invert': False}
  path.write_text(json.dumps(values))
  file = tmp_path / 'q.jsonl'
  file.write_text('{"prompt": "a", "answer": "(3)"}\n{"prompt": "3", "answer": "(3"}\n')
  task = questions(settings_for(TextFinetuning(prompts=str(file), stop='.', held_out=0.0), directory, 11))
  for line, response, right in ((0, [4, 5, 7], 1.0), (0, [4, 5, 6, 8], 1.0), (0, [4, 5, 6, 1], 1.0),
                                (0, [4, 5, 8], 0.0), (1, [4, 5, 8], 1.0), (1, [4, 5, 7], 0.0), (1, [4, 5, 10], 0.0)):
    actions = jnp.array(response + [0] * (task.response_length - len(response)), jnp.int32)
    mask = jnp.arange(task.response_length) < len(response)
    assert float(task.reward(Question(jnp.int32(line)), actions, mask)) == right, (line, response)


def test_held_out_prompts_are_never_sampled(directory, file):
  made = settings(file, directory, held_out=0.25)
  rows = [json.loads(line)['prompt'] for line in file.read_text().splitlines()]
  different = len(set(rows))
  assert different < len(rows)  # some prompts stand in several lines
  task, sizes = questions(made), sizes_of_sets(made)
  _, draw = question_sets(made)
  drawn = {name: np.asarray(own.line).tolist() for name, own in draw(jax.random.key(1), 99).items()}
  assert {name: len(lines) for name, lines in drawn.items()} == sizes
  assert sorted(drawn['held_out'] + drawn['trained']) == list(range(len(rows)))  # each line once
  held_out, trained = ({rows[i] for i in drawn[name]} for name in ('held_out', 'trained'))
  assert held_out.isdisjoint(trained)
  assert len(held_out) == different // 4
  sampled = np.asarray(jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 500)).line)
  assert set(sampled.tolist()) == set(drawn['trained'])
  assert draw(jax.random.key(1), 4)['trained'].line.shape == (4,)
  assert sizes_of_sets(dataclasses.replace(made, held_out=0.0)) == {'trained': 40}
  with pytest.raises(ValueError, match=r"sets: expected some of \['trained'\], got 'held_out'"):
    question_sets(dataclasses.replace(made, held_out=0.0), ['held_out'])


def test_a_changed_file_is_refused(directory, tmp_path):
  file = write_questions(tmp_path / 'q.jsonl')
  made = settings(file, directory)
  write_questions(file, number=41)
  with pytest.raises(ValueError, match='has changed since the run began'):
    questions(made)
  own = write_tokenizer(tmp_path / 'own')
  made = settings(file, own)
  questions(made)
  (own / 'generation_config.json').write_text('{"eos_token_id": 0}')
  questions.__globals__['_table_of'].cache_clear()
  with pytest.raises(TokenizerError, match=r'generation_config\.json, .* has changed since the run began'):
    questions(made)
  file.unlink()
  with pytest.raises(ValueError, match=r'q\.jsonl cannot be read: No such file'):
    settings(file, directory)


@pytest.mark.parametrize(('line', 'changes', 'words'), [
    ('{"prompt": "a"}', {}, "line 2 of .* needs a 'prompt' and an 'answer'"),
    ('["a"]', {}, "line 2 of .* needs a 'prompt'"), ('{', {}, 'line 2 of .* is no JSON'),
    ('{"prompt": "a", "answer": 4}', {}, "an 'answer' of text"), ('{"prompt": "", "answer": "a"}', {}, 'empty prompt'),
    ('{"prompt": "a", "answer": " "}', {}, 'empty answer'), ('{"prompt": 3, "answer": "a"}', {}, 'neither text nor'),
    ('{"prompt": [{"role": "user"}], "answer": "a"}', {}, 'neither text nor messages'),
    ('{"prompt": [{"role": "user", "content": "a"}], "answer": "a"}', {}, 'set chat=True'),
    ('{"prompt": "a", "answer": "a long answer"}', {'response_length': 3}, 'response_length: line 2 .* of 1. tokens'),
    ('{"prompt": "a", "answer": "a\\nb"}', {'stop': '\n'}, 'line 2 .* contains what ends it'),
])
def test_a_line_that_cannot_be_used_is_named(directory, tmp_path, line, changes, words):
  file = tmp_path / 'q.jsonl'
  file.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
  with pytest.raises(ValueError, match=words):
    questions(settings(file, directory, **changes))
  file.write_text('\n')
  with pytest.raises(ValueError, match='has no lines'):
    questions(settings(file, directory))


def test_settings_are_checked():
  for values, words in (({'response_length': -1}, 'response_length'), ({'held_out': 1.0}, 'held_out'),
                        ({'chat': True, 'chat_options': '[1]'}, 'a JSON object'),
                        ({'chat_options': '{'}, 'a JSON object'), ({'chat_options': '{"a": 1}'}, 'set chat=True')):
    with pytest.raises(ValueError, match=words):
      TextFinetuning(**values)


def test_a_chat_template_wraps_prompts(directory, tmp_path):
  pytest.importorskip('transformers')
  file = tmp_path / 'q.jsonl'
  file.write_text('{"prompt": "Hi", "answer": "b"}\n{"prompt": [{"role": "user", "content": "Ho"}], "answer": "b"}\n')
  task = questions(settings(file, directory, chat=True, chat_options='{"enable_thinking": false}', held_out=0.0))
  for line, said in enumerate(('Hi', 'Ho')):
    prompt = task.prompt(Question(jnp.int32(line)))
    assert task.tokenizer.decode(prompt.tokens, prompt.mask) == (
        f'<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n')
