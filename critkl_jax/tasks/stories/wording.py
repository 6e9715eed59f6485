"""How reports of fine-tuning name stories and their test sets."""

from critkl_jax.tasks.stories.config import FACTS, Stories
from critkl_jax.tasks.task import NamedSet


def about(settings: Stories) -> str:
  """Describes what a reference knows and what reinforcement learning trains, in two sentences."""
  known = settings.known_facts
  return (f'The reference was pre-trained on stories of up to N = {known} facts. Reinforcement learning trains a copy '
          f'of it on {"summaries of stories of " if settings.asks == FACTS else ""}{known + settings.extra_facts}.')


def title(settings: Stories) -> str:
  """Names the problems that are trained on, in a few words."""
  what = 'summaries of stories' if settings.asks == FACTS else 'stories'
  return f'{what} of {settings.known_facts} + {settings.extra_facts} facts'


def named_sets(settings: Stories) -> dict[str, NamedSet]:
  """Describes the sets of `before_and_after`."""
  known, extra = settings.known_facts, settings.extra_facts
  return {'N': NamedSet(f'N = {known} facts (known from pre-training)'),
          f'N+{extra}': NamedSet(f'N + {extra} = {known + extra} facts (trained here)')}
