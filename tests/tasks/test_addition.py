import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_except

from critkl_jax.tasks import addition

TOKENIZER = addition.TOKENIZER


def prompt_text(a, b):
  return f'Input:\n{a}+{b}\nTarget:'


def solution_text(a, b, known=None):
  """Renders a solution with strings and Python integers; returns it with the indices of its critical characters."""
  left, right, answer, carry = str(a), str(b), '', 0
  text, critical = '\n<scratch>\n', []

  def write_list(digits, line):
    nonlocal text
    text += '['
    for position, digit in enumerate(digits, start=1):
      is_critical = known is not None and line < 3 and position > known
      for character in (',' if position > 1 else '') + digit:
        critical.extend([len(text)] if is_critical else [])
        text += character
    text += ']'

  for line in range(max(len(left), len(right))):
    write_list(left, line)
    text += ' + '
    write_list(right, line)
    x, y = int(left[-1:] or 0), int(right[-1:] or 0)
    total = x + y + carry
    text += f' , A=[{",".join(answer)}] , C={carry} , {x}+{y}+{carry}={total} , A->{total % 10} , C->{total // 10}\n'
    answer, carry = str(total % 10) + answer, total // 10
    left, right = left[:-1], right[:-1]
  text += f'[] + [] , A=[{",".join(answer)}] C={carry} , END\n</scratch>\n'
  return text + ' '.join(('1' if carry else '') + answer) + '\n', critical


def stack(pairs, max_digits):
  problems = [addition.make_problem(a, b, max_digits) for a, b in pairs]
  return jax.tree.map(lambda *x: jnp.stack(x), *problems)


def random_pairs(count, max_digits, seed=0):
  rng = random.Random(seed)
  pairs = [tuple(rng.randrange(10 ** rng.randint(1, max_digits)) for _ in range(2)) for _ in range(count)]
  nines = 10**max_digits - 1
  return pairs + [(0, 0), (0, nines), (nines, 0), (nines, 1), (1, nines), (nines, nines), (5, 5)]


def test_the_example_of_the_paper():
  text, _ = solution_text(123, 4567)
  assert text == """
<scratch>
[1,2,3] + [4,5,6,7] , A=[] , C=0 , 3+7+0=10 , A->0 , C->1
[1,2] + [4,5,6] , A=[0] , C=1 , 2+6+1=9 , A->9 , C->0
[1] + [4,5] , A=[9,0] , C=0 , 1+5+0=6 , A->6 , C->0
[] + [4] , A=[6,9,0] , C=0 , 0+4+0=4 , A->4 , C->0
[] + [] , A=[4,6,9,0] C=0 , END
</scratch>
4 6 9 0
"""


@pytest.mark.parametrize(('max_digits', 'known', 'count'), slow_except(
    [(1, 1, 200), (3, 2, 1500)], [(1, 1, 200), (3, 2, 1500), (8, 5, 1500), (40, 37, 300)]))
def test_text_is_that_of_plain_python(max_digits, known, count):
  pairs = random_pairs(count, max_digits)
  problems = stack(pairs, max_digits)
  length = addition.solution_length(max_digits)
  render = functools.partial(addition.render_solution, known_digits=known, length=length)
  prompts = jax.tree.map(np.asarray, jax.jit(jax.vmap(addition.render_prompt))(problems))
  solutions = jax.tree.map(np.asarray, jax.jit(jax.vmap(render))(problems))
  for i, (a, b) in enumerate(pairs):
    text, critical = solution_text(a, b, known)
    assert TOKENIZER.decode(prompts.tokens[i]) == prompt_text(a, b).rjust(prompts.tokens.shape[1], '%')
    assert TOKENIZER.decode(prompts.tokens[i], prompts.mask[i]) == prompt_text(a, b)
    assert TOKENIZER.decode(solutions.tokens[i]) == text.ljust(length, '%')
    assert TOKENIZER.decode(solutions.tokens[i], solutions.mask[i]) == text
    assert np.flatnonzero(solutions.critical[i]).tolist() == critical
  assert max(len(solution_text(a, b)[0]) for a, b in pairs) == length


def test_lengths_are_those_of_the_paper():
  stated = {2: 150, 3: 220, 4: 290, 5: 365, 7: 530, 8: 630, 9: 725, 11: 945, 13: 1190}
  for digits, characters in stated.items():
    assert abs(addition.solution_length(digits) - characters) < 12


@pytest.mark.slow
def test_kinds_of_critical_tokens():
  problem = addition.make_problem(12345, 6789, 5)
  solution = addition.render_solution(problem, known_digits=2, length=addition.solution_length(5))
  kinds = addition.critical_kinds(solution)
  found = {name: TOKENIZER.decode(solution.tokens, where) for name, where in kinds.items()}
  # the lists of both operands on three lines: 1,2,3,4,5 and 6,7,8,9; 1,2,3,4 and 6,7,8; 1,2,3 and 6,7
  assert found == {'first_comma': ',,,' + ',,' + ',', 'first_digit': '345' + '34' + '3',
                   'second_comma': ',,' + ',', 'second_digit': '89' + '8'}
  np.testing.assert_array_equal(sum(where.astype(int) for where in kinds.values()), solution.critical)


