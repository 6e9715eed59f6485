"""Questions with known answers from a JSON-lines file, in the vocabulary of a Hugging Face model directory.

    {"prompt": "What is 17 + 25? Answer:", "answer": " 42"}

A response is right if it is the answer, with or without a space before it, and an end token follows. Prompts and
answers are arrays on the device: a problem is the number of a line, and the reward compares token ids.

Several responses are right, so the task names no solution and no critical tokens.

Letters: N lines, Q tokens of a prompt, T of a response, K ways to write an answer, A tokens of the longest.
"""

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Tokens
from critkl_jax.tasks.questions.config import Questions, TextFinetuning, TextSettings
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.text_tokenizer import FILES, TextTokenizer, TokenizerError

_NONE, _ANY_END = -1, -2  # in a table of answers: no token, and any token that only ends a response


class Question(NamedTuple):
  """A problem: int32 `[]`, the index of its line among the lines that are not empty, from 0."""

  line: chex.Array


def settings_for(config: TextFinetuning, tokenizer: str, vocab_size: int) -> Questions:
  """Returns the settings of the task, with absolute paths and checksums of the files.

  Args:
    config: the settings of a run.
    tokenizer: model directory with tokenizer.json.
    vocab_size: number of token ids of the model.

  Raises:
    ValueError: if the file of prompts cannot be read.
  """
  path, home = (pathlib.Path(name).expanduser().absolute() for name in (config.prompts, tokenizer))
  shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TextSettings)}
  return Questions(prompts=str(path), checksum=zlib.crc32(_bytes(path)), tokenizer=str(home),
                   tokenizer_checksum=_tokenizer_checksum(home), vocab_size=vocab_size, **shared)


def questions(settings: Questions) -> Task:
  """Makes the task: it samples the lines that are not held out, and rewards a right answer with 1, others with 0.

  Raises:
    ValueError: if a file is missing or has changed, or a line cannot be used; the message names the line.
    TokenizerError: as `TextTokenizer`.
  """
  table = _table_of(settings)
  longest = table.answers.shape[2]

  def sample(key):
    return Question(jnp.asarray(table.trained)[jax.random.randint(key, (), 0, len(table.trained))])

  def prompt(problem):
    return Tokens(jnp.asarray(table.prompts)[problem.line], jnp.asarray(table.prompt_masks)[problem.line])

  def is_in(ids, tokens):
    return jnp.isin(tokens, jnp.asarray(ids))

  def well_formed(problem, actions, mask):
    del problem
    last = jnp.sum(mask) - 1
    return (last >= 0) & is_in(table.end_ids, actions[last])

  def reward(problem, actions, mask):
    known, actions = jnp.asarray(table.answers)[problem.line], actions[None, :longest]  # [K, A], [1, A]
    fits = (known == actions) | ((known == _ANY_END) & is_in(table.only_end_ids, actions))
    lengths = jnp.sum(known != _NONE, axis=1)
    same = jnp.all(fits | (known == _NONE), axis=1) & (lengths == jnp.sum(mask)) & (lengths > 0)
    return jnp.any(same).astype(jnp.float32)

  return Task(tokenizer=table.tokenizer, prompt_length=table.prompts.shape[1], response_length=table.response_length,
              stop=stop_after([table.end_ids[:1]], table.end_ids), sample=sample, prompt=prompt, reward=reward,
              well_formed=well_formed)


def question_sets(settings: Questions, names: Sequence[str] | None = None
                  ) -> tuple[Task, Callable[[chex.PRNGKey, int], dict[str, Question]]]:
  """Makes the task and the problem sets for tests: `held_out`, and `trained`, the lines that training samples.

  Args:
    settings: the settings of the task.
    names: the sets to make; None for all that are not empty.

  Returns:
    The task, and a function `(key, B) -> {name: problems}` that draws up to B different lines of each set.

  Raises:
    ValueError: as `questions`, or if a set is unknown or empty.
  """
  table = _table_of(settings)
  lines = {'held_out': table.held_out, 'trained': table.trained}
  found = [name for name in lines if len(lines[name])] if names is None else list(names)
  for name in found:
    if name not in lines or not len(lines[name]):
      raise ValueError(f'sets: expected some of {[name for name in lines if len(lines[name])]}, got {name!r}.')

  def draw(key, number):
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(lines)}
    return {name: Question(jax.random.permutation(keys[name], jnp.asarray(lines[name]))[:number]) for name in found}

  return questions(settings), draw


