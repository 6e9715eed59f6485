"""A synthetic task with random prompts and fixed lengths, for measuring time and memory of any model."""

import jax
import jax.numpy as jnp

from critkl_jax.records import Tokens
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.tokenizers import CharTokenizer


def fixed_lengths(vocab_size: int, prompt_length: int, response_length: int) -> Task:
  """Makes a task whose prompts are random tokens and whose responses always have `response_length` tokens.

  The reward is the share of tokens below the middle of the vocabulary.

  Args:
    vocab_size: V, number of token ids; id 0 is the padding and in no prompt.
    prompt_length: Q, tokens of each prompt.
    response_length: T, tokens of each response.
  """

  def prompt(problem):
    return Tokens(problem, jnp.ones(prompt_length, bool))

  def reward(problem, actions, mask):
    return jnp.sum((actions < vocab_size // 2) & mask, dtype=jnp.float32) / response_length

  return Task(tokenizer=CharTokenizer('\0', vocab_size), prompt_length=prompt_length, response_length=response_length,
              stop=stop_after([[vocab_size]]),  # no such token
              sample=lambda key: jax.random.randint(key, (prompt_length,), 1, vocab_size), prompt=prompt, reward=reward)
