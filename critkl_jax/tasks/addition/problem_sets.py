"""Test sets of addition problems, by the number of digits of their operands."""

import functools
from collections.abc import Callable, Iterator, Sequence

import chex
import jax

from critkl_jax.tasks.addition import problem
from critkl_jax.tasks.addition.addition_task import addition, plus_task
from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.addition.problem import Problem
from critkl_jax.tasks.task import ProblemSet, Task

# (key, number of digits of the longer operand, N) -> lengths [2]
DISTRIBUTIONS = {
    'identical': lambda key, num_digits, known: problem.identical_lengths(key, num_digits),
    'varying': lambda key, num_digits, known: problem.varying_lengths(key, num_digits),
    'plus': lambda key, num_digits, known: problem.plus_lengths(
        key, min(known, num_digits), max(num_digits - known, 0)),
}


def draw_problems(key: chex.PRNGKey, num_problems: int, distribution: str, num_digits: int, known_digits: int,
                  max_digits: int) -> Problem:
  """Draws addition problems for a test.

  Args:
    key: PRNG key, consumed.
    num_problems: B.
    distribution: `identical`, `varying` or `plus`; up to N digits, `plus` is the same as `varying`.
    num_digits: digits of the longer operand.
    known_digits: N, the most digits seen in pre-training.
    max_digits: M, size of the digit arrays.

  Returns:
    A `Problem` with a leading axis B.

  Raises:
    ValueError: if the distribution is unknown or the digits do not fit.
  """
  check_distribution(distribution)
  if not 1 <= num_digits <= max_digits:
    raise ValueError(f'num_digits: expected 1..{max_digits}, got {num_digits}.')
  lengths = functools.partial(DISTRIBUTIONS[distribution], num_digits=num_digits, known=known_digits)
  sample = addition(known_digits, max_digits, lengths).sample
  return jax.jit(lambda key: jax.vmap(sample)(jax.random.split(key, num_problems)))(key)  # as one program


def check_distribution(name: str) -> None:
  """Raises ValueError unless `name` is a distribution in `DISTRIBUTIONS`."""
  if name not in DISTRIBUTIONS:
    raise ValueError(f'distribution: expected one of {tuple(DISTRIBUTIONS)}, got {name!r}.')


def before_and_after(key: chex.PRNGKey, settings: Addition, number: int) -> dict[str, Problem]:
  """Draws the `plus` problem sets that test a fine-tuning run: N digits, then N + k digits.

  Args:
    key: PRNG key, consumed.
    settings: give N and k.
    number: B, of each set; 0 for no sets.

  Returns:
    `N` and `N+k` (k as a number) -> `Problem` with a leading axis B; all digit arrays have one size.
  """
  known, longest = settings.known_digits, settings.known_digits + settings.extra_digits
  names = {'N': known, f'N+{settings.extra_digits}': longest}
  return {name: draw_problems(jax.random.fold_in(key, n), number, 'plus', n, known, longest)
          for name, n in names.items() if number}


def by_digits(settings: Addition, digits: Sequence[int] | None = None
              ) -> tuple[Task, Callable[[chex.PRNGKey, int], dict[str, Problem]]]:
  """Makes the task and the `plus` problem sets for analysis; a set's name is its number of digits.

  Args:
    settings: give N; tests reward right responses with 1 and wrong ones with 0, whatever `wrong_reward` is.
    digits: numbers of digits of the longer operand; N and N + 1 if None.

  Returns:
    The task, with arrays for the longest problems, and `(key, B) -> {name: problems [B]}`.
  """
  known = settings.known_digits
  numbers = [known, known + 1] if digits is None else list(digits)
  longest = max(numbers)

  def draw(key, num_problems):
    return {str(n): draw_problems(jax.random.fold_in(key, n), num_problems, 'plus', n, known, longest) for n in numbers}

  return plus_task(min(known, longest), max(longest - known, 0), vocab_size=settings.vocab_size), draw


def by_digits_and_distribution(settings: Addition, digits: Sequence[int], distributions: Sequence[str],
                               num_problems: int, context_length: int, seed: int = 0) -> Iterator[ProblemSet]:
  """Yields a problem set for each number of digits and distribution, labelled `digits` and `distribution`.

  Args:
    settings: give N.
    digits: numbers of digits of the longer operand; each has its own task, with arrays of its size.
    distributions: names in `DISTRIBUTIONS`.
    num_problems: B, of each set.
    context_length: context length of the tested model.
    seed: seed of problems and samples.

  Raises:
    ValueError: before the first set, if a distribution is unknown, a number of digits is less than 1, or texts do not
      fit into the context.
  """
  tasks = {n: task_of_digits(settings, n, context_length) for n in digits}
  for distribution in distributions:
    check_distribution(distribution)
  for n, task in tasks.items():
    for distribution in distributions:
      problem_key, answer_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), n))
      problems = draw_problems(problem_key, num_problems, distribution, n, settings.known_digits, n)
      yield ProblemSet(task, problems, answer_key, {'digits': n, 'distribution': distribution})


def task_of_digits(settings: Addition, num_digits: int, context_length: int) -> Task:
  """Makes the task of problems whose longer operand has `num_digits` digits.

  Raises:
    ValueError: if the number of digits is less than 1, or the model's context is too short.
  """
  if num_digits < 1:
    raise ValueError(f'digits: expected 1 or more, got {num_digits}.')
  task, _ = by_digits(settings, [num_digits])
  needed = task.prompt_length + task.response_length
  if needed > context_length:
    raise ValueError(f'digits: {num_digits} need a context of {needed}, and the model has {context_length}; take '
                     'fewer.')
  return task
