"""Questions from a JSON-lines file or reasoning-gym, in the vocabulary of a Hugging Face model directory.

    {"prompt": "What is 17 + 25? Answer:", "answer": " 42"}

Without reward functions a response is right if it is the answer, with or without a space before it, and an end token
follows. Prompts and answers are then arrays on the device: a problem is the number of a line, and the reward compares
token ids. With reward functions, prompts and rewards stay on the host (`HostSide`), and lines may have no answer.

Several responses are right, so the task names no solution and no critical tokens.

Letters: N lines, Q tokens of a prompt, T of a response, K ways to write an answer, A tokens of the longest.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Tokens
from critkl_jax.tasks.host_side import Answers, HostSide
from critkl_jax.tasks.questions import sources
from critkl_jax.tasks.questions.config import Questions, TextFinetuning, TextSettings
from critkl_jax.tasks.rewards.worker import ALWAYS
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.text_tokenizer import FILES, TextTokenizer, TokenizerError

_NONE, _ANY_END = -1, -2  # in a table of answers: no token, and any token that only ends a response
_OTHER_GYM = ' (another version of reasoning-gym makes other prompts)'
_WIDTHS = 16  # widths of prompts are multiples of it


class Question(NamedTuple):
  """A problem: int32 `[]`, the index of its line among the lines that are not empty, from 0."""

  line: chex.Array


class Prompted(NamedTuple):
  """A problem of a task with reward functions.

  Attributes:
    line: int32 `[]`, the index of its line.
    tokens: int32 `[Q]` prompt, padded on the left.
    mask: bool `[Q]` true at the tokens of the prompt.
  """

  line: chex.Array
  tokens: chex.Array
  mask: chex.Array


def settings_for(config: TextFinetuning, tokenizer: str, vocab_size: int) -> Questions:
  """Returns the settings of the task, with absolute paths and checksums of the files.

  Args:
    config: the settings of a run.
    tokenizer: model directory with tokenizer.json.
    vocab_size: number of token ids of the model.

  Raises:
    ValueError: if the prompts cannot be read.
  """
  place, home = sources.place_of(config.prompts), pathlib.Path(tokenizer).expanduser().absolute()
  shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TextSettings)}
  return Questions(prompts=place, checksum=sources.read(place, config.gym_options)[0], tokenizer=str(home),
                   tokenizer_checksum=_tokenizer_checksum(home), vocab_size=vocab_size, **shared)


def questions(settings: Questions) -> Task:
  """Makes the task: it samples the lines that are not held out, and rewards a right answer with 1, others with 0; or as
  the reward functions of the settings say.

  Raises:
    ValueError: if a file is missing or has changed, or a line cannot be used; the message names the line.
    TokenizerError: as `TextTokenizer`.
  """
  table, weights = _table_of(settings), settings.reward_functions
  if weights:
    return _rewarded_task(table, {name: name for name in weights}, weights, settings.success)
  longest = table.answers.shape[2]

  def sample(key):
    return Question(jnp.asarray(table.trained)[jax.random.randint(key, (), 0, len(table.trained))])

  def prompt(problem):
    return Tokens(jnp.asarray(table.prompts)[problem.line], jnp.asarray(table.prompt_masks)[problem.line])

  def is_in(ids, tokens):
    return jnp.isin(tokens, jnp.asarray(ids))

  def reward(problem, actions, mask):
    known, actions = jnp.asarray(table.answers)[problem.line], actions[None, :longest]  # [K, A], [1, A]
    fits = (known == actions) | ((known == _ANY_END) & is_in(table.only_end_ids, actions))
    lengths = jnp.sum(known != _NONE, axis=1)
    same = jnp.all(fits | (known == _NONE), axis=1) & (lengths == jnp.sum(mask)) & (lengths > 0)
    return jnp.any(same).astype(jnp.float32)

  return Task(tokenizer=table.tokenizer, prompt_length=table.prompts.shape[1], response_length=table.response_length,
              stop=table.stop, sample=sample, prompt=prompt, reward=reward, well_formed=table.well_formed)


def prompted_task(rows: Iterable[dict[str, Any]], rewards: Sequence[Callable | str], tokenizer: TextTokenizer, *,
                  response_length: int, weights: Sequence[float] = (), stop: str = '', success: float = 1.0,
                  chat: bool = False) -> Task:
  """Makes a task of any prompts and reward functions in Python.

  Args:
    rows: each has a `prompt`, a text or messages with `role` and `content`; its other values are columns, which the
      reward functions get by name.
    rewards: functions `(prompts, completions, **columns) -> one number for each completion`, or their names
      `module:function`, which can run in processes of a `RewardPool`.
    tokenizer: reads and writes the texts.
    response_length: T, the most tokens of a response, its end token included.
    weights: factors of the functions, whose sum is the reward; 1 each if empty.
    stop: a text that ends a response, besides the end-of-sequence tokens.
    success: the least reward that counts as success.
    chat: whether prompts are put into the tokenizer's chat template.

  Returns:
    A task for `make_host_step`.

  Raises:
    ValueError: if there are no rows, one cannot be used, or the weights are not as many as the functions.
    TokenizerError: as `TextTokenizer`.
  """
  if response_length < 1:
    raise ValueError(f'response_length: expected 1 or more, got {response_length}.')
  if weights and len(weights) != len(rewards):
    raise ValueError(f'weights: expected {len(rewards)} of them, one for each of rewards; got {len(weights)}.')
  names = [one if isinstance(one, str) else getattr(one, '__name__', f'reward_{i}') for i, one in enumerate(rewards)]
  if not names or len(set(names)) < len(names):
    raise ValueError(f'rewards: expected one or more functions of different names, got {names}.')
  settings = TextSettings(chat=chat, stop=stop, response_length=response_length, held_out=0.0)
  table = _make_table(tokenizer, settings, 'rows', list(enumerate(rows, 1)), with_answers=False)
  return _rewarded_task(table, dict(zip(names, rewards)), dict(zip(names, weights or [1.0] * len(names))), success)


def _rewarded_task(table: '_Table', functions: dict[str, Callable | str], weights: dict[str, float], success: float
                   ) -> Task:
  """Makes the task of a table and reward functions."""

  def draw(seed, first, number):
    return table.prompted(_shuffled(table.trained, seed, first, number))

  names = dict.fromkeys(name for row in table.rows for name in row.values if name != 'prompt')
  for name in set(names) & set(ALWAYS):
    raise ValueError(f'prompts: a column cannot be called {name!r}, which reward functions get besides the columns.')

  def read(problems, actions, mask):
    rows = [table.rows[line] for line in np.asarray(problems.line)]
    texts = [table.tokenizer.decode_response(ids[own], table.end_ids) for ids, own in zip(actions, mask)]
    completions = [text if isinstance(row.values['prompt'], str) else [{'role': 'assistant', 'content': text}]
                   for row, text in zip(rows, texts)]
    columns = {name: [row.values.get(name) for row in rows] for name in names}
    columns['completion_ids'] = [ids[own].tolist() for ids, own in zip(actions, mask)]
    return Answers([row.values['prompt'] for row in rows], completions, columns, [row.number for row in rows])

  return Task(tokenizer=table.tokenizer, prompt_length=table.widths[-1], response_length=table.response_length,
              stop=table.stop, prompt=lambda problem: Tokens(problem.tokens, problem.mask), success=success,
              well_formed=table.well_formed, host=HostSide(draw, read, functions, weights, tuple(names)))


def _shuffled(lines, seed, first, number):
  """Returns entries `first` to `first + number` of the lines in endless repetition, shuffled anew in each."""
  found = []
  while number:
    epoch, place = divmod(first, len(lines))
    order = np.random.default_rng([*seed, epoch]).permutation(lines)[place:place + number]
    found.append(order)
    first, number = first + len(order), number - len(order)
  return np.concatenate(found)


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

  task = questions(settings)

  def draw(key, number):
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(lines)}
    drawn = {name: jax.random.permutation(keys[name], jnp.asarray(lines[name]))[:number] for name in found}
    return {name: Question(own) if task.host is None else table.prompted(np.asarray(own), table.widths[-1])
            for name, own in drawn.items()}

  return task, draw


def sizes_of_sets(settings: Questions) -> dict[str, int]:
  """Returns the number of lines of each problem set that has any."""
  table = _table_of(settings)
  return {name: len(lines) for name, lines in (('held_out', table.held_out), ('trained', table.trained)) if len(lines)}


class _Row(NamedTuple):
  """A line: its number from 1, its values, the ids of its prompt, and the ways to write its answer."""

  number: int
  values: dict[str, Any]
  prompt: tuple[int, ...]
  ways: list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Table:
  """The lines as arrays.

  Attributes:
    tokenizer: the tokenizer.
    rows: the lines.
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
  rows: list[_Row]
  end_ids: list[int]
  only_end_ids: list[int]
  prompts: np.ndarray
  prompt_masks: np.ndarray
  answers: np.ndarray
  response_length: int
  trained: np.ndarray
  held_out: np.ndarray

  @property
  def stop(self) -> np.ndarray:
    """The automaton that ends a response."""
    return stop_after([self.end_ids[:1]], self.end_ids)

  @property
  def widths(self) -> list[int]:
    """The widths of prompts, ascending: the longest, its half and its quarter, rounded up."""
    longest = self.prompts.shape[1]
    return sorted({min(-(-longest // (part * _WIDTHS)) * _WIDTHS, longest) for part in (1, 2, 4)})

  def well_formed(self, problem: Any, actions: chex.Array, mask: chex.Array) -> chex.Array:
    """Returns whether a response has an end."""
    del problem
    last = jnp.sum(mask) - 1
    return (last >= 0) & jnp.isin(actions[last], jnp.asarray(self.end_ids))

  def prompted(self, lines: np.ndarray, width: int = 0) -> Prompted:
    """Returns the problems of these lines, with prompts of a width, by default the least that will do."""
    longest = int(self.prompt_masks[lines].sum(1).max())
    width = width or next(width for width in self.widths if width >= longest)
    return Prompted(lines.astype(np.int32), self.prompts[lines, -width:], self.prompt_masks[lines, -width:])


@functools.lru_cache(maxsize=4)
def _table_of(settings: Questions) -> _Table:
  tokenizer = TextTokenizer(settings.tokenizer, settings.vocab_size)
  checksum, rows = sources.read(settings.prompts, settings.gym_options)
  is_gym = sources.is_gym(settings.prompts)
  if checksum != settings.checksum:
    raise ValueError(f'prompts: {settings.prompts} has changed since the run began; restore it'
                     f'{_OTHER_GYM * is_gym}, or begin a new run.')
  if _tokenizer_checksum(settings.tokenizer) != settings.tokenizer_checksum:
    raise TokenizerError(f'{settings.tokenizer}: one of {", ".join(FILES)} has changed since the run began; restore '
                         'it, or begin a new run.')
  return _make_table(tokenizer, settings, settings.prompts, rows, with_answers=not settings.reward_functions)


def _make_table(tokenizer: TextTokenizer, settings: TextSettings, place: str, rows: Sequence[tuple[int, Any]],
                with_answers: bool) -> _Table:
  """Makes the table of rows, which are numbered from 1; messages call their source `place`."""
  end_ids, only_end_ids = _ends(tokenizer, settings.stop)
  rows = [_row(tokenizer, settings, set(end_ids), place, i, values, with_answers) for i, values in rows]
  if not rows:
    raise ValueError(f'prompts: {place} has no lines.')
  longest = max((len(way) for row in rows for way in row.ways), default=1)
  length = settings.response_length or longest
  for row in rows:
    if row.ways and len(row.ways[0]) > length:
      raise ValueError(f'response_length: line {row.number} of {place} has an answer of {len(row.ways[0])} tokens, its '
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
  return _Table(tokenizer, rows, end_ids, only_end_ids, prompts, masks, answers, length,
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


def _row(tokenizer, settings, ends, place, i, row, with_answer) -> _Row:
  if not isinstance(row, dict) or 'prompt' not in row:
    raise ValueError(f"prompts: line {i} of {place} needs a 'prompt'.")
  if with_answer and not isinstance(row.get('answer'), str):
    raise ValueError(f"prompts: line {i} of {place} needs a 'prompt' and an 'answer' of text.")
  prompt: Any = row['prompt']
  is_text = isinstance(prompt, str)
  if not is_text and not (isinstance(prompt, list) and prompt and all(
      isinstance(message, dict) and {'role', 'content'} <= message.keys() for message in prompt)):
    raise ValueError(f"prompts: line {i} of {place} has a prompt that is neither text nor messages with 'role' and "
                     "'content'.")
  if not is_text and not settings.chat:
    raise ValueError(f'prompts: line {i} of {place} has messages, which need the chat template: set chat=True.')
  try:
    text = tokenizer.chat(prompt, **settings.template_options) if settings.chat else prompt
  except TokenizerError as error:
    raise TokenizerError(f'line {i} of {place}: {error}') from error
  special = not settings.chat  # a template writes its special tokens itself
  ids = tuple(tokenizer.encode(text, special).tolist())
  if not ids:
    raise ValueError(f'prompts: line {i} of {place} has an empty prompt.')
  if not with_answer:
    return _Row(i, row, ids, [])
  if not row['answer'].strip():
    raise ValueError(f'prompts: line {i} of {place} has an empty answer.')
  ways = list(dict.fromkeys(_ways(tokenizer, ends, settings.stop, text, special, row['answer'])))
  if not ways:
    raise ValueError(f'prompts: line {i} of {place} has an answer that contains what ends it: {row["answer"]!r}.')
  return _Row(i, row, ids, ways)


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
