"""Prompts and right solutions: addition with a written-out scratchpad (Vassoyan et al., arXiv 2502.06533, section 4).

Text is rendered in pieces of fixed shape (`text.py`).
"""

import functools

import chex
import jax
import jax.numpy as jnp

from critkl_jax.records import Solution, Tokens
from critkl_jax.tasks.addition.problem import Problem
from critkl_jax.tasks.addition.text import (
    DIGIT_ZERO,
    END_OF_SCRATCHPAD,
    TOKENIZER,
    Piece,
    compact,
    digit,
    join,
    literal,
)

NUM_CRITICAL_LINES = 3  # scratchpad lines in which the released code looks for critical tokens
CRITICAL_KINDS = ('first_comma', 'first_digit', 'second_comma', 'second_digit')


def solution_length(num_digits: int) -> int:
  """Returns the number of characters of the longest solution for operands of up to `num_digits` digits."""
  n = num_digits
  digit_list = [2] + [2 * i + 1 for i in range(1, n + 1)]  # characters of a list, by its number of digits
  line = len(' +  , A= , C=0 , 9+9+0=18 , A->8 , C->1\n')
  lines = sum(line + 2 * digit_list[n - i] + digit_list[i] for i in range(n))
  last_line = len('[] + [] , A= C=1 , END\n') + digit_list[n]
  return len('\n<scratch>\n') + lines + last_line + len(END_OF_SCRATCHPAD) + 2 * (n + 1)


def prompt_length(num_digits: int) -> int:
  """Returns the number of characters of the longest prompt for operands of up to `num_digits` digits."""
  return len('Input:\n+\nTarget:') + 2 * num_digits


def render_prompt(problem: Problem) -> Tokens:
  """Writes the prompt: `Tokens` `[prompt_length(M)]`, padded on the left."""
  a, b = (_number(problem.digits[i], problem.lengths[i]) for i in range(2))
  pieces = join(literal('Input:\n'), a, literal('+'), b, literal('\nTarget:'))
  text = compact(pieces, prompt_length(problem.digits.shape[-1]))
  shift = jnp.sum(~text.mask, dtype=jnp.int32)
  return Tokens(tokens=jnp.roll(text.tokens, shift), mask=jnp.roll(text.mask, shift))


def render_solution(problem: Problem, known_digits: int, length: int) -> Solution:
  """Writes the solution and marks its critical tokens.

  The critical tokens stand on the first three scratchpad lines, in the lists of both operands: each digit past the
  first `known_digits` of a list, and the comma before it (arXiv 2502.06533, section 4).

  Args:
    problem: digits `[2, M]`, lengths `[2]`.
    known_digits: N, the most digits seen in pre-training.
    length: T, at least `solution_length(M)`.

  Returns:
    A `Solution` `[T]`, padded on the right.
  """
  sums, carries = add(problem)
  num_lines = jnp.max(problem.lengths)
  line = functools.partial(_line, problem=problem, sums=sums, carries=carries, known_digits=known_digits)
  lines = jax.vmap(line)(jnp.arange(problem.digits.shape[-1], dtype=jnp.int32))
  carry = carries[num_lines]
  last_line = join(
      literal('[] + [] , A='), _list(sums, 0, num_lines), literal(' C='), digit(carry), literal(' , END\n'))
  pieces = join(
      literal('\n<scratch>\n'), Piece(*(x.reshape(-1) for x in lines)), last_line, literal(END_OF_SCRATCHPAD),
      _result(sums, carry, num_lines))
  return compact(pieces, length)


def critical_kinds(solution: Solution) -> dict[str, chex.Array]:
  """Splits the critical tokens of a solution `[T]` into the `CRITICAL_KINDS`, a mask bool `[T]` for each.

  `first_comma` decides whether the list of the first operand goes on, `first_digit` with which digit; `second_comma`
  and `second_digit` do the same for the second operand.
  """
  bracket, comma = TOKENIZER.encode('],')
  # A line has three lists: both operands and the digits of the sum.
  lists = jnp.cumsum(solution.tokens == bracket, dtype=jnp.int32) % 3
  first, commas = lists == 0, solution.tokens == comma
  kinds = first & commas, first & ~commas, (lists == 1) & commas, (lists == 1) & ~commas
  return {name: solution.critical & kind for name, kind in zip(CRITICAL_KINDS, kinds)}


