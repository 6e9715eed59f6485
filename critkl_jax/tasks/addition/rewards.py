"""Rewards of responses to addition problems, and the check of their form."""

import functools

import chex
import jax
import jax.numpy as jnp

from critkl_jax.tasks.addition.problem import Problem
from critkl_jax.tasks.addition.solution import render_result
from critkl_jax.tasks.addition.text import DIGIT_ZERO, END_OF_SCRATCHPAD_IDS, TOKENIZER


def reward(problem: Problem, actions: chex.Array, mask: chex.Array, wrong_reward: float = 0.0) -> chex.Array:
  """Returns 1 if exactly the right result follows the first `</scratch>` and line break, else `wrong_reward`.

  The scratchpad itself is not judged. Any text after the result's line break makes the response wrong; masked tokens
  and padding at the end are not part of the response.

  Args:
    problem: digits `[2, M]`, lengths `[2]`.
    actions: int32 `[T]` response tokens.
    mask: bool `[T]` true at the tokens of the response, a run from the start.
    wrong_reward: reward of a wrong response.

  Returns:
    float32 `[]`.
  """
  chex.assert_rank([actions, mask], [1, 1])
  result = render_result(problem)
  text, found, start, length = _find_answer(actions, mask)
  padded = jnp.pad(text, (0, len(END_OF_SCRATCHPAD_IDS) + result.tokens.size), constant_values=TOKENIZER.pad_id)
  answer = jax.lax.dynamic_slice(padded, (start,), (result.tokens.size,))
  right = jnp.all((answer == result.tokens) | ~result.mask) & (length == start + jnp.sum(result.mask, dtype=jnp.int32))
  right = (found & right).astype(jnp.float32)
  return right + wrong_reward * (1.0 - right)


def well_formed(problem: Problem, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns whether a response ends in `</scratch>` and a result: digits separated by blanks, and a line break.

  Args:
    problem: not used: the form is the same for all problems.
    actions: int32 `[T]` response tokens.
    mask: bool `[T]` true at the tokens of the response, a run from the start.

  Returns:
    bool `[]`.
  """
  del problem
  chex.assert_rank([actions, mask], [1, 1])
  text, found, start, length = _find_answer(actions, mask)
  place = jnp.arange(text.size, dtype=jnp.int32) - start
  is_digit = (text >= DIGIT_ZERO) & (text < DIGIT_ZERO + 10)
  blank, line_break = TOKENIZER.encode(' \n')
  fits = jnp.where(place % 2 == 0, is_digit, text == jnp.where(place == length - start - 1, line_break, blank))
  number = length - start
  return found & (number >= 2) & (number % 2 == 0) & jnp.all(fits | (place < 0) | (place >= number))


def _find_answer(actions, mask):
  """Finds the answer after the end of the scratchpad.

  Returns the padded response `[T]`, whether its scratchpad ends, the position of the answer, and the response's length
  without padding.
  """
  text = jnp.where(mask, actions, TOKENIZER.pad_id)
  marker = len(END_OF_SCRATCHPAD_IDS)
  padded = jnp.pad(text, (0, marker), constant_values=TOKENIZER.pad_id)
  here = functools.reduce(
      jnp.logical_and, [padded[i:i + text.size] == token for i, token in enumerate(END_OF_SCRATCHPAD_IDS)])
  length = text.size - jax.lax.argmax(text[::-1] != TOKENIZER.pad_id, 0, jnp.int32)
  return text, jnp.any(here), jax.lax.argmax(here, 0, jnp.int32) + marker, length