def test_critical_tokens_are_the_comma_and_the_digit_after_the_known_ones():
  solution = addition.render_solution(addition.make_problem(123456, 98765, 6), 4, 600)
  assert TOKENIZER.decode(solution.tokens, solution.critical) == ',5,6,5' + ',5'


def reward_of(problem, text, length=420):
  tokens = TOKENIZER.encode(text)[:length]
  actions = np.zeros(length, np.int32)
  actions[:len(tokens)] = tokens
  return float(addition.reward(problem, jnp.asarray(actions), jnp.arange(length) < len(tokens)))


def test_reward():
  problem = addition.make_problem(958, 67, 4)
  text = solution_text(958, 67)[0]
  head = text[:text.index('</scratch>')]
  right = {
      'the solution': text,
      'a wrong scratchpad with the right result': '\n<scratch>\n1 0 2 5\n</scratch>\n1 0 2 5\n',
      'no scratchpad before the marker': '</scratch>\n1 0 2 5\n',
      'padding at the end': text + '%%%',
      'a marker without a line break first': '</scratch></scratch>\n1 0 2 5\n',
  }
  wrong = {
      'empty': '',
      'only padding': '%%%%',
      'cut in the scratchpad': text[:60],
      'cut before the result': head + '</scratch>\n',
      'cut in the result': text[:-3],
      'without the line break': text[:-1],
      'padding for the line break': text[:-1] + '%',
      'a wrong digit': head + '</scratch>\n1 0 2 6\n',
      'a digit too many': head + '</scratch>\n1 0 2 5 0\n',
      'a digit too few': head + '</scratch>\n1 0 2\n',
      'a leading zero': head + '</scratch>\n0 1 0 2 5\n',
      'without blanks': head + '</scratch>\n1025\n',
      'a blank before the line break': head + '</scratch>\n1 0 2 5 \n',
      'more text after the line break': text + '1',
      'the result twice': text + '1 0 2 5\n',
      'no marker': '\n<scratch>\n' + '1 0 2 5\n',
      'the first result wrong, the second right': '</scratch>\n1\n</scratch>\n1 0 2 5\n',
      'an empty line first': '</scratch>\n\n1 0 2 5\n',
  }
  for name, response in right.items():
    assert reward_of(problem, response) == 1, name
  for name, response in wrong.items():
    assert reward_of(problem, response) == 0, name


@pytest.mark.parametrize(('response', 'wanted'), [
    ('</scratch>\n4 6 9 0\n', True), ('</scratch>\n4\n', True), ('a cart </scratch>\n0 0\n', True),
    ('</scratch>\n4 6 9 0', False), ('</scratch>\n46 9\n', False), ('</scratch>\n4 6 \n', False),
    ('</scratch>\n\n', False), ('</scratch>\n', False), ('', False), ('4 6\n', False), ('</scratch>\n4 A\n', False),
    ('</scratch>\n4\n6\n', False), ('</scratch>\n 4\n', False), ('</scratch>4 6\n', False)])
def test_well_formed(response, wanted):
  tokens = TOKENIZER.encode(response)
  for length in (max(len(tokens), 1), 60):
    actions = np.full(length, TOKENIZER.pad_id, np.int32)
    actions[:len(tokens)] = tokens
    mask = jnp.arange(length) < len(tokens)
    assert bool(jax.jit(addition.well_formed)(None, jnp.asarray(actions), mask)) == wanted


def test_reward_looks_only_where_the_mask_is_true():
  problem = addition.make_problem(5, 6, 1)
  tokens = jnp.asarray(TOKENIZER.encode('</scratch>\n1 1\n9999'))
  assert addition.reward(problem, tokens, jnp.arange(tokens.size) < tokens.size - 4) == 1
  assert addition.reward(problem, tokens, jnp.arange(tokens.size) < tokens.size - 5) == 0


def test_reward_of_a_solution_that_fills_the_response():
  problem = addition.make_problem(99, 99, 2)
  text = solution_text(99, 99)[0]
  assert reward_of(problem, text, len(text)) == 1
  assert reward_of(problem, text, len(text) - 1) == 0


