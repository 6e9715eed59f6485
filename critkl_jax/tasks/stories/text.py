"""Stories as texts of words, and back: the vocabulary, prompts and the written chain of facts.

    Clara went to the garden. Clara took the cup. Where is the cup?
    Clara took the cup. Clara went to the garden. Answer: garden
"""

import dataclasses
import re
from collections.abc import Iterable

import chex
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Solution, Tokens
from critkl_jax.tasks.stories import story as story_lib
from critkl_jax.tasks.stories.story import GIVE, GO, Story, chain_of

NAMES = ('Anna', 'Ben', 'Clara', 'David', 'Emma', 'Frank', 'Grace', 'Henry')
PLACES = ('kitchen', 'garden', 'office', 'hallway', 'bedroom', 'cellar', 'attic', 'garage')
OBJECTS = ('apple', 'ball', 'book', 'key', 'lamp', 'cup')
WORDS = ('%', '\n', '.', '?', 'Answer:', 'Where', 'is', 'to', 'the', 'went', 'took', 'gave', *NAMES, *PLACES, *OBJECTS)
_ID = {word: i for i, word in enumerate(WORDS)}
PAD, NEWLINE, STOP, ASKS, ANSWER, WHERE, IS, TO, THE = range(9)
_NAME, _PLACE, _OBJECT = (_ID[words[0]] for words in (NAMES, PLACES, OBJECTS))
VERBS = (_ID['went'], _ID['took'], _ID['gave'])
_SENTENCE = 7  # words of the longest sentence, its full stop included
_QUESTION = 5  # words of the longest question, its mark and line break included, without the article
assert (len(NAMES), len(PLACES), len(OBJECTS)) == (story_lib.PERSONS, story_lib.PLACES, story_lib.OBJECTS)


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
  """Maps the words of stories to token ids and back.

  Attributes:
    vocab_size: number of token ids; 0 for one id per word. A larger number pads the vocabulary to a larger model's.
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
    """Encodes a text as int32 ids `[n]`, one for each word, mark or line break.

    Raises:
      ValueError: if a word is not in the vocabulary.
    """
    words = re.findall(r'Answer:|\w+|[^\w ]', text)
    unknown = sorted({*words} - {*WORDS})
    if unknown:
      raise ValueError(f'text: words {unknown} are not in the vocabulary.')
    return np.array([_ID[word] for word in words], np.int32)

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Decodes token ids `[T]`, or only the ids where `mask` `[T]` is true; ids past the words become U+FFFD."""
    ids = np.asarray(tokens)
    if mask is not None:
      ids = ids[np.asarray(mask, bool)]
    return ''.join(self.token_texts(ids.tolist())).replace('\n ', '\n').removeprefix(' ')

  def token_texts(self, tokens: Iterable[int]) -> list[str]:
    """Returns the text of each single token, with the blank before a word; U+FFFD for ids past the words."""
    return [f'{"" if WORDS[i] in "%.?" or i == NEWLINE else " "}{WORDS[i]}' if 0 <= i < len(WORDS) else '\ufffd'
            for i in tokens]


def prompt_length(most: int) -> int:
  """Returns Q, the most words of a prompt of a story of up to `most` facts."""
  return _SENTENCE * most + _QUESTION + 1


def solution_length(most: int) -> int:
  """Returns the most words of a chain of such a story, its answer and line break included."""
  return _SENTENCE * most + 3


def render_prompt(story: Story) -> Tokens:
  """Writes story and question, padded on the left: `Tokens` `[Q]`."""
  words, lengths = _sentences(story)
  real = jnp.arange(story.kinds.shape[0], dtype=jnp.int32) < story.length
  article = jnp.where(story.asks_object, THE, PAD)
  asked = jnp.where(story.asks_object, _OBJECT, _NAME) + story.asked
  question = _row([WHERE, IS, article, asked, ASKS, NEWLINE])
  kept = jnp.array([True, True, False, True, True, True]).at[2].set(story.asks_object)
  tokens, length = _joined(words, jnp.where(real, lengths, 0), question, kept, prompt_length(story.kinds.shape[0]))
  shift = tokens.shape[0] - length
  return Tokens(tokens=jnp.roll(tokens, shift), mask=jnp.arange(tokens.shape[0], dtype=jnp.int32) >= shift)


