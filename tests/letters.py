"""A task so small that a model of one block learns it in seconds."""

import jax
import jax.numpy as jnp

from critkl_jax.records import Solution, Tokens
from critkl_jax.tasks.task import Task, stop_after
from critkl_jax.tasks.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer('%abcd;')


def letter_task():
  """A task of our own: the prompt is a letter, and it is right to answer with that letter alone."""
  end = TOKENIZER.vocab_size - 1

  def prompt(problem):
    return Tokens(tokens=jnp.stack([jnp.int32(0), problem]), mask=jnp.array([False, True]))

  def solution(problem):
    tokens = jnp.stack([problem, jnp.int32(end), jnp.int32(0), jnp.int32(0)])
    return Solution(tokens=tokens, mask=jnp.arange(4) < 2, critical=jnp.arange(4) < 1)

  def reward(problem, actions, mask):
    return ((actions[0] == problem) & mask[0]).astype(jnp.float32)

  return Task(tokenizer=TOKENIZER, prompt_length=2, response_length=4, stop=stop_after([[end]]),
              sample=lambda key: jax.random.randint(key, (), 1, 5), prompt=prompt, solution=solution, reward=reward)
