"""The task `stories`: questions about who is where and who has what, answered with a written chain of facts.

In the manner of the tasks of bAbI (Weston et al., arXiv 1502.05698); the number of facts plays the part that the number
of digits plays in addition.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax.tasks.host_side import Answers, HostSide
from critkl_jax.tasks.rewards import functions
from critkl_jax.tasks.stories.config import FACTS, PLACE, Stories, StoriesFinetuning
from critkl_jax.tasks.stories.story import Story, sample_story
from critkl_jax.tasks.stories.text import (
  NEWLINE,
  PAD,
  WordTokenizer,
  prompt_length,
  render_prompt,
  render_solution,
  reward,
  solution_length,
  well_formed,
)
from critkl_jax.tasks.task import Task, stop_after

ROUGE = functions.rouge_l.__name__
MARGIN = 6  # tokens that a response may have beyond the longest chain: two sentences


def stories(least: int, most: int, vocab_size: int = 0, margin: int = MARGIN, asks: Sequence[str] = (PLACE,)) -> Task:
  """Makes the task of stories of `least` to `most` facts, all numbers equally often.

  Args:
    least: the fewest facts, 1 or more.
    most: M, the most facts; it determines the sizes of arrays.
    vocab_size: the model's vocabulary size, to which the tokens are padded; 0 for no padding.
    margin: tokens that a response may have beyond the longest chain.
    asks: what is asked for: `place`, `facts`, or both, each with probability 1/2.

  Raises:
    ValueError: if the numbers are not in order, or the vocabulary is too small.
  """
  if not 1 <= least <= most:
    raise ValueError(f'least, most: expected 1 <= least <= most, got {least} and {most}.')
  response_length = solution_length(most) + margin

  def sample(key):
    length_key, story_key = jax.random.split(key)
    wants_facts = jax.random.bernoulli(jax.random.fold_in(key, 2)) if len(asks) > 1 else asks[0] == FACTS
    length = jax.random.randint(length_key, (), least, most + 1, dtype=jnp.int32)
    return sample_story(story_key, length, most, wants_facts)

  return Task(
      tokenizer=WordTokenizer(vocab_size), prompt_length=prompt_length(most), response_length=response_length,
      stop=stop_after([[NEWLINE]], [PAD]), sample=sample, prompt=render_prompt,
      solution=functools.partial(render_solution, length=response_length), reward=reward, well_formed=well_formed,
      solution_length=solution_length(most))


def summaries(least: int, most: int, vocab_size: int = 0) -> Task:
  """Makes the task of summarisation by extraction: the facts that a question needs, in their order.

  The reward is the F-measure of ROUGE-L against the right facts, in Python: a share of them, or facts too many, are
  rewarded in part. Success is 1: the right facts, whatever the punctuation, which ROUGE-L does not see. Arguments and
  errors as in `stories`.
  """
  task = stories(least, most, vocab_size, asks=(FACTS,))

  @functools.partial(jax.jit, static_argnums=2)
  def sampled(seed, first, number):
    key = functools.reduce(jax.random.fold_in, seed, jax.random.key(0))
    return jax.vmap(lambda i: task.sample(jax.random.fold_in(key, first + i)))(jnp.arange(number, dtype=jnp.uint32))

  def draw(seed, first, number):
    with jax.default_device(jax.local_devices(backend='cpu')[0]):  # the accelerator may be in the middle of a step
      return jax.device_get(sampled(np.asarray(seed, np.uint32), np.uint32(first), number))

  write = jax.jit(lambda problems: (jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)))

  def read(problems, actions, mask):
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      written = jax.device_get(write(jax.device_get(problems)))
    prompts, answers = ([task.tokenizer.decode(*row) for row in zip(text.tokens, text.mask)] for text in written)
    completions = [task.tokenizer.decode(*row) for row in zip(actions, mask)]
    return Answers(prompts, completions, {'answer': answers}, list(range(1, len(prompts) + 1)))

  return dataclasses.replace(task, sample=None, reward=None, host=HostSide(
      draw, read, {ROUGE: f'{functions.__name__}:{ROUGE}'}, {ROUGE: 1.0}, ('answer',)))


def stories_of(settings: Stories) -> Task:
  """Makes the task on which a run trains: stories of exactly N + k facts."""
  number = settings.known_facts + settings.extra_facts
  return _task_of(settings, number, number)


def _task_of(settings, least, most):
  make = summaries if settings.asks == FACTS else stories
  return make(least, most, settings.vocab_size)


def curriculum(settings: Stories) -> tuple[list[Task], Callable[[int, int], int]]:
  """Makes the tasks of pre-training, one for each number of facts 1..N, and the choice of a step's task.

  All stories of a batch have the same number of facts n, drawn with probability proportional to n.

  Returns:
    The tasks of n = 1..N, and a function `(seed, step) -> n - 1`, on the host.
  """
  n = np.arange(1, settings.known_facts + 1)

  def pick(seed, step):
    return int(np.random.default_rng((seed, step)).choice(n, p=n / n.sum())) - 1

  return [stories(number, number, settings.vocab_size, margin=0, asks=(PLACE, FACTS)) for number in n.tolist()], pick


def draw_stories(key: chex.PRNGKey, num_problems: int, facts: int, most: int, asks: str = PLACE) -> Story:
  """Draws stories of `facts` facts, in arrays for `most`: a `Story` with a leading axis B."""
  draw = jax.vmap(lambda key: sample_story(key, facts, most, asks == FACTS))
  return jax.jit(lambda key: draw(jax.random.split(key, num_problems)))(key)


def before_and_after(key: chex.PRNGKey, settings: Stories, number: int) -> dict[str, Story]:
  """Draws the problem sets that test a fine-tuning run: N facts, then N + k.

  Args:
    key: PRNG key, consumed.
    settings: give N and k.
    number: B, of each set; 0 for no sets.
  """
  known, longest = settings.known_facts, settings.known_facts + settings.extra_facts
  names = {'N': known, f'N+{settings.extra_facts}': longest}
  return {name: draw_stories(jax.random.fold_in(key, n), number, n, longest, settings.asks)
          for name, n in names.items() if number}


def by_facts(settings: Stories, facts: Sequence[int] | None = None
             ) -> tuple[Task, Callable[[chex.PRNGKey, int], dict[str, Story]]]:
  """Makes the task and the problem sets for tests and analysis; a set's name is its number of facts.

  Args:
    settings: give N and k.
    facts: numbers of facts; None for N and N + k (N + 4 if k is 0).

  Returns:
    The task, with arrays for the longest stories, and `(key, B) -> {name: problems [B]}`.
  """
  known = settings.known_facts
  numbers = [known, known + (settings.extra_facts or StoriesFinetuning.extra_facts)] if facts is None else list(facts)

  def draw(key, num_problems):
    return {str(n): draw_stories(jax.random.fold_in(key, n), num_problems, n, max(numbers), settings.asks)
            for n in numbers}

  return _task_of(settings, min(numbers), max(numbers)), draw