def sizes_of_sets(settings: Questions) -> dict[str, int]:
  """Returns the number of lines of each problem set that has any."""
  table = _table_of(settings)
  return {name: len(lines) for name, lines in (('held_out', table.held_out), ('trained', table.trained)) if len(lines)}


class _Table(NamedTuple):
  """The file as arrays.

  Attributes:
    tokenizer: the tokenizer.
    end_ids: token ids that end a response.
    only_end_ids: those of them that have no text of their own.
    prompts: int32 `[N, Q]`, padded on the left, with `prompt_masks`.
    prompt_masks: bool `[N, Q]`.
    answers: int32 `[N, K, A]` token ids with an end behind them: `_ANY_END`, or an end that has text of the answer;
      `_NONE` behind it, and everywhere for ways that do not exist.
    response_length: T.
    trained: int32, the lines that training samples.
    held_out: int32, the other lines.
  """

  tokenizer: TextTokenizer
  end_ids: list[int]
  only_end_ids: list[int]
  prompts: np.ndarray
  prompt_masks: np.ndarray
  answers: np.ndarray
  response_length: int
  trained: np.ndarray
  held_out: np.ndarray


class _Row(NamedTuple):
  """A line of the file: its number from 1, the ids of its prompt, and the ways to write its answer."""

  number: int
  prompt: tuple[int, ...]
  ways: list[tuple[int, ...]]


@functools.lru_cache(maxsize=4)
def _table_of(settings: Questions) -> _Table:
  tokenizer, path = TextTokenizer(settings.tokenizer, settings.vocab_size), pathlib.Path(settings.prompts)
  data = _bytes(path)
  if zlib.crc32(data) != settings.checksum:
    raise ValueError(f'prompts: {path} has changed since the run began; restore it, or begin a new run.')
  if _tokenizer_checksum(settings.tokenizer) != settings.tokenizer_checksum:
    raise TokenizerError(f'{settings.tokenizer}: one of {", ".join(FILES)} has changed since the run began; restore '
                         'it, or begin a new run.')
  end_ids, only_end_ids = _ends(tokenizer, settings.stop)
  rows = [_row(tokenizer, settings, set(end_ids), path, i, row) for i, row in _rows(path, data)]
  if not rows:
    raise ValueError(f'prompts: {path} has no lines.')
  longest = max(len(way) for row in rows for way in row.ways)
  length = settings.response_length or longest
  for row in rows:
    if len(row.ways[0]) > length:
      raise ValueError(f'response_length: line {row.number} of {path} has an answer of {len(row.ways[0])} tokens, its '
                       f'end included; got {length}.')
  width = max(len(row.prompt) for row in rows)
  prompts, masks = np.full((len(rows), width), tokenizer.pad_id, np.int32), np.zeros((len(rows), width), bool)
  answers = np.full((len(rows), max(len(row.ways) for row in rows), min(longest, length)), _NONE, np.int32)
  for i, row in enumerate(rows):
    prompts[i, width - len(row.prompt):], masks[i, width - len(row.prompt):] = row.prompt, True
    for k, way in enumerate(row.ways):
      if len(way) <= length:
        answers[i, k, :len(way)] = way
  held_out = _held_out([row.prompt for row in rows], settings.held_out)
  return _Table(tokenizer, end_ids, only_end_ids, prompts, masks, answers, length,
                np.flatnonzero(~held_out).astype(np.int32), np.flatnonzero(held_out).astype(np.int32))


