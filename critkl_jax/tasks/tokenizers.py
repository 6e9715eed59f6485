"""What a task asks of a tokenizer, and the character vocabulary: one character is one token."""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import numpy as np

ADDITION_ALPHABET = '%\n +,-/0123456789:<=>ACDEINT[]aceghnprstu'


class Tokenizer(Protocol):
  """A vocabulary: `CharTokenizer`, `text_tokenizer.TextTokenizer`, or any other class with these members."""

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""

  @property
  def pad_id(self) -> int:
    """Id that pads."""

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text as int32 ids `[n]`."""

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Decodes token ids `[T]`, or only the ids where `mask` `[T]` is true."""

  def token_texts(self, tokens: Iterable[int]) -> list[str]:
    """Returns the text of each single token."""


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  """Maps characters to token ids and back.

  Attributes:
    alphabet: the characters, in the order of their ids. The first one is the padding character.
    vocab_size: number of token ids; 0 for one id per character. A larger number pads the vocabulary to a larger
      model's; the further ids stand for no character.
  """

  alphabet: str = ADDITION_ALPHABET
  vocab_size: int = 0

  def __post_init__(self):
    if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
      raise ValueError(f'alphabet: expected distinct characters, at least one; got {self.alphabet!r}.')
    if self.vocab_size and self.vocab_size < len(self.alphabet):
      raise ValueError(f'vocab_size: expected {len(self.alphabet)} or more, one for each character, or 0; got '
                       f'{self.vocab_size}.')
    object.__setattr__(self, 'vocab_size', self.vocab_size or len(self.alphabet))

  @property
  def pad_id(self) -> int:
    """Id of the padding character."""
    return 0

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text as int32 ids `[len(text)]`.

    Raises:
      ValueError: if a character is not in the alphabet.
    """
    unknown = sorted(set(text) - set(self.alphabet))
    if unknown:
      raise ValueError(f'text: characters {unknown} are not in the alphabet {self.alphabet!r}.')
    ids = {character: i for i, character in enumerate(self.alphabet)}
    return np.array([ids[character] for character in text], np.int32)

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Decodes token ids `[T]`, or only the ids where `mask` `[T]` is true.

    Ids past the alphabet (the vocabulary may be padded) become the replacement character U+FFFD.
    """
    ids = np.asarray(tokens)
    if mask is not None:
      ids = ids[np.asarray(mask, bool)]
    return ''.join(self.token_texts(ids.tolist()))

  def token_texts(self, tokens: Iterable[int]) -> list[str]:
    """Returns the character of each id, U+FFFD for ids past the alphabet."""
    return [self.alphabet[i] if 0 <= i < len(self.alphabet) else '\ufffd' for i in tokens]
