import re

import numpy as np
import pytest

from critkl_jax.tasks.task import stop_after


def run(automaton, tokens):
  """Returns how many tokens the automaton reads before it ends the episode, or None."""
  state = 0
  for i, token in enumerate(tokens):
    state = automaton[state, min(token, automaton.shape[1] - 1)]
    if state == len(automaton):
      return i + 1
  return None


@pytest.mark.parametrize('patterns', [[[1, 1, 2], [2]], [[1, 2, 1, 2, 3]], [[1], [1], [1]], [[2, 2, 1], [1, 2]]])
def test_ends_where_a_regular_expression_does(patterns):
  automaton = stop_after(patterns)
  expression = re.compile('.*?'.join(''.join(map(str, pattern)) for pattern in patterns))
  rng = np.random.default_rng(0)
  ended = 0
  for _ in range(300):
    tokens = rng.integers(1, 4, 40)
    found = expression.search(''.join(map(str, tokens)))
    assert run(automaton, tokens) == (found.end() if found else None)
    ended += found is not None
  assert ended > 30


def test_stop_tokens_end_in_any_state():
  automaton = stop_after([[3, 4]], stop_tokens=[0])
  assert run(automaton, [3, 0]) == 2
  assert run(automaton, [0]) == 1


def test_tokens_past_the_table_are_ordinary():
  automaton = stop_after([[1], [2]])
  assert run(automaton, [1, 50256, 2]) == 3
  assert run(automaton, [2, 50256, 1]) is None


@pytest.mark.parametrize('patterns', [[], [[1], []]])
def test_empty_patterns_are_refused(patterns):
  with pytest.raises(ValueError, match='patterns'):
    stop_after(patterns)
