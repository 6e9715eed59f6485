"""Text of the addition task, rendered for fixed shapes: every character that might stand somewhere, with a flag that
says whether it does; the valid ones are moved to the front at the end."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Solution
from critkl_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer()
END_OF_SCRATCHPAD = '</scratch>\n'
DIGIT_ZERO = int(TOKENIZER.encode('0')[0])  # the ids of the ten digits are consecutive


class Piece(NamedTuple):
  """Candidate characters `[C]`: their token ids, whether they stand in the text, whether they are critical."""

  tokens: chex.Array
  valid: chex.Array
  critical: chex.Array


def literal(text: str, valid: chex.Array | bool = True) -> Piece:
  """Returns a text that stands there, or not, as a whole."""
  tokens = jnp.asarray(TOKENIZER.encode(text), jnp.int32)
  return Piece(tokens, jnp.full(tokens.shape, valid), jnp.zeros(tokens.shape, bool))


def digit(value: chex.Array, valid: chex.Array | bool = True) -> Piece:
  """Returns one digit, int32 `[]` in 0..9."""
  return Piece((value + DIGIT_ZERO)[None], jnp.asarray(valid)[None], jnp.zeros(1, bool))


def join(*pieces: Piece) -> Piece:
  """Returns pieces one after the other."""
  return Piece(*(jnp.concatenate(parts) for parts in zip(*pieces)))


def fill(template: Sequence[tuple[str, str]], values: dict[str, chex.Array], stands: dict[str, chex.Array]) -> Piece:
  """Fills a template: two gathers instead of an array for each piece, which matters where compilation does.

  Args:
    template: pairs of a text and a key of `stands`; `{name}` as a text means the digits `values[name]`, and a character
      behind it, as in `{name},`, what separates them.
    values: int32 `[n]` or `[]` digits by name.
    stands: bool `[]`, or for digits `[n]`, whether a text stands there, by name.

  Returns:
    The `Piece`.
  """
  first_value, first_flag, num_values, num_flags = {}, {}, TOKENIZER.vocab_size, 0
  for name, value in values.items():
    first_value[name], num_values = num_values, num_values + jnp.size(value)
  for name, flag in stands.items():
    first_flag[name], num_flags = num_flags, num_flags + jnp.size(flag)
  sources, flags, inner = [], [], []  # of each character: token, flag, false before the first digit of a list
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
  """Moves the valid characters to the front of arrays `[length]`; those that do not fit are dropped."""
  total = jnp.cumsum(piece.valid, dtype=jnp.int32)
  # The candidate that is the i-th valid one; a search, because a scatter is slow on every kind of device.
  source = jnp.searchsorted(total, jnp.arange(1, length + 1, dtype=jnp.int32), method='scan_unrolled')
  mask = jnp.arange(length, dtype=jnp.int32) < total[-1]
  source = jnp.where(mask, source, 0)
  return Solution(tokens=jnp.where(mask, piece.tokens[source], TOKENIZER.pad_id), mask=mask,
                  critical=mask & piece.critical[source])