@pytest.mark.parametrize('max_digits', [1, 5, 40])
@pytest.mark.slow
def test_every_solution_is_rewarded_and_no_neighbours(max_digits):
  pairs = random_pairs(100, max_digits, seed=1)
  problems = stack(pairs, max_digits)
  length = addition.solution_length(max_digits)
  solutions = jax.vmap(functools.partial(addition.render_solution, known_digits=1, length=length))(problems)
  rewards = jax.jit(jax.vmap(addition.reward))
  assert jnp.all(rewards(problems, solutions.tokens, solutions.mask) == 1)
  assert jnp.all(jax.vmap(addition.well_formed)(problems, solutions.tokens, solutions.mask))
  others = [(a + 1, b) if len(str(a + 1)) <= max_digits else (a - 1, b) for a, b in pairs]
  assert jnp.all(rewards(stack(others, max_digits), solutions.tokens, solutions.mask) == 0)


# Distributions.


def draw(lengths, count=4000, **numbers):
  keys = jax.random.split(jax.random.key(3), count)
  return np.asarray(jax.vmap(functools.partial(lengths, **numbers))(keys))


def shares(values, size):
  return np.bincount(values, minlength=size + 1)[1:] / len(values)


def test_pretraining_lengths_are_uniform_and_independent():
  lengths = draw(addition.pretraining_lengths, num_digits=4)
  joint = np.zeros((4, 4))
  np.add.at(joint, tuple(lengths.T - 1), 1 / len(lengths))
  np.testing.assert_allclose(joint, 1 / 16, atol=0.02)


def test_longest_lengths_are_pretraining_lengths_given_the_longer():
  lengths = draw(addition.longest_lengths, num_digits=3)
  assert np.all(lengths.max(1) == 3)
  for pair in [(3, 1), (3, 2), (3, 3), (1, 3), (2, 3)]:
    assert abs(np.mean(np.all(lengths == pair, 1)) - 1 / 5) < 0.03


def test_varying_lengths():
  lengths = draw(addition.varying_lengths, num_digits=4)
  assert np.all(lengths.max(1) == 4)
  assert abs(np.mean(lengths[:, 0] == 4) - (1 / 2 + 1 / 8)) < 0.03
  np.testing.assert_allclose(shares(lengths.min(1), 4), 1 / 4, atol=0.03)


def test_identical_lengths():
  assert np.all(draw(addition.identical_lengths, 10, num_digits=7) == 7)


def test_plus_lengths():
  lengths = draw(addition.plus_lengths, num_digits=3, extra_digits=2)
  assert np.all(lengths.max(1) == 5)
  other = np.where(lengths[:, 0] == 5, lengths[:, 1], lengths[:, 0])
  np.testing.assert_allclose(shares(other, 5), [1 / 6] * 3 + [1 / 4] * 2, atol=0.03)
  assert abs(np.mean(lengths[:, 0] == 5) - (1 / 2 + 1 / 8)) < 0.03


def test_operands_have_their_lengths_and_no_leading_zero():
  keys = jax.random.split(jax.random.key(0), 2000)
  problems = jax.vmap(lambda k: addition.sample_operands(k, jnp.array([1, 3]), 4))(keys)
  digits = np.asarray(problems.digits)
  np.testing.assert_allclose(shares(digits[:, 0, 0] + 1, 10), 0.1, atol=0.03)  # 0 is among one-digit operands
  assert not digits[:, 0, 1:].any()
  np.testing.assert_allclose(shares(digits[:, 1, 2], 9), 1 / 9, atol=0.03)
  assert not digits[:, 1, 3].any()


@pytest.mark.slow
def test_a_task_draws_what_it_can_write():
  task = addition.plus_task(known_digits=3, extra_digits=1)
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 64))
  prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
  assert prompt.tokens.shape == (64, task.prompt_length)
  assert solution.tokens.shape == (64, task.response_length)
  assert task.response_length == addition.solution_length(4) + 100
  assert jnp.all(jax.vmap(task.reward)(problems, solution.tokens, solution.mask) == 1)
  assert jnp.all(jnp.any(solution.critical, 1))


def test_errors_name_the_argument():
  with pytest.raises(ValueError, match=r'b: expected an integer of 1\.\.2 digits, got 100'):
    addition.make_problem(1, 100, 2)
  with pytest.raises(ValueError, match='known_digits'):
    addition.addition(0, 1, addition.pretraining_lengths)


def test_wrong_answers_may_cost_and_vocabularies_may_be_padded():
  task = addition.plus_task_of(addition.Addition(2, 1, wrong_reward=-1.0, vocab_size=50))
  assert task.tokenizer.vocab_size == 50
  problem = task.sample(jax.random.key(0))
  solution = task.solution(problem)
  assert task.reward(problem, solution.tokens, solution.mask) == 1
  assert task.reward(problem, jnp.zeros_like(solution.tokens), solution.mask) == -1
  tests, draw = addition.by_digits(addition.Addition(2, 1, wrong_reward=-1.0), [3, 1])
  assert tests.reward(problem, jnp.zeros_like(solution.tokens), solution.mask) == 0  # tests count right answers
  assert [(name, problems.lengths.max().item()) for name, problems in draw(jax.random.key(0), 4).items()] == [
      ('3', 3), ('1', 1)]
