"""Character vocabulary: one character is one token."""

import dataclasses
from collections.abc import Iterable

import numpy as np

ADDITION_ALPHABET = '%\n +,-/0123456789:<=>ACDEINT[]aceghnprstu'


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  """Maps characters to token ids and back.

  Attributes:
    alphabet: the characters, in the order of their ids. The first one is the padding character.
  """

  alphabet: str = ADDITION_ALPHABET

  def __post_init__(self):
    if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
      raise ValueError(f'alphabet: expected distinct characters, at least one; got {self.alphabet!r}.')

  @property
  def vocab_size(self) -> int:
    return len(self.alphabet)

  @property
  def pad_id(self) -> int:
    return 0

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids `[len(text)]` of a text.

    Raises:
      ValueError: if a character is not in the alphabet.
    """
    unknown = sorted(set(text) - set(self.alphabet))
    if unknown:
      raise ValueError(f'text: characters {unknown} are not in the alphabet {self.alphabet!r}.')
    ids = {character: i for i, character in enumerate(self.alphabet)}
    return np.array([ids[character] for character in text], np.int32)

  def decode(self, tokens: Iterable[int], mask: Iterable[bool] | None = None) -> str:
    """Returns the text of token ids `[T]`, of those alone where `mask` `[T]` is true if it is given.

    Ids past the alphabet (a model may have a larger vocabulary) become the replacement character U+FFFD.
    """
    ids = np.asarray(tokens)
    if mask is not None:
      ids = ids[np.asarray(mask, bool)]
    return ''.join(self.alphabet[i] if 0 <= i < self.vocab_size else '\ufffd' for i in ids.tolist())
