"""Drafts for speculative rollouts of the addition task: guesses of a response's next characters.

The right solution would be a poor draft: once the policy writes a digit too many or a wrong sum, every later line
differs. So the draft is derived anew from the episode's own text. The last finished line (its digits, lists and carry)
determines the next line by the rules of the scratchpad. Fields that are already written in the unfinished line replace
the expected fields. Where the unfinished line departs from the expected text, the draft goes on at the position whose
preceding characters agree best.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.tasks.addition.problem import Problem
from critkl_jax.tasks.addition.text import DIGIT_ZERO, END_OF_SCRATCHPAD, TOKENIZER, compact, fill
from critkl_jax.tasks.drafts import NUM_LOOKED_UP, matching_suffixes

_NONE = -1  # no token: agrees with nothing
_NEWLINE = int(TOKENIZER.encode('\n')[0])
_LAST_LINE = int(TOKENIZER.encode('N')[0])  # occurs in END alone
_AFTER_SCRATCHPAD = TOKENIZER.encode('</')
# A field of a line begins after one of these pairs of characters; the first field begins the line.
_MARKERS = tuple(TOKENIZER.encode(marker) for marker in (' +', 'A=', 'C=', 'A-', 'C-'))
_NUM_FIELDS = 6
_LIST_A, _LIST_B, _LIST_SUM, _CARRY, _NEW_DIGIT, _NEW_CARRY = range(_NUM_FIELDS)
_DISTANCE = 0.1  # penalty per character of distance, in agreeing characters
_MARGIN = 2.0  # agreeing characters by which a match in the episode's own text must beat the expected text


# Template of a line for `text.fill`: pairs of a text and the flag that says whether it is there.
_LINE = (
    ('[', 'line'), ('{a},', 'a'), ('] + [', 'line'), ('{b},', 'b'), ('] , A=[', 'line'), ('{sums},', 'sums'),
    ('] ', 'line'), (', ', 'goes_on'), ('C=', 'line'), ('{carry}', 'line'), (' , ', 'line'), ('END\n', 'ends'),
    ('{x}', 'goes_on'), ('+', 'goes_on'), ('{y}', 'goes_on'), ('+', 'goes_on'), ('{again}', 'goes_on'),
    ('=', 'goes_on'), ('{tens}', 'has_tens'), ('{ones}', 'goes_on'), (' , A->', 'goes_on'), ('{new_digit}', 'goes_on'),
    (' , C->', 'goes_on'), ('{new_carry}', 'goes_on'), ('\n', 'goes_on'))
_ANSWER = (('{carry}', 'carry'), (' ', 'blank'), ('{sums} ', 'sums'), ('\n', 'answer'))


class _Digits(NamedTuple):
  """Digits in the order of the text, int32 `[M + 2]`, of which the first `count`, int32 `[]`, are used."""

  values: chex.Array
  count: chex.Array

  def get(self, i: int, otherwise: chex.Array) -> chex.Array:
    """Returns digit i, or `otherwise` if there are fewer digits."""
    return jnp.where(self.count > i, self.values[i], otherwise)


class _State(NamedTuple):
  """The remaining operands, sum digits and carry that determine a line of the scratchpad."""

  a: _Digits
  b: _Digits
  sums: _Digits
  carry: chex.Array


def draft_addition(problem: Problem, actions: chex.Array, num_actions: chex.Array, size: int) -> chex.Array:
  """Guesses the next characters of a response.

  Args:
    problem: digits `[2, M]`, lengths `[2]`.
    actions: int32 `[T]` response tokens.
    num_actions: int32 `[]` number of tokens sampled so far; later entries are ignored.
    size: number of characters to guess.

  Returns:
    int32 `[size]`; -1 for no guess.
  """
  capacity = problem.digits.shape[-1] + 2  # of a list: one more digit for the sum, and one for an error
  line_length = 3 * (2 * capacity + 1) + 40
  lookback = 3 * line_length
  text = jax.lax.dynamic_slice(jnp.pad(actions, (lookback, 0), constant_values=_NONE), (num_actions,), (lookback,))
  breaks = (text == _NEWLINE).astype(jnp.int32)
  behind = jnp.cumsum(breaks[::-1], dtype=jnp.int32)[::-1]  # line breaks from here on
  place = jnp.arange(lookback, dtype=jnp.int32)
  starts = [jnp.sum(behind > i, dtype=jnp.int32) for i in range(3)]  # of the unfinished line, and of the two before it
  written = jnp.arange(actions.size, dtype=jnp.int32) < num_actions
  num_lines = jnp.sum((actions == _NEWLINE) & written, dtype=jnp.int32)

  def starts_answer(start):
    pair = jax.lax.dynamic_slice(jnp.append(text, _NONE), (start,), (2,))
    return jnp.all(pair == _AFTER_SCRATCHPAD)

  in_header, first_line, in_answer = num_lines < 2, num_lines <= 2, starts_answer(starts[1])
  source = jnp.where(in_answer, starts[2], starts[1])
  before = (place >= source) & (place < jnp.where(in_answer, starts[1], starts[0]) - 1)
  unfinished = place >= jnp.where(in_header, lookback - num_actions, starts[0])
  fields, field = jax.vmap(lambda line: _fields(text, line, capacity))(jnp.stack([before, unfinished & ~in_header]))
  last = _split(jax.tree.map(lambda x: x[0], fields))
  ended = jnp.any(before & (text == _LAST_LINE)) | starts_answer(starts[0])
  writes = ~(ended | in_answer)

  after_last = _next(*last[:3], last[_NEW_DIGIT].get(0, 0), last[_NEW_CARRY].get(0, 0))
  state = _choose(first_line, _first(problem, capacity), after_last)
  # The fields of the unfinished line, and of the next line, of which nothing has been written.
  own = jax.tree.map(lambda x: jnp.stack([x[1], jnp.zeros_like(x[1])]), (fields, field))
  (state, _), (values, stands) = jax.lax.scan(_line, (state, writes), own)
  state = _choose(writes, state, _State(*last[:3], last[_CARRY].get(0, 0)))
  parts = [(_LINE, *(jax.tree.map(lambda x, i=i: x[i], x) for x in (values, stands))) for i in range(2)]
  parts.append((_ANSWER, *_answer(state, ~writes | jnp.any(stands['ends']))))
  template, values = [('\n<scratch>\n', 'header')], {}
  stands = {'header': in_header, 'end': parts[-1][2]['answer'] & ~in_answer}
  for i, (part, part_values, part_stands) in enumerate(parts):
    if part is _ANSWER:
      template.append((END_OF_SCRATCHPAD, 'end'))
    template += [(text.replace('}', f'{i}}}'), f'{flag}{i}') for text, flag in part]
    values |= {f'{name}{i}': x for name, x in part_values.items()}
    stands |= {f'{name}{i}': x for name, x in part_stands.items()}
  expected = compact(fill(template, values, stands), 2 * line_length + 20)
  start = _align(text, jnp.sum(unfinished, dtype=jnp.int32), expected)
  tokens = jnp.append(jnp.where(expected.mask, expected.tokens, _NONE), text)
  tokens = jnp.pad(tokens, (0, size), constant_values=_NONE)
  return jax.lax.dynamic_slice(tokens, (start,), (size,))


def _fields(text, line, capacity) -> tuple[_Digits, chex.Array]:
  """Reads the digits `[6, M + 2]` of each field of a line; returns them and the number of the field that ends the line.

  `line` is the mask of the line in the text, bool `[lookback]`.
  """
  place = jnp.arange(text.size, dtype=jnp.int32)
  earlier, line_before = jnp.pad(text[:-1], (1, 0), constant_values=_NONE), jnp.pad(line[:-1], (1, 0))
  kind = jnp.zeros(text.shape, jnp.int32)
  for i, (one, two) in enumerate(_MARKERS):
    kind = jnp.where(line & line_before & (earlier == one) & (text == two), i + 1, kind)
  marker = jax.lax.cummax(jnp.where(kind > 0, place, -1))  # the latest marker so far
  field = jnp.where(marker >= 0, kind[marker], 0)
  number = jnp.arange(_NUM_FIELDS, dtype=jnp.int32)[:, None]
  begins = jnp.max(jnp.where((kind[None] == number) & (number > 0), place[None], -1), 1)  # the later of two
  digits = line & (text >= DIGIT_ZERO) & (text < DIGIT_ZERO + 10)
  total = jnp.cumsum(digits, dtype=jnp.int32)
  before = jnp.where(begins >= 0, total[begins], 0)  # digits before the field
  digits = digits[None] & (field[None] == number) & (marker[None] == begins[:, None])
  rank = jnp.where(digits, total[None] - before[:, None], 0)
  wanted = rank[:, None] == jnp.arange(1, capacity + 1, dtype=jnp.int32)[None, :, None]
  values = jnp.sum(jnp.where(wanted, (text - DIGIT_ZERO)[None, None], 0), -1, dtype=jnp.int32)
  return _Digits(values, jnp.minimum(jnp.sum(digits, 1, dtype=jnp.int32), capacity)), field[-1]


def _first(problem, capacity) -> _State:
  size = problem.digits.shape[-1]
  place = jnp.arange(capacity, dtype=jnp.int32)
  a, b = (_Digits(jnp.where(place < n, d[jnp.clip(n - 1 - place, 0, size - 1)], 0), n)
          for d, n in zip(problem.digits, problem.lengths))
  return _State(a, b, _Digits(jnp.zeros(capacity, jnp.int32), jnp.int32(0)), jnp.int32(0))


def _next(a, b, sums, new_digit, new_carry) -> _State:
  """Returns the state of the line after this one: operands lose their last digit, and the sum gains a digit."""
  capacity = sums.values.size
  shorter = (_Digits(x.values, jnp.maximum(x.count - 1, 0)) for x in (a, b))
  longer = _Digits(jnp.append(new_digit, sums.values[:-1]), jnp.minimum(sums.count + 1, capacity))
  return _State(*shorter, longer, new_carry)


def _line(carried, of_line) -> tuple[tuple[_State, chex.Array], tuple[dict, dict]]:
  """Returns the next line's state and whether there is a next line, and the values and flags of this line's template.

  `own` holds the fields of the unfinished line. Fields before `field` are finished and override the state; in the sum
  `x+y+c=s` each digit overrides it as soon as it is written.
  """
  (state, writes), (own, field) = carried, (_split(of_line[0]), of_line[1])
  a, b, sums = (_choose(field > i, own[i], expected) for i, expected in enumerate(state[:3]))
  written = own[_CARRY]  # C, x, y, C again, then the sum
  carry = written.get(0, state.carry)
  x, y = (written.get(1 + i, jnp.where(n.count > 0, n.values[n.count - 1], 0)) for i, n in enumerate((a, b)))
  again = written.get(3, carry)
  total = jnp.where(written.count > 5, 10 * written.values[4] + written.values[5], written.values[4])
  total = jnp.where(field > _CARRY, total, x + y + again)
  new_digit, new_carry = own[_NEW_DIGIT].get(0, total % 10), own[_NEW_CARRY].get(0, total // 10)
  ends = (a.count == 0) & (b.count == 0)
  values = {'a': a.values, 'b': b.values, 'sums': sums.values, 'carry': carry, 'x': x, 'y': y, 'again': again,
            'tens': total // 10, 'ones': total % 10, 'new_digit': new_digit, 'new_carry': new_carry}
  goes_on = writes & ~ends
  stands = {'line': writes, 'goes_on': goes_on, 'ends': writes & ends, 'has_tens': goes_on & (total >= 10)}
  stands |= {name: writes & _present(n) for name, n in (('a', a), ('b', b), ('sums', sums))}
  after = _choose(ends, _State(a, b, sums, carry), _next(a, b, sums, new_digit, new_carry))
  return (after, goes_on), (values, stands)


def _answer(state, writes) -> tuple[dict, dict]:
  """Returns the values and flags of the answer's template."""
  carry = writes & (state.carry > 0)
  stands = {'carry': carry, 'blank': carry & (state.sums.count > 0), 'sums': writes & _present(state.sums),
            'answer': writes}
  return {'carry': state.carry, 'sums': state.sums.values}, stands


