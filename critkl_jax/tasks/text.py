"""Text of the addition task, rendered for fixed shapes: every character that might stand somewhere, with a flag that
says whether it does; the valid ones are moved to the front at the end."""

from typing import NamedTuple

import chex
import jax.numpy as jnp

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
  tokens = jnp.asarray(TOKENIZER.encode(text))
  return Piece(tokens, jnp.full(tokens.shape, valid), jnp.zeros(tokens.shape, bool))


def digit(value: chex.Array, valid: chex.Array | bool = True) -> Piece:
  """Returns one digit, int32 `[]` in 0..9."""
  return Piece((value + DIGIT_ZERO)[None], jnp.asarray(valid)[None], jnp.zeros(1, bool))


def join(*pieces: Piece) -> Piece:
  """Returns pieces one after the other."""
  return Piece(*(jnp.concatenate(parts) for parts in zip(*pieces)))


def compact(piece: Piece, length: int) -> Solution:
  """Moves the valid characters to the front of arrays `[length]`; those that do not fit are dropped."""
  total = jnp.cumsum(piece.valid)
  # The candidate that is the i-th valid one; a search, because a scatter is slow on every kind of device.
  source = jnp.searchsorted(total, jnp.arange(1, length + 1), method='scan_unrolled')
  mask = jnp.arange(length) < total[-1]
  source = jnp.where(mask, source, 0)
  return Solution(tokens=jnp.where(mask, piece.tokens[source], TOKENIZER.pad_id), mask=mask,
                  critical=mask & piece.critical[source])
