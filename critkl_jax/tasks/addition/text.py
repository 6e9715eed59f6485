"""Renders text of the addition task in arrays of fixed shapes.

A text begins as an array of all characters that it may contain, each with a flag that says whether it is valid. Then
`compact` moves the valid characters to the front.
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Solution
from critkl_jax.tasks.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer()
END_OF_SCRATCHPAD = '</scratch>\n'
END_OF_SCRATCHPAD_IDS = TOKENIZER.encode(END_OF_SCRATCHPAD)
DIGIT_ZERO = int(TOKENIZER.encode('0')[0])  # the ids of the ten digits are consecutive


class Piece(NamedTuple):
  """Candidate characters, `[num_candidates]`: token ids, whether each is in the text, and whether it is critical."""

  tokens: chex.Array
  valid: chex.Array
  critical: chex.Array


def literal(text: str, valid: chex.Array | bool = True) -> Piece:
  """Makes the piece of a fixed text, valid or not as a whole."""
  tokens = jnp.asarray(TOKENIZER.encode(text), jnp.int32)
  return Piece(tokens, jnp.full(tokens.shape, valid), jnp.zeros(tokens.shape, bool))


def digit(value: chex.Array, valid: chex.Array | bool = True) -> Piece:
  """Makes the piece of one digit, int32 `[]` in 0..9."""
  return Piece((value + DIGIT_ZERO)[None], jnp.asarray(valid)[None], jnp.zeros(1, bool))


def join(*pieces: Piece) -> Piece:
  """Concatenates pieces."""
  return Piece(*(jnp.concatenate(parts) for parts in zip(*pieces)))


def fill(template: Sequence[tuple[str, str]], values: dict[str, chex.Array], stands: dict[str, chex.Array]) -> Piece:
  """Fills a template with digits, by two gathers, which compile faster than a `Piece` for each part.

  Args:
    template: pairs of a text and a key of `stands`. `{name}` as a text means the digits `values[name]`; a character
      after it, as in `{name},`, separates them.
    values: name -> digits, int32 `[num_digits]` or `[]`.
    stands: key -> whether the text is there, bool `[]`, or `[num_digits]` for digits.

  Returns:
    The `Piece`.
  """
  first_value, first_flag, num_values, num_flags = {}, {}, TOKENIZER.vocab_size, 0
  for name, value in values.items():
    first_value[name], num_values = num_values, num_values + jnp.size(value)
  for name, flag in stands.items():
    first_flag[name], num_flags = num_flags, num_flags + jnp.size(flag)
  # Of each character: index of its token, index of its flag, and false for a separator before the first digit.
  sources, flags, inner = [], [], []
  for text, key in template:
    flag = first_flag[key]
    if not text.startswith('{'):
      sources += TOKENIZER.encode(text).tolist()
      flags += [flag] * len(text)
      inner += [True] * len(text)
      continue
    name, separator = text[1:].split('}')
    for i in range(jnp.size(values[name])):
      own = flag + (i if jnp.ndim(stands[key]) else 0)
      sources += [*TOKENIZER.encode(separator).tolist(), first_value[name] + i]
      flags += [own] * (len(separator) + 1)
      inner += [i > 0] * len(separator) + [True]
  digits = (jnp.ravel(v) + DIGIT_ZERO for v in values.values())
  tokens = jnp.concatenate([jnp.arange(TOKENIZER.vocab_size, dtype=jnp.int32), *digits])
  valid = jnp.concatenate([jnp.ravel(f) for f in stands.values()])[np.array(flags)] & np.array(inner)
  return Piece(tokens[np.array(sources)], valid, jnp.zeros(len(sources), bool))


def compact(piece: Piece, length: int) -> Solution:
  """Moves the valid characters to the front of arrays `[length]` and drops characters that do not fit."""
  total = jnp.cumsum(piece.valid, dtype=jnp.int32)
  # The index of the i-th valid candidate, by search, because a scatter is slow on every kind of device.
  source = jnp.searchsorted(total, jnp.arange(1, length + 1, dtype=jnp.int32), method='scan_unrolled')
  mask = jnp.arange(length, dtype=jnp.int32) < total[-1]
  source = jnp.where(mask, source, 0)
  return Solution(tokens=jnp.where(mask, piece.tokens[source], TOKENIZER.pad_id), mask=mask,
                  critical=mask & piece.critical[source])
