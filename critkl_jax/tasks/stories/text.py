"""Stories as texts of words and phrases, and back: the vocabulary, prompts and the written chain of facts.

    Clara went to the garden. Clara took the cup. Where is the cup?
    Clara took the cup. Clara went to the garden. Answer: garden

or, where the facts alone are asked for (summarisation by extraction),

    Clara went to the garden. Clara took the cup. Summarize: Where is the cup?
    Clara took the cup. Clara went to the garden.

A verb with what belongs to it is one token, `went to the garden.`; so are `Where is the` and the end `Ben.` of a gift.
With a token for each word a small model does not learn who is where (docs/log.md).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import chex
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Solution, Tokens
from critkl_jax.tasks.stories import story as story_lib
from critkl_jax.tasks.stories.story import GIVE, GO, TAKE, Story, chain_of

NAMES = ('Anna', 'Ben', 'Clara', 'David', 'Emma', 'Frank', 'Grace', 'Henry')
PLACES = ('kitchen', 'garden', 'office', 'hallway', 'bedroom', 'cellar', 'attic', 'garage')
OBJECTS = ('apple', 'ball', 'book', 'key', 'lamp', 'cup')
WORDS = (
    '%', '\n', '?', 'Answer:', 'Summarize:', 'Where is', 'Where is the', *NAMES, *PLACES, *OBJECTS,
    *(f'went to the {place}.' for place in PLACES), *(f'took the {thing}.' for thing in OBJECTS),
    *(f'gave the {thing} to' for thing in OBJECTS), *(f'{name}.' for name in NAMES))
PAD, NEWLINE, ASKS, ANSWER, SUMMARIZE, WHERE, WHERE_THE = range(7)
_NAME, _PLACE, _OBJECT, _WENT, _TOOK, _GAVE, _RECEIVER = (WORDS.index(word) for word in (
    NAMES[0], PLACES[0], OBJECTS[0], f'went to the {PLACES[0]}.', f'took the {OBJECTS[0]}.',
    f'gave the {OBJECTS[0]} to', f'{NAMES[0]}.'))
assert (GO, TAKE, GIVE) == (0, 1, 2)  # the order of verbs in `_sentences`
_SENTENCE = 3  # tokens of the longest sentence
_QUESTION = 5  # tokens of the longest question, its line break included
_KNOWN = re.compile('|'.join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True)))
assert (len(NAMES), len(PLACES), len(OBJECTS)) == (story_lib.PERSONS, story_lib.PLACES, story_lib.OBJECTS)


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
  """Maps the words of stories to token ids and back.

  Attributes:
    vocab_size: number of token ids; 0 for one id per word or phrase. A larger number pads the vocabulary to a larger
      model's.
  """

  vocab_size: int = 0

  def __post_init__(self):
    if self.vocab_size and self.vocab_size < len(WORDS):
      raise ValueError(f'vocab_size: expected {len(WORDS)} or more, one for each word, or 0; got {self.vocab_size}.')
    object.__setattr__(self, 'vocab_size', self.vocab_size or len(WORDS))

  @property
  def pad_id(self) -> int:
    """Id that pads."""
    return PAD

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text as int32 ids `[n]`, one for each word, phrase, mark or line break.

    Raises:
      ValueError: if a word is not in the vocabulary.
    """
    unknown = sorted({*re.findall(r'\S+', _KNOWN.sub(' ', text))})
    if unknown:
      raise ValueError(f'text: words {unknown} are not in the vocabulary.')
    return np.array([WORDS.index(word) for word in _KNOWN.findall(text)], np.int32)

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Decodes token ids `[T]`, or only the ids where `mask` `[T]` is true; ids past the words become U+FFFD."""
    ids = np.asarray(tokens)
    if mask is not None:
      ids = ids[np.asarray(mask, bool)]
    return ''.join(self.token_texts(ids.tolist())).replace('\n ', '\n').removeprefix(' ')

  def token_texts(self, tokens: Iterable[int]) -> list[str]:
    """Returns the text of each single token, with the blank before a word; U+FFFD for ids past the words."""
    return [f'{"" if i in (PAD, NEWLINE, ASKS) else " "}{WORDS[i]}' if 0 <= i < len(WORDS) else '\ufffd'
            for i in tokens]


def prompt_length(most: int) -> int:
  """Returns Q, the most tokens of a prompt of a story of up to `most` facts."""
  return _SENTENCE * most + _QUESTION


def solution_length(most: int) -> int:
  """Returns the most tokens of a chain of such a story, its answer and line break included."""
  return _SENTENCE * most + 3


def render_prompt(story: Story) -> Tokens:
  """Writes story and question, padded on the left: `Tokens` `[Q]`."""
  words, lengths = _sentences(story)
  real = jnp.arange(story.kinds.shape[0], dtype=jnp.int32) < story.length
  told = words, _first(jnp.where(real, lengths, 0))
  tokens, length = _joined([told, _question(story)], prompt_length(story.kinds.shape[0]))
  shift = tokens.shape[0] - length
  return Tokens(tokens=jnp.roll(tokens, shift), mask=jnp.arange(tokens.shape[0], dtype=jnp.int32) >= shift)


def render_solution(story: Story, length: int) -> Solution:
  """Writes the chain of facts and, unless the facts alone are asked for, the answer, padded to `length`.

  Critical tokens are the verbs at which a chain about an object goes on with its next holder or ends with the place:
  those of all its sentences but the first.
  """
  tokens, total = _joined(_response(story), length)
  mask = jnp.arange(length, dtype=jnp.int32) < total
  verbs = (tokens >= _WENT) & (tokens < _RECEIVER) & mask
  return Solution(tokens=tokens, mask=mask, critical=verbs & (jnp.cumsum(verbs, dtype=jnp.int32) > 1))


def reward(story: Story, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns 1 for a response `[T]` that ends with the right answer, else 0, float32 `[]`.

  Where the facts alone are asked for, it is 1 for exactly the right facts in their order.
  """
  answered = _end(actions, mask)[1] == _PLACE + chain_of(story)[2]
  solution = render_solution(story, actions.shape[0])
  same = jnp.all((actions == solution.tokens) | ~solution.mask) & (jnp.sum(mask) == jnp.sum(solution.mask))
  return (well_formed(story, actions, mask) & jnp.where(story.wants_facts, same, answered)).astype(jnp.float32)