def render_solution(story: Story, length: int) -> Solution:
  """Writes the chain of facts and the answer, padded to `length`.

  Critical tokens are the verbs at which a chain about an object goes on with its next holder or ends with the place:
  those of all its sentences but the first.
  """
  handed, last, place = chain_of(story)
  words, lengths = _sentences(story)
  words = jnp.concatenate([words, words[last][None]])
  lengths = jnp.concatenate([jnp.where(handed, lengths, 0), lengths[last][None]])
  answer = _row([ANSWER, _PLACE + place, NEWLINE])
  tokens, total = _joined(words, lengths, answer, jnp.ones(3, bool), length)
  mask = jnp.arange(length, dtype=jnp.int32) < total
  verbs = jnp.isin(tokens, jnp.array(VERBS, jnp.int32)) & mask
  return Solution(tokens=tokens, mask=mask, critical=verbs & (jnp.cumsum(verbs, dtype=jnp.int32) > 1))


def reward(story: Story, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns 1 for a response `[T]` that ends with the right answer, else 0, float32 `[]`."""
  return (well_formed(story, actions, mask) & (_end(actions, mask)[1] == _PLACE + chain_of(story)[2])).astype(
      jnp.float32)


def well_formed(story: Story, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns whether a response `[T]` ends with an answer, right or wrong, and contains no other; bool `[]`."""
  del story
  answer, place, newline = _end(actions, mask)
  is_place = (place >= _PLACE) & (place < _PLACE + len(PLACES))
  return (answer == ANSWER) & is_place & (newline == NEWLINE) & (
      jnp.sum((actions == ANSWER) & mask, dtype=jnp.int32) == 1)


def _end(actions, mask):
  """Returns the last three tokens of a response; `PAD` where it is shorter."""
  last = jnp.sum(mask, dtype=jnp.int32)
  return [jnp.where(last >= n, actions[jnp.maximum(last - n, 0)], PAD) for n in (3, 2, 1)]


def _row(words):
  return jnp.stack([jnp.asarray(word, jnp.int32) for word in words])


def _sentences(story: Story) -> tuple[chex.Array, chex.Array]:
  """Writes each fact as a sentence: int32 `[M, 7]` words and `[M]` their number."""
  goes, gives = story.kinds == GO, story.kinds == GIVE
  verb = jnp.array(VERBS, jnp.int32)[story.kinds]
  name, thing = _NAME + story.actors, jnp.where(goes, _PLACE, _OBJECT) + story.things
  columns = (name, verb, jnp.where(goes, TO, THE), jnp.where(goes, THE, thing),
             jnp.where(goes, thing, jnp.where(gives, TO, STOP)), jnp.where(gives, _NAME + story.receivers, STOP),
             jnp.full_like(name, STOP))
  lengths = jnp.where(goes, 6, jnp.where(gives, 7, 5)).astype(jnp.int32)
  return jnp.stack([column.astype(jnp.int32) for column in columns], 1), lengths


def _joined(words, lengths, end, kept, size) -> tuple[chex.Array, chex.Array]:
  """Joins the first `lengths` words of each sentence and the kept words of `end` to one row of `size` words.

  Returns:
    int32 `[size]`, padded behind, and the number of words.
  """
  mask = jnp.arange(words.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
  flat = jnp.concatenate([words.reshape(-1), end])
  mask = jnp.concatenate([mask.reshape(-1), kept])
  place = jnp.cumsum(mask, dtype=jnp.int32) - 1
  row = jnp.full(size, PAD, jnp.int32).at[jnp.where(mask, place, size)].set(flat, mode='drop')
  return row, jnp.sum(mask, dtype=jnp.int32)
