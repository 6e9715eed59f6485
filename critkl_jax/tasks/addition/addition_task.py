"""The addition task (Vassoyan et al., arXiv 2502.06533, section 4), for fine-tuning and for pre-training."""

import functools
from collections.abc import Callable

import chex
import jax
import numpy as np

from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.addition.draft import draft_addition
from critkl_jax.tasks.addition.problem import longest_lengths, plus_lengths, sample_operands
from critkl_jax.tasks.addition.rewards import reward, well_formed
from critkl_jax.tasks.addition.solution import prompt_length, render_prompt, render_solution, solution_length
from critkl_jax.tasks.addition.text import END_OF_SCRATCHPAD_IDS, TOKENIZER
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.tokenizers import CharTokenizer

LENGTH_MARGIN = 100


def addition(known_digits: int, max_digits: int, lengths: Callable[[chex.PRNGKey], chex.Array],
             length_margin: int = LENGTH_MARGIN, wrong_reward: float = 0.0, vocab_size: int = 0) -> Task:
  """Makes the addition task.

  Args:
    known_digits: N, the most digits seen in pre-training; it determines the critical tokens.
    max_digits: M, the most digits of an operand; it determines the sizes of arrays.
    lengths: key -> int32 `[2]` numbers of digits, for example `plus_lengths` with its numbers bound.
    length_margin: characters that a response may have beyond the longest solution; 100 in the released code.
    wrong_reward: reward of a wrong response, where a right one gets 1.
    vocab_size: the model's vocabulary size, to which the task's 41 characters are padded; 0 for no padding.

  Returns:
    The `Task`.

  Raises:
    ValueError: if known_digits or max_digits is less than 1, or vocab_size is neither 0 nor at least 41.
  """
  if known_digits < 1 or max_digits < 1:
    raise ValueError(f'known_digits and max_digits: expected 1 or more, got {known_digits} and {max_digits}.')
  response_length = solution_length(max_digits) + length_margin

  def sample(key):
    lengths_key, digits_key = jax.random.split(key)
    return sample_operands(digits_key, lengths(lengths_key), max_digits)

  return Task(
      tokenizer=CharTokenizer(vocab_size=vocab_size),
      prompt_length=prompt_length(max_digits),
      response_length=response_length,
      stop=stop_after([END_OF_SCRATCHPAD_IDS, TOKENIZER.encode('\n')], [TOKENIZER.pad_id]),
      sample=sample,
      prompt=render_prompt,
      solution=functools.partial(render_solution, known_digits=known_digits, length=response_length),
      reward=functools.partial(reward, wrong_reward=wrong_reward),
      well_formed=well_formed,
      solution_length=solution_length(max_digits),
      draft=draft_addition,
      shown=_operands)


def _operands(prompt: str) -> str:
  """Extracts the line `a+b` from a prompt."""
  lines = prompt.split('\n')
  return lines[1] if len(lines) > 1 else prompt


def plus_task(known_digits: int, extra_digits: int, wrong_reward: float = 0.0, vocab_size: int = 0) -> Task:
  """Makes the paper's fine-tuning task: "plus k" problems with N = `known_digits` and k = `extra_digits`.

  The other arguments are as in `addition`.
  """
  lengths = functools.partial(plus_lengths, num_digits=known_digits, extra_digits=extra_digits)
  return addition(known_digits, known_digits + extra_digits, lengths, wrong_reward=wrong_reward, vocab_size=vocab_size)


def plus_task_of(settings: Addition) -> Task:
  """Makes the `plus_task` of a checkpoint's settings."""
  return plus_task(settings.known_digits, settings.extra_digits, settings.wrong_reward, settings.vocab_size)


def pretraining_task(known_digits: int, longest: int, vocab_size: int = 0) -> Task:
  """Makes the pre-training task of examples whose longer operand has exactly `longest` digits.

  All examples of a batch are then nearly equally long.
  """
  return addition(known_digits, longest, functools.partial(longest_lengths, num_digits=longest), length_margin=0,
                  vocab_size=vocab_size)


def curriculum(settings: Addition) -> tuple[list[Task], Callable[[int, int], int]]:
  """Makes the tasks of pre-training, one for each number of digits of the longer operand, and the choice of a step's.

  If both lengths are uniform in 1..N, the longer is n with probability (2n - 1) / N^2.

  Returns:
    The tasks of n = 1..N, and a function `(seed, step) -> n - 1`, on the host.
  """
  n = np.arange(1, settings.known_digits + 1)

  def pick(seed, step):
    rng = np.random.default_rng((seed, step))
    return int(rng.choice(n, p=(2 * n - 1) / settings.known_digits**2)) - 1

  return [pretraining_task(settings.known_digits, longest, settings.vocab_size) for longest in n.tolist()], pick