def well_formed(story: Story, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns whether a response `[T]` has the form of an answer, right or wrong; bool `[]`.

  It ends with an answer and contains no other; or, where the facts alone are asked for, it ends with a sentence and
  contains no answer.
  """
  before, last, newline = _end(actions, mask)
  is_place = (last >= _PLACE) & (last < _PLACE + len(PLACES))
  answers = jnp.sum((actions == ANSWER) & mask, dtype=jnp.int32)
  answered = (before == ANSWER) & is_place & (answers == 1)
  told = (last >= _WENT) & ((last < _GAVE) | (last >= _RECEIVER)) & (last < len(WORDS))
  return (newline == NEWLINE) & jnp.where(story.wants_facts, told & (answers == 0), answered)


def _end(actions, mask):
  """Returns the last three tokens of a response; `PAD` where it is shorter."""
  last = jnp.sum(mask, dtype=jnp.int32)
  return [jnp.where(last >= n, actions[jnp.maximum(last - n, 0)], PAD) for n in (3, 2, 1)]


def _row(words):
  return jnp.stack([jnp.asarray(word, jnp.int32) for word in words])


def _first(lengths):
  """Marks the first `lengths` `[n]` tokens of n sentences: bool `[n, 3]`."""
  return jnp.arange(_SENTENCE, dtype=jnp.int32)[None] < lengths[:, None]


def _question(story: Story) -> tuple[chex.Array, chex.Array]:
  """Writes the question: int32 `[5]` tokens, and bool `[5]` which of them it has."""
  asked = jnp.where(story.asks_object, _OBJECT, _NAME) + story.asked
  where = jnp.where(story.asks_object, WHERE_THE, WHERE)
  return _row([SUMMARIZE, where, asked, ASKS, NEWLINE]), jnp.ones(_QUESTION, bool).at[0].set(story.wants_facts)


def _response(story: Story) -> list[tuple[chex.Array, chex.Array]]:
  """Writes the chain of facts, and the answer and line break: tokens, and which of them the response has."""
  handed, last, place = chain_of(story)
  words, lengths = _sentences(story)
  chain = jnp.concatenate([words, words[last][None]])
  lengths = jnp.concatenate([jnp.where(handed, lengths, 0), lengths[last][None]])
  answer = _row([ANSWER, _PLACE + place, NEWLINE]), jnp.ones(3, bool).at[:2].set(~story.wants_facts)
  return [(chain, _first(lengths)), answer]


def _sentences(story: Story) -> tuple[chex.Array, chex.Array]:
  """Writes each fact as a sentence: int32 `[M, 3]` tokens and `[M]` their number."""
  verb = jnp.array([_WENT, _TOOK, _GAVE], jnp.int32)[story.kinds] + story.things
  columns = _NAME + story.actors, verb, _RECEIVER + story.receivers
  lengths = jnp.where(story.kinds == GIVE, 3, 2).astype(jnp.int32)
  return jnp.stack([column.astype(jnp.int32) for column in columns], 1), lengths


def _joined(parts: Sequence[tuple[chex.Array, chex.Array]], size: int) -> tuple[chex.Array, chex.Array]:
  """Joins the words of all parts that are marked to one row, padded behind.

  Args:
    parts: words and marks, two arrays of equal shape.
    size: length of the row; words beyond it are dropped.

  Returns:
    int32 `[size]`, and the number of words.
  """
  words, mask = (jnp.concatenate([jnp.ravel(part[i]) for part in parts]) for i in (0, 1))
  place = jnp.cumsum(mask, dtype=jnp.int32) - 1
  row = jnp.full(size, PAD, jnp.int32).at[jnp.where(mask, place, size)].set(words, mode='drop')
  return row, jnp.minimum(jnp.sum(mask, dtype=jnp.int32), size)
