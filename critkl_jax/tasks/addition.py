"""Addition with a written-out scratchpad, the task of Vassoyan et al. (arXiv 2502.06533, section 4).

Operands are digit arrays, least significant digit first, so that no number of digits overflows. Text is rendered in
pieces of fixed shape (tasks/text.py).
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from critkl_jax.records import Problem, Solution, Tokens
from critkl_jax.tasks.addition_draft import draft_addition
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.text import DIGIT_ZERO, END_OF_SCRATCHPAD, TOKENIZER, Piece, compact, digit, join, literal

LENGTH_MARGIN = 100
NUM_CRITICAL_LINES = 3  # scratchpad lines in which the released code looks for critical tokens
CRITICAL_KINDS = ('first_comma', 'first_digit', 'second_comma', 'second_digit')

_END_OF_SCRATCHPAD_IDS = TOKENIZER.encode(END_OF_SCRATCHPAD)


# Problems.


def make_problem(a: int, b: int, max_digits: int) -> Problem:
  """Returns the problem `a + b` in arrays for operands of up to `max_digits` digits.

  Raises:
    ValueError: if an operand is negative or has more digits.
  """
  for name, operand in (('a', a), ('b', b)):
    if operand < 0 or len(str(operand)) > max_digits:
      raise ValueError(f'{name}: expected an integer of 1..{max_digits} digits, got {operand}.')
  rows = [[int(c) for c in reversed(str(operand).zfill(max_digits))] for operand in (a, b)]
  return Problem(digits=jnp.array(rows, jnp.int32), lengths=jnp.array([len(str(a)), len(str(b))], jnp.int32))


def sample_operands(key: chex.PRNGKey, lengths: chex.Array, max_digits: int) -> Problem:
  """Draws both operands uniformly among the integers with the given numbers of digits.

  Args:
    key: PRNG key, consumed.
    lengths: int32 `[2]` numbers of digits, 1..max_digits. One-digit operands include 0.
    max_digits: M.

  Returns:
    A `Problem` with `[2, M]` digits.
  """
  place = jnp.arange(max_digits, dtype=jnp.int32)[None]
  leading = (place == lengths[:, None] - 1) & (lengths[:, None] > 1)
  digits = _draw(key, (2, max_digits), leading.astype(jnp.int32), 10)
  return Problem(digits=jnp.where(place < lengths[:, None], digits, 0), lengths=lengths.astype(jnp.int32))


def identical_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Returns the lengths `[2]` of two operands of `num_digits` digits each; the key is not used."""
  del key
  return jnp.full((2,), num_digits, jnp.int32)