def _split(fields) -> list[_Digits]:
  """Returns the digits of each field."""
  return [_Digits(values, count) for values, count in zip(fields.values, fields.count)]


def _present(digits) -> chex.Array:
  return jnp.arange(digits.values.size, dtype=jnp.int32) < digits.count


def _align(text, written, expected) -> chex.Array:
  """Finds the position at which the draft continues after the `written` characters of the unfinished line.

  The position is an index into the expected text followed by the episode's own text.
  """
  size, length = expected.tokens.size, text.size
  place = jnp.arange(size, dtype=jnp.int32)
  own = jnp.take(text, length - written + place, mode='fill', fill_value=_NONE)
  as_expected = jnp.all((own == expected.tokens) | (place >= written)) & (written <= size)
  tokens = jnp.where(expected.mask, expected.tokens, _NONE - 1)
  distance = _DISTANCE * jnp.abs(jnp.arange(size + 1, dtype=jnp.int32) - written).astype(jnp.float32)
  last = text[-NUM_LOOKED_UP:]
  own_last = jnp.where(jnp.arange(NUM_LOOKED_UP, dtype=jnp.int32) >= NUM_LOOKED_UP - written, last, _NONE)
  known = jnp.arange(size + 1, dtype=jnp.int32) <= jnp.sum(expected.mask, dtype=jnp.int32)
  likely = jnp.where(known, matching_suffixes(tokens, own_last) - distance, 0.0)
  # A policy that has left the rules often repeats its own text; among equal matches the latest wins.
  likely_again = matching_suffixes(text, last)[:-1] - _MARGIN + 1e-3 * jnp.arange(length, dtype=jnp.float32) / length
  again = jnp.max(likely_again) > jnp.max(likely)
  best, best_again = (jax.lax.argmax(x, 0, jnp.int32) for x in (likely, likely_again))
  start = jnp.where(again, size + best_again, best)
  return jnp.where(as_expected, written, start)


def _choose(condition, one, other):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)
