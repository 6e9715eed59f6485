"""Tokenizers of model directories: ids, texts of single tokens, special tokens, chat templates, refusals."""

import json
import sys

import numpy as np
import pytest
from model_directories import write_tokenizer

from critkl_jax.tasks.text_tokenizer import TextTokenizer, TokenizerError

pytest.importorskip('tokenizers')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture
def copied(tmp_path):
  return write_tokenizer(tmp_path / 'own')


TEXTS = ['What is 17 plus 25? Answer: 42', ' 42', 'Über größe 雪\n\tend', '<|im_start|>user\nHi<|im_end|>']


@pytest.mark.parametrize('text', TEXTS)
def test_encode_then_decode_is_the_text(directory, text):
  tokenizer = TextTokenizer(directory)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([*ids, 0, 0], [True] * len(ids) + [False] * 2) == text


def test_texts_of_single_tokens_make_up_the_text(directory):
  tokenizer = TextTokenizer(directory, 416)
  ids = tokenizer.encode(TEXTS[0])
  assert len(ids) < len(TEXTS[0])  # tokens of several characters
  assert ''.join(tokenizer.token_texts(ids)) == TEXTS[0]
  assert tokenizer.token_texts([2, 410]) == ['<|im_end|>', '\ufffd']  # a special token, and none
  parts = tokenizer.token_texts(tokenizer.encode('雪'))
  assert len(parts) == 3
  assert all(parts)
  assert '\ufffd' not in ''.join(parts)  # a part of a character has a name of its own


def test_blanks_at_the_beginning_of_words_are_kept(tmp_path):
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  found = tokenizers.Tokenizer(models.WordLevel({'a': 0, '\u2581a': 1, '\u2581blue': 2, '</s>': 3}, unk_token='a'))
  found.pre_tokenizer = pre_tokenizers.Metaspace()
  found.decoder = decoders.Metaspace()  # alone, it drops the blank before a word
  found.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>'}))
  assert TextTokenizer(tmp_path).token_texts([2, 2]) == [' blue', ' blue']


def test_what_training_scripts_leave_in_the_file_is_switched_off(copied):
  values = json.loads((copied / 'tokenizer.json').read_text())
  values['truncation'] = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
  values['padding'] = {'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
                       'pad_type_id': 0, 'pad_token': '<|endoftext|>'}
  (copied / 'tokenizer.json').write_text(json.dumps(values))
  tokenizer = TextTokenizer(copied)
  assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_a_text_goes_on(directory):
  tokenizer = TextTokenizer(directory)
  ids = tokenizer.continuation('What is 1', ' plus')
  assert tokenizer.decode(ids) == ' plus'
  assert tokenizer.continuation('What is 1 pl', 'us') is None  # one token


def test_all_ends_of_sequences_are_found(directory, copied):
  found = TextTokenizer(directory)
  assert (found.end_ids, found.pad_id) == ((2, 0), 0)
  (copied / 'tokenizer_config.json').write_text('{}')
  (copied / 'generation_config.json').unlink()
  (copied / 'config.json').write_text(json.dumps({'eos_token_id': 2}))
  found = TextTokenizer(copied, vocab_size=500)
  assert (found.end_ids, found.pad_id, found.vocab_size) == ((2,), 2, 500)


def test_tokens_that_contain_a_text(directory):
  tokenizer = TextTokenizer(directory)
  found = tokenizer.containing('\n')
  assert found
  for token in range(tokenizer.vocab_size):
    assert ('\n' in tokenizer.decode([token])) == (token in found)


def test_a_chat_template_ends_where_the_answer_begins(directory):
  pytest.importorskip('transformers')
  tokenizer = TextTokenizer(directory)
  assert tokenizer.chat('Hi') == '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
  messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
  assert tokenizer.chat(messages, enable_thinking=False).endswith('assistant\n<think>\n\n</think>\n\n')
  assert tokenizer.chat(messages).startswith('<|im_start|>system\nBe brief.')


def test_a_missing_template_is_named(copied):
  pytest.importorskip('transformers')
  values = json.loads((copied / 'tokenizer_config.json').read_text())
  del values['chat_template']
  (copied / 'tokenizer_config.json').write_text(json.dumps(values))
  with pytest.raises(TokenizerError, match='chat_template'):
    TextTokenizer(copied).chat('Hi')


@pytest.mark.parametrize(('package', 'extra'), [('tokenizers', 'text'), ('transformers', 'chat')])
def test_a_missing_package_is_named_with_its_extra(directory, monkeypatch, package, extra):
  tokenizer = TextTokenizer(directory)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(TokenizerError, match=rf"{package}: pip install 'critkl-jax\[{extra}\]'"):
    TextTokenizer(directory) if package == 'tokenizers' else tokenizer.chat('Hi')


@pytest.mark.parametrize(('change', 'words'), [
    (lambda path: (path / 'tokenizer.json').unlink(), 'has no tokenizer.json'),
    (lambda path: (path / 'tokenizer.json').write_text('{"a": 1}'), 'is no tokenizer'),
    (lambda path: (path / 'tokenizer_config.json').write_text('{'), 'tokenizer_config.json: is no JSON'),
    (lambda path: [(path / f'{name}_config.json').write_text('{}') for name in ('tokenizer', 'generation')],
     'names no end-of-sequence token'),
])
def test_what_cannot_be_read_is_refused(copied, change, words):
  change(copied)
  with pytest.raises(TokenizerError, match=words):
    TextTokenizer(copied)


def test_a_model_must_have_an_id_for_every_token(directory):
  with pytest.raises(TokenizerError, match='has 400 tokens, and the model only 41'):
    TextTokenizer(directory, 41)