def varying_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]`: one operand, by a fair coin, has `num_digits` digits, the other 1..num_digits uniformly."""
  other, coin = jax.random.split(key)
  lengths = jnp.stack([jnp.int32(num_digits), _draw(other, (), 1, num_digits + 1)])
  return jnp.where(_coin(coin), lengths, lengths[::-1])


def pretraining_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]`, each uniform in 1..num_digits."""
  return _draw(key, (2,), 1, num_digits + 1)


def longest_lengths(key: chex.PRNGKey, num_digits: int) -> chex.Array:
  """Draws lengths `[2]` as `pretraining_lengths` does, given that the longer one is exactly `num_digits`."""
  index = _draw(key, (), 0, 2 * num_digits - 1)
  return jnp.where(index < num_digits, jnp.stack([jnp.int32(num_digits), index + 1]),
                   jnp.stack([index - num_digits + 1, jnp.int32(num_digits)]))


def plus_lengths(key: chex.PRNGKey, num_digits: int, extra_digits: int) -> chex.Array:
  """Draws lengths `[2]` of the paper's "plus k" problems with N = `num_digits`, k = `extra_digits`.

  One operand, by a fair coin, has exactly N + k digits; the other is uniform in 1..N with probability 1/2 and otherwise
  uniform in N+1..N+k. With k = 0 the other is uniform in 1..N.
  """
  if extra_digits == 0:
    return varying_lengths(key, num_digits)
  known, new, which, coin = jax.random.split(key, 4)
  longest = num_digits + extra_digits
  other = jnp.where(_coin(which), _draw(known, (), 1, num_digits + 1), _draw(new, (), num_digits + 1, longest + 1))
  lengths = jnp.stack([jnp.int32(longest), other])
  return jnp.where(_coin(coin), lengths, lengths[::-1])


# Types are named: the defaults of JAX depend on `jax_enable_x64`, and other types are other problems.


def _draw(key, shape, least, end):
  return jax.random.randint(key, shape, least, end, dtype=jnp.int32)


def _coin(key):
  return jax.random.bernoulli(key, jnp.float32(0.5))


# Text.


def solution_length(num_digits: int) -> int:
  """Returns the number of characters of the longest solution for operands of up to `num_digits` digits."""
  n = num_digits
  digit_list = [2] + [2 * k + 1 for k in range(1, n + 1)]  # characters of a list of k digits
  line = len(' +  , A= , C=0 , 9+9+0=18 , A->8 , C->1\n')
  lines = sum(line + 2 * digit_list[n - i] + digit_list[i] for i in range(n))
  last_line = len('[] + [] , A= C=1 , END\n') + digit_list[n]
  return len('\n<scratch>\n') + lines + last_line + len(END_OF_SCRATCHPAD) + 2 * (n + 1)


def prompt_length(num_digits: int) -> int:
  """Returns the number of characters of the longest prompt for operands of up to `num_digits` digits."""
  return len('Input:\n+\nTarget:') + 2 * num_digits


def render_prompt(problem: Problem) -> Tokens:
  """Returns the prompt as `Tokens` `[prompt_length(M)]`, padded on the left."""
  a, b = (_number(problem.digits[i], problem.lengths[i]) for i in range(2))
  pieces = join(literal('Input:\n'), a, literal('+'), b, literal('\nTarget:'))
  text = compact(pieces, prompt_length(problem.digits.shape[-1]))
  shift = jnp.sum(~text.mask, dtype=jnp.int32)
  return Tokens(tokens=jnp.roll(text.tokens, shift), mask=jnp.roll(text.mask, shift))


def render_solution(problem: Problem, known_digits: int, length: int) -> Solution:
  """Returns the solution text and its critical tokens.

  On the first three scratchpad lines, the comma before and the digit at every list position past `known_digits` are
  critical (arXiv 2502.06533, section 4).

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
  """Returns bool `[T]` of each of the `CRITICAL_KINDS` of a solution `[T]`: `first_comma` (does the first operand go
  on?), `first_digit` (how does it?), and those of the second operand."""
  bracket, comma = TOKENIZER.encode('],')
  # A line has three lists: both operands and the digits of the sum.
  lists = jnp.cumsum(solution.tokens == bracket, dtype=jnp.int32) % 3
  first, commas = lists == 0, solution.tokens == comma
  kinds = first & commas, first & ~commas, (lists == 1) & commas, (lists == 1) & ~commas
  return {name: solution.critical & kind for name, kind in zip(CRITICAL_KINDS, kinds)}


def render_result(problem: Problem) -> Tokens:
  """Returns the result line, digits with one blank between and a line break at the end, as `Tokens` `[2 (M + 1)]`."""
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


# Reward.


