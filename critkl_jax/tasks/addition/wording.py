"""How reports of fine-tuning name addition and its test sets."""

from critkl_jax.tasks.addition.config import Addition
from critkl_jax.tasks.task import NamedSet


def about(settings: Addition) -> str:
  """Describes what a reference knows and what reinforcement learning trains, in two sentences."""
  known = settings.known_digits
  return (f'The reference was pre-trained on additions of up to N = {known} digits. Reinforcement learning trains a '
          f'copy of it on {known + settings.extra_digits}.')


def title(settings: Addition) -> str:
  """Names the problems that are trained on, in a few words."""
  return f'{settings.known_digits} + {settings.extra_digits} digits'


def named_sets(settings: Addition) -> dict[str, NamedSet]:
  """Describes the sets of `before_and_after`."""
  known, extra = settings.known_digits, settings.extra_digits
  return {'N': NamedSet(f'N = {known} digits (known from pre-training)'),
          f'N+{extra}': NamedSet(f'N + {extra} = {known + extra} digits (trained here)')}
