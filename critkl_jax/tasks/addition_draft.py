"""What somebody who knows the addition task expects a response to say next: drafts for speculative rollouts.

A right solution is a poor draft once the policy has left it: a digit too many, or a wrong sum, and every later line is
another one. So the draft is made anew from the episode's own text. The digits, lists and carry of the last finished
line say what the next line should be by the rules of the scratchpad; fields that the unfinished line already has
replace what was expected there; and where the unfinished line departs from that expectation, the draft goes on at the
place whose last characters agree best.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.drafts import NUM_LOOKED_UP, agreement
from critkl_jax.records import Problem
from critkl_jax.tasks.text import DIGIT_ZERO, END_OF_SCRATCHPAD, TOKENIZER, Piece, compact, digit, join, literal

_NONE = -1  # no token: it agrees with nothing
_NEWLINE = int(TOKENIZER.encode('\n')[0])
_LAST_LINE = int(TOKENIZER.encode('N')[0])  # stands in END alone
_AFTER_SCRATCHPAD = TOKENIZER.encode('</')
# A field of a line begins behind these two characters; the first one at the start of the line.
_MARKERS = tuple(TOKENIZER.encode(marker) for marker in (' +', 'A=', 'C=', 'A-', 'C-'))
_LIST_A, _LIST_B, _LIST_SUM, _CARRY, _NEW_DIGIT, _NEW_CARRY = range(6)
_DISTANCE = 0.1  # agreeing characters that outweigh one character of distance
_MARGIN = 2.0  # agreeing characters that the text itself must have more than what is expected


class _Digits(NamedTuple):
  """Some digits in the order of the text: int32 `[K]`, and how many of them there are, int32 `[]`."""

  values: chex.Array
  count: chex.Array

  def get(self, i: int, otherwise: chex.Array) -> chex.Array:
    """Returns the digit at place i if there is one."""
    return jnp.where(self.count > i, self.values[i], otherwise)


class _State(NamedTuple):
  """What a line of the scratchpad is made from."""

  a: _Digits
  b: _Digits
  sums: _Digits
  carry: chex.Array


def draft_addition(problem: Problem, actions: chex.Array, num_actions: chex.Array, size: int) -> chex.Array:
  """Returns the characters that are expected next.

  Args:
    problem: digits `[2, M]`, lengths `[2]`.
    actions: int32 `[T]` response tokens.
    num_actions: int32 `[]` how many of them have been written; the others are not looked at.
    size: K, number of characters wanted.

  Returns:
    int32 `[K]`; -1 where nothing is expected.
  """
  capacity = problem.digits.shape[-1] + 2  # digits of a list; an answer has one more than an operand, errors another
  line_length = 3 * (2 * capacity + 1) + 40
  lookback = 3 * line_length
  text = jax.lax.dynamic_slice(jnp.pad(actions, (lookback, 0), constant_values=_NONE), (num_actions,), (lookback,))
  breaks = (text == _NEWLINE).astype(jnp.int32)
  behind = jnp.cumsum(breaks[::-1])[::-1]  # line breaks from here on
  place = jnp.arange(lookback)
  starts = [jnp.sum(behind > i) for i in range(3)]  # of the unfinished line, and of the two before it
  num_lines = jnp.sum((actions == _NEWLINE) & (jnp.arange(actions.size) < num_actions))

  def starts_answer(start):
    pair = jax.lax.dynamic_slice(jnp.append(text, _NONE), (start,), (2,))
    return jnp.all(pair == _AFTER_SCRATCHPAD)

  in_header, first_line, in_answer = num_lines < 2, num_lines <= 2, starts_answer(starts[1])
  source = jnp.where(in_answer, starts[2], starts[1])
  before = (place >= source) & (place < jnp.where(in_answer, starts[1], starts[0]) - 1)
  unfinished = place >= jnp.where(in_header, lookback - num_actions, starts[0])
  last, _ = _fields(text, before, capacity)
  own, field = _fields(text, unfinished & ~in_header, capacity)
  ended = jnp.any(before & (text == _LAST_LINE)) | starts_answer(starts[0])

  state = _choose(first_line, _first(problem, capacity), _next(last[_LIST_A], last[_LIST_B], last[_LIST_SUM],
                                                               last[_NEW_DIGIT].get(0, 0), last[_NEW_CARRY].get(0, 0)))
  line, state, line_ends = _line(state, own, field)
  second, state, second_ends = _line(state, jax.tree.map(jnp.zeros_like, own), 0)
  found = _State(last[_LIST_A], last[_LIST_B], last[_LIST_SUM], last[_CARRY].get(0, 0))
  state = _choose(ended | in_answer, found, state)
  writes_line = ~(ended | in_answer)
  ends = ~writes_line | line_ends | second_ends
  expected = compact(join(
      literal('\n<scratch>\n', in_header), _only(line, writes_line), _only(second, writes_line & ~line_ends),
      literal(END_OF_SCRATCHPAD, ends & ~in_answer), _only(_result(state), ends)), 2 * line_length + 20)
  start = _align(text, jnp.sum(unfinished), expected)
  tokens = jnp.append(jnp.where(expected.mask, expected.tokens, _NONE), text)
  tokens = jnp.pad(tokens, (0, size), constant_values=_NONE)
  return jax.lax.dynamic_slice(tokens, (start,), (size,))


def _fields(text, line, capacity) -> tuple[list[_Digits], chex.Array]:
  """Returns the digits in each field of a line, a mask `[R]` of the text, and the field in which it ends."""
  place = jnp.arange(text.size)
  earlier, line_before = jnp.pad(text[:-1], (1, 0), constant_values=_NONE), jnp.pad(line[:-1], (1, 0))
  kind = jnp.zeros(text.shape, jnp.int32)
  for i, (one, two) in enumerate(_MARKERS):
    kind = jnp.where(line & line_before & (earlier == one) & (text == two), i + 1, kind)
  marker = jax.lax.cummax(jnp.where(kind > 0, place, -1))  # the last one up to here
  field = jnp.where(marker >= 0, kind[marker], 0)
  is_digit = line & (text >= DIGIT_ZERO) & (text < DIGIT_ZERO + 10)

  def digits(i):
    last = jnp.max(jnp.where(kind == i, place, -1))  # a field that begins twice counts from its second beginning
    total = jnp.cumsum(is_digit & (field == i) & (marker == jnp.where(i > 0, last, -1)))
    source = jnp.searchsorted(total, jnp.arange(1, capacity + 1), method='scan_unrolled')
    count = jnp.minimum(total[-1], capacity)
    values = jnp.where(jnp.arange(capacity) < count, text[jnp.minimum(source, text.size - 1)] - DIGIT_ZERO, 0)
    return _Digits(values, count)

  every = jax.vmap(digits)(jnp.arange(len(_MARKERS) + 1))
  return [jax.tree.map(lambda x, i=i: x[i], every) for i in range(len(_MARKERS) + 1)], field[-1]


def _first(problem, capacity) -> _State:
  size = problem.digits.shape[-1]
  place = jnp.arange(capacity)
  a, b = (_Digits(jnp.where(place < n, d[jnp.clip(n - 1 - place, 0, size - 1)], 0), n)
          for d, n in zip(problem.digits, problem.lengths))
  return _State(a, b, _Digits(jnp.zeros(capacity, jnp.int32), jnp.int32(0)), jnp.int32(0))


def _next(a, b, sums, new_digit, new_carry) -> _State:
  """Returns what the line after this one is made from: operands without their last digit, one digit more of the sum."""
  capacity = sums.values.size
  shorter = (_Digits(x.values, jnp.maximum(x.count - 1, 0)) for x in (a, b))
  longer = _Digits(jnp.append(new_digit, sums.values[:-1]), jnp.minimum(sums.count + 1, capacity))
  return _State(*shorter, longer, new_carry)


def _line(state, own, field) -> tuple[Piece, _State, chex.Array]:
  """Returns a line, the state of the next one, and whether this is the last line.

  `own` are the fields of the unfinished line, of which those before `field` are finished: what they say goes before
  what the state says. Of the sum `x+y+c=s` every digit that stands there counts at once.
  """
  a, b, sums = (_choose(field > i, own[i], expected) for i, expected in enumerate(state[:3]))
  written = own[_CARRY]  # C, x, y, C again, then the sum
  carry = written.get(0, state.carry)
  x, y = (written.get(1 + i, jnp.where(n.count > 0, n.values[n.count - 1], 0)) for i, n in enumerate((a, b)))
  again = written.get(3, carry)
  total = x + y + again
  first, second = written.get(4, 0), written.get(5, 0)
  total = jnp.where(field > _CARRY, jnp.where(written.count > 5, 10 * first + second, first), total)
  new_digit = own[_NEW_DIGIT].get(0, total % 10)
  new_carry = own[_NEW_CARRY].get(0, total // 10)
  ends = (a.count == 0) & (b.count == 0)
  goes_on = ~ends
  piece = join(
      _list(a), literal(' + '), _list(b), literal(' , A='), _list(sums), literal(' '), literal(', ', goes_on),
      literal('C='), digit(carry), literal(' , '), literal('END\n', ends),
      digit(x, goes_on), literal('+', goes_on), digit(y, goes_on), literal('+', goes_on), digit(again, goes_on),
      literal('=', goes_on), digit(total // 10, goes_on & (total >= 10)), digit(total % 10, goes_on),
      literal(' , A->', goes_on), digit(new_digit, goes_on), literal(' , C->', goes_on), digit(new_carry, goes_on),
      literal('\n', goes_on))
  after = _choose(ends, _State(a, b, sums, carry), _next(a, b, sums, new_digit, new_carry))
  return piece, after, ends


def _list(digits) -> Piece:
  return join(literal('['), _separated(digits, ','), literal(']'))


def _result(state) -> Piece:
  has_carry = state.carry > 0
  return join(digit(state.carry, has_carry), literal(' ', has_carry & (state.sums.count > 0)),
              _separated(state.sums, ' '), literal('\n'))


def _separated(digits, separator) -> Piece:
  place = jnp.arange(digits.values.size)
  stands = place < digits.count
  separators = jnp.full(place.shape, int(TOKENIZER.encode(separator)[0]), jnp.int32)
  return Piece(jnp.stack([separators, digits.values + DIGIT_ZERO], -1).reshape(-1),
               jnp.stack([stands & (place > 0), stands], -1).reshape(-1), jnp.zeros(2 * place.size, bool))


def _align(text, written, expected) -> chex.Array:
  """Returns the places, in the expected text followed by the text itself, at which to go on after `written` characters
  of the unfinished line."""
  size, length = expected.tokens.size, text.size
  place = jnp.arange(size)
  own = jnp.take(text, length - written + place, mode='fill', fill_value=_NONE)
  as_expected = jnp.all((own == expected.tokens) | (place >= written)) & (written <= size)
  tokens = jnp.where(expected.mask, expected.tokens, _NONE - 1)
  distance = _DISTANCE * jnp.abs(jnp.arange(size + 1) - written)
  last = text[-NUM_LOOKED_UP:]
  own_last = jnp.where(jnp.arange(NUM_LOOKED_UP) >= NUM_LOOKED_UP - written, last, _NONE)
  likely = jnp.where(jnp.arange(size + 1) <= jnp.sum(expected.mask), agreement(tokens, own_last) - distance, 0.0)
  # The text itself has the copies of a policy that has left the rules; the latest of equal ones.
  likely_again = agreement(text, last)[:-1] - _MARGIN + 1e-3 * jnp.arange(length) / length
  again = jnp.max(likely_again) > jnp.max(likely)
  start = jnp.where(again, size + jnp.argmax(likely_again), jnp.argmax(likely))
  return jnp.where(as_expected, written, start)


def _only(piece, valid) -> Piece:
  return piece._replace(valid=piece.valid & valid)


def _choose(condition, one, other):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)