def reward(problem: Problem, actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns 1 if the response holds `</scratch>`, then exactly the right result and a line break, else 0.

  The scratchpad itself is not judged. What `mask` hides and padding at the end are not part of the response; anything
  else after the line break makes it wrong.

  Args:
    problem: digits `[2, M]`, lengths `[2]`.
    actions: int32 `[T]` response tokens.
    mask: bool `[T]` true at the tokens of the response, a run from the start.

  Returns:
    float32 `[]`.
  """
  chex.assert_rank([actions, mask], [1, 1])
  result = render_result(problem)
  text, found, start, length = _find_answer(actions, mask)
  padded = jnp.pad(text, (0, len(_END_OF_SCRATCHPAD_IDS) + result.tokens.size), constant_values=TOKENIZER.pad_id)
  answer = jax.lax.dynamic_slice(padded, (start,), (result.tokens.size,))
  right = jnp.all((answer == result.tokens) | ~result.mask) & (length == start + jnp.sum(result.mask, dtype=jnp.int32))
  return (found & right).astype(jnp.float32)


def well_formed(actions: chex.Array, mask: chex.Array) -> chex.Array:
  """Returns whether a response ends in `</scratch>` and a result: digits with one blank between, and a line break.

  Args:
    actions: int32 `[T]` response tokens.
    mask: bool `[T]` true at the tokens of the response, a run from the start.

  Returns:
    bool `[]`.
  """
  chex.assert_rank([actions, mask], [1, 1])
  text, found, start, length = _find_answer(actions, mask)
  place = jnp.arange(text.size, dtype=jnp.int32) - start
  is_digit = (text >= DIGIT_ZERO) & (text < DIGIT_ZERO + 10)
  blank, line_break = TOKENIZER.encode(' \n')
  fits = jnp.where(place % 2 == 0, is_digit, text == jnp.where(place == length - start - 1, line_break, blank))
  number = length - start
  return found & (number >= 2) & (number % 2 == 0) & jnp.all(fits | (place < 0) | (place >= number))


def _find_answer(actions, mask):
  """Returns the response `[T]`, padded; whether the end of the scratchpad stands in it, where the answer starts after
  it, and the response's length without the padding at its end."""
  text = jnp.where(mask, actions, TOKENIZER.pad_id)
  marker = len(_END_OF_SCRATCHPAD_IDS)
  padded = jnp.pad(text, (0, marker), constant_values=TOKENIZER.pad_id)
  here = functools.reduce(
      jnp.logical_and, [padded[i:i + text.size] == token for i, token in enumerate(_END_OF_SCRATCHPAD_IDS)])
  length = text.size - jax.lax.argmax(text[::-1] != TOKENIZER.pad_id, 0, jnp.int32)
  return text, jnp.any(here), jax.lax.argmax(here, 0, jnp.int32) + marker, length


# The task.


def addition(known_digits: int, max_digits: int, lengths: Callable[[chex.PRNGKey], chex.Array],
             length_margin: int = LENGTH_MARGIN) -> Task:
  """Makes the addition task.

  Args:
    known_digits: N, the most digits seen in pre-training; it places the critical tokens.
    max_digits: M, the most digits of an operand; it sizes the arrays.
    lengths: key -> int32 `[2]` numbers of digits, one of the distributions above with its numbers bound.
    length_margin: characters that a response may have beyond the longest solution; 100 in the released code.

  Returns:
    The `Task`.

  Raises:
    ValueError: unless 1 <= known_digits and 1 <= max_digits.
  """
  if known_digits < 1 or max_digits < 1:
    raise ValueError(f'known_digits and max_digits: expected 1 or more, got {known_digits} and {max_digits}.')
  response_length = solution_length(max_digits) + length_margin

  def sample(key):
    lengths_key, digits_key = jax.random.split(key)
    return sample_operands(digits_key, lengths(lengths_key), max_digits)

  return Task(
      tokenizer=TOKENIZER,
      prompt_length=prompt_length(max_digits),
      response_length=response_length,
      stop=stop_after([_END_OF_SCRATCHPAD_IDS, TOKENIZER.encode('\n')], [TOKENIZER.pad_id]),
      sample=sample,
      prompt=render_prompt,
      solution=functools.partial(render_solution, known_digits=known_digits, length=response_length),
      reward=reward,
      well_formed=well_formed,
      solution_length=solution_length(max_digits),
      draft=draft_addition)


def plus_task(known_digits: int, extra_digits: int) -> Task:
  """Makes the task of the paper's fine-tuning: "plus k" problems with N = `known_digits`, k = `extra_digits`."""
  lengths = functools.partial(plus_lengths, num_digits=known_digits, extra_digits=extra_digits)
  return addition(known_digits, known_digits + extra_digits, lengths)


def check_vocabulary(vocab_size: int) -> None:
  """Checks that a model has a token for each character of the task.

  Raises:
    ValueError: if it has fewer.
  """
  if vocab_size < TOKENIZER.vocab_size:
    raise ValueError(f'vocab_size: the task has {TOKENIZER.vocab_size} characters, got {vocab_size}.')


def pretraining_task(known_digits: int, longest: int) -> Task:
  """Makes the task of pre-training examples whose longer operand has `longest` of `known_digits` digits, for batches of
  nearly equal length."""
  return addition(known_digits, longest, functools.partial(longest_lengths, num_digits=longest), length_margin=0)