def _ends(tokenizer, stop):
  """Returns the tokens that end a response, the tokenizer's own first, and those of them without text of their own."""
  found = tokenizer.containing(stop) if stop else []
  if stop and not found:
    raise ValueError(f'stop: no single token of {tokenizer.directory} contains {stop!r}; give a shorter text.')
  blank = [token for token, text in zip(found, tokenizer.token_texts(found)) if not text.partition(stop)[0].strip()]
  return [list(dict.fromkeys([*tokenizer.end_ids, *some])) for some in (found, blank)]


def _held_out(prompts, share):
  """Returns a mask of lines: this share of the different prompts, spread evenly, but never all of them."""
  places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
  number = len(places)
  chosen = np.floor(share * np.arange(1, number + 1)) > np.floor(share * np.arange(number))
  chosen[0] = False
  return np.array([chosen[places[prompt]] for prompt in prompts])


def _tokenizer_checksum(directory):
  """Returns a checksum of the files that say how a directory's tokenizer works."""
  files = [path for path in (pathlib.Path(directory) / name for name in FILES) if path.is_file()]
  return zlib.crc32(b'\0'.join(path.name.encode() + path.read_bytes() for path in files))


def _bytes(path):
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(f'prompts: {path} cannot be read: {error.strerror}.') from error


def _rows(path, data):
  """Yields the number from 1 and the values of each line that is not empty."""
  for i, line in enumerate(data.splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'prompts: line {i} of {path} is no JSON ({error}).') from error
    if not isinstance(row, dict) or 'prompt' not in row or not isinstance(row.get('answer'), str):
      raise ValueError(f"prompts: line {i} of {path} needs a 'prompt' and an 'answer' of text.")
    yield i, row


def _row(tokenizer, settings, ends, path, i, row) -> _Row:
  prompt: Any = row['prompt']
  is_text = isinstance(prompt, str)
  if not is_text and not (isinstance(prompt, list) and prompt and all(
      isinstance(message, dict) and {'role', 'content'} <= message.keys() for message in prompt)):
    raise ValueError(f"prompts: line {i} of {path} has a prompt that is neither text nor messages with 'role' and "
                     "'content'.")
  if not is_text and not settings.chat:
    raise ValueError(f'prompts: line {i} of {path} has messages, which need the chat template: set chat=True.')
  try:
    text = tokenizer.chat(prompt, **settings.template_options) if settings.chat else prompt
  except TokenizerError as error:
    raise TokenizerError(f'line {i} of {path}: {error}') from error
  special = not settings.chat  # a template writes its special tokens itself
  ids = tuple(tokenizer.encode(text, special).tolist())
  if not ids:
    raise ValueError(f'prompts: line {i} of {path} has an empty prompt.')
  if not row['answer'].strip():
    raise ValueError(f'prompts: line {i} of {path} has an empty answer.')
  ways = list(dict.fromkeys(_ways(tokenizer, ends, settings.stop, text, special, row['answer'])))
  if not ways:
    raise ValueError(f'prompts: line {i} of {path} has an answer that contains what ends it: {row["answer"]!r}.')
  return _Row(i, ids, ways)


def _ways(tokenizer, ends, stop, prompt, special, answer):
  """Yields the ways to write an answer: as it stands, with a space before it and without, after the prompt and alone.

  A tokenizer may merge the text that ends an answer with the end of the answer itself.
  """
  bare = answer.lstrip()
  for text in dict.fromkeys([answer, bare, f' {bare}']):
    for before, own in ((prompt, special), ('a\n', False), ('', False)):
      ids = tokenizer.continuation(before, text, own)
      if ids and not set(ids) & ends:
        yield (*ids, _ANY_END)
      ids = tokenizer.continuation(before, text + stop, own) if stop else None
      if ids and ids[-1] in ends and not set(ids[:-1]) & ends:
        yield tuple(ids)
