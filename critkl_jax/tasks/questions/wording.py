"""How reports of fine-tuning name questions and their test sets."""

import pathlib

from critkl_jax.tasks.questions.config import Questions
from critkl_jax.tasks.questions.questions_task import sizes_of_sets
from critkl_jax.tasks.task import NamedSet


def about(settings: Questions) -> str:
  """Describes what reinforcement learning trains, in two sentences."""
  sizes = sizes_of_sets(settings)
  return (f'{sizes["trained"]} questions of {settings.prompts} are trained on, {sizes.get("held_out", 0)} others are '
          'held out for tests. Reinforcement learning trains a copy of the reference.')


def title(settings: Questions) -> str:
  """Names the problems that are trained on, in a few words."""
  return f'questions of {pathlib.Path(settings.prompts).name}'


def named_sets(settings: Questions) -> dict[str, NamedSet]:
  """Describes the sets of `question_sets`."""
  meanings = {'held_out': 'questions held out', 'trained': 'questions trained on'}
  return {name: NamedSet(meanings[name], size) for name, size in sizes_of_sets(settings).items()}