def render_result(problem: Problem) -> Tokens:
  """Writes the result line, digits with one blank between and a line break at the end: `Tokens` `[2 (M + 1)]`."""
  sums, carries = add(problem)
  num_lines = jnp.max(problem.lengths)
  text = compact(_result(sums, carries[num_lines], num_lines), 2 * (problem.digits.shape[-1] + 1))
  return Tokens(tokens=text.tokens, mask=text.mask)


def add(problem: Problem) -> tuple[chex.Array, chex.Array]:
  """Returns the digits of the sum `[M]` and the carry into each place `[M + 1]`, least significant first."""

  def place(carry, digits):
    total = jnp.sum(digits, dtype=jnp.int32) + carry
    return total // 10, (total % 10, carry)

  last, (sums, carries) = jax.lax.scan(place, jnp.int32(0), problem.digits.T)
  return sums, jnp.append(carries, last)


def _line(i, problem, sums, carries, known_digits) -> Piece:
  (a, b), (a_length, b_length) = problem.digits, problem.lengths
  total = a[i] + b[i] + carries[i]
  seen = jnp.where(i < NUM_CRITICAL_LINES, known_digits, a.shape[-1])
  pieces = join(
      _list(a, i, a_length, seen), literal(' + '), _list(b, i, b_length, seen),
      literal(' , A='), _list(sums, 0, i), literal(' , C='), digit(carries[i]),
      literal(' , '), digit(a[i]), literal('+'), digit(b[i]), literal('+'), digit(carries[i]), literal('='),
      digit(total // 10, total >= 10), digit(total % 10),
      literal(' , A->'), digit(sums[i]), literal(' , C->'), digit(carries[i + 1]), literal('\n'))
  return pieces._replace(valid=pieces.valid & (i < jnp.max(problem.lengths)))


def _list(digits, start, stop, known_digits=None) -> Piece:
  """Writes `[d,d,d]`: the digits of places start..stop-1, most significant first."""
  size = digits.shape[-1]
  place = jnp.arange(size, dtype=jnp.int32)[::-1]
  position = stop - place  # 1 for the first digit of the list
  stands = (place >= start) & (place < stop)
  critical = stands & (position > (size if known_digits is None else known_digits))
  comma = stands & (position > 1)
  characters = Piece(
      tokens=_after(',', digits[::-1] + DIGIT_ZERO),
      valid=jnp.stack([comma, stands], -1).reshape(-1),
      critical=jnp.stack([critical, critical], -1).reshape(-1))
  return join(literal('['), characters, literal(']'))


def _after(character, tokens):
  """Writes the character before each token."""
  return jnp.stack([jnp.full(tokens.size, TOKENIZER.encode(character)[0], jnp.int32), tokens], -1).reshape(-1)


def _number(digits, length) -> Piece:
  stands = jnp.arange(digits.shape[-1], dtype=jnp.int32)[::-1] < length
  return Piece(digits[::-1] + DIGIT_ZERO, stands, jnp.zeros_like(stands))


def _result(sums, carry, num_digits) -> Piece:
  size = sums.shape[-1]
  place = jnp.arange(size, dtype=jnp.int32)[::-1]
  stands = place < num_digits
  blank = stands & ((place < num_digits - 1) | (carry > 0))
  digits = Piece(
      tokens=_after(' ', sums[::-1] + DIGIT_ZERO),
      valid=jnp.stack([blank, stands], -1).reshape(-1), critical=jnp.zeros(2 * size, bool))
  return join(digit(carry, carry > 0), digits, literal('\n'))
