import jax
import jax.numpy as jnp
import numpy as np
import pytest

from critkl_jax.tasks.addition import make_problem, plus_task
from critkl_jax.tasks.addition.draft import draft_addition
from critkl_jax.tasks.addition.text import TOKENIZER

TASK = plus_task(5, 1)
SIZE = 24
draft_tokens = jax.jit(lambda problem, actions, num: draft_addition(problem, actions, num, SIZE))


def draft(problem, text, rest='%%%%'):
  """Returns the draft after a text; `rest` follows the text and must be ignored."""
  tokens = np.zeros(TASK.response_length, np.int32)
  written = TOKENIZER.encode(text + rest)
  tokens[:len(written)] = written
  found = np.asarray(draft_tokens(problem, jnp.asarray(tokens), jnp.int32(len(text))))
  return TOKENIZER.decode(found, found >= 0)


def solution(a, b):
  problem = make_problem(a, b, 6)
  text = TASK.solution(problem)
  return problem, TOKENIZER.decode(text.tokens, text.mask)


@pytest.mark.parametrize(('a', 'b'), [(483921, 98765), (7, 123456), (999999, 999999), (0, 0), (500000, 60000)])
def test_after_every_beginning_of_a_solution_comes_its_end(a, b):
  problem, text = solution(a, b)
  for end in range(len(text)):
    found = draft(problem, text[:end], rest='[[9')
    assert text[end:].startswith(found), (text[:end], found)
    assert len(found) == min(SIZE, len(text) - end)


def test_lines_follow_from_what_was_written_not_from_the_problem():
  problem, _ = solution(483921, 98765)
  text = '\n<scratch>\n[4,8,3,9,2] + [9,8,7,6,5] , A=[] , C=0 , 2+5+0=9 , A->8 , C->1\n'
  assert draft(problem, text) == '[4,8,3,9] + [9,8,7,6] , A=[8] , C=1 , 9+6+1=16'[:SIZE]
  line = '[4,8,3,9] + [9,8,7,6] , A=[8] , C=1 , '
  assert draft(problem, text + line) == '9+6+1=16 , A->6 , C->1\n['
  assert draft(problem, text + line + '9+7+1=') == '17 , A->7 , C->1\n[4,8,3]'[:SIZE]
  assert draft(problem, text + line + '9+6+1=13 , A->') == '3 , C->1\n[4,8,3] + [9,8,7] '[:SIZE]


def test_the_answer_is_the_sum_as_it_was_written():
  problem, _ = solution(12, 34)
  text = '\n<scratch>\n[] + [] , A=[7,7,7] C=1 , END\n'
  assert draft(problem, text) == '</scratch>\n1 7 7 7\n'
  assert draft(problem, text + '</scratch>\n') == '1 7 7 7\n'
  assert draft(problem, text + '</scratch>\n1 7 ') == '7 7\n'


def test_goes_on_after_a_character_too_many_or_too_few():
  problem, text = solution(483921, 98765)
  start = text.index(' , A=[')
  before, after = text[:start], text[start:]
  assert draft(problem, before + ',' + after[:8]).startswith(after[8:20])
  assert draft(problem, before[:-1] + after[:8]).startswith(after[8:20])


def test_nonsense_is_survived():
  problem, _ = solution(483921, 98765)
  rng = np.random.default_rng(0)
  for _ in range(20):
    text = TOKENIZER.decode(rng.integers(0, TOKENIZER.vocab_size, rng.integers(0, 500)))
    tokens = jnp.zeros(TASK.response_length, jnp.int32).at[:len(text)].set(jnp.asarray(TOKENIZER.encode(text)))
    found = draft_tokens(problem, tokens, jnp.int32(len(text)))
    assert jnp.all((found >= -1) & (found < TOKENIZER.vocab_size))


def test_nothing_but_the_written_text_counts():
  problem, text = solution(483921, 98765)
  assert len({draft(problem, text[:50], rest=rest) for rest in ('%%%%', text[50:], 'A=[1')}) == 1
