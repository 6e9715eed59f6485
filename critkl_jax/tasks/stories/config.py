"""Settings of the task `stories`: the record that a checkpoint saves, and the parts that training configs contain."""

import dataclasses
from typing import ClassVar

from critkl_jax.config import at_least, between, convert_fields, one_of

MOST_FACTS = 100  # in a story
PLACE, FACTS = 'place', 'facts'  # what is asked for


@dataclasses.dataclass(frozen=True)
class StoriesPretraining:
  """Settings of pre-training on stories of up to N facts.

  Attributes:
    known_facts: N, the most facts of a story.
  """

  known_facts: int = 5

  def __post_init__(self):
    convert_fields(self)
    between(self, 1, MOST_FACTS, 'known_facts')


@dataclasses.dataclass(frozen=True)
class StoriesFinetuning:
  """Settings of fine-tuning on stories of N + k facts.

  Attributes:
    extra_facts: k: stories have N + k facts, where N is the most facts seen in the reference's pre-training.
    asks: What is asked for: `place`, where a person or an object is, after the facts that show it, rewarded with 1 or
      0 on the device; or `facts` alone, in their order (summarisation by extraction), rewarded in Python by ROUGE-L.
  """

  extra_facts: int = 4
  asks: str = PLACE

  def __post_init__(self):
    convert_fields(self)
    between(self, 0, MOST_FACTS, 'extra_facts')
    one_of(self, 'asks', PLACE, FACTS)


@dataclasses.dataclass(frozen=True)
class Stories:
  """Settings of the task, as a checkpoint saves them.

  Attributes:
    known_facts: N, the most facts seen in pre-training.
    extra_facts: k: stories have N + k facts.
    vocab_size: number of token ids to which the words are padded; 0 for no padding.
    asks: what is asked for, `place` or `facts`; pre-training asks for both.
  """

  name: ClassVar[str] = 'stories'  # in checkpoints
  known_facts: int = 5
  extra_facts: int = 0
  vocab_size: int = 0
  asks: str = PLACE

  def __post_init__(self):
    convert_fields(self)
    between(self, 1, MOST_FACTS, 'known_facts')
    between(self, 0, MOST_FACTS, 'extra_facts')
    at_least(self, 0, 'vocab_size')
    one_of(self, 'asks', PLACE, FACTS)

  def finetuned(self, task: StoriesFinetuning) -> 'Stories':
    """Returns the settings for fine-tuning a model that was pre-trained with these settings."""
    return dataclasses.replace(self, extra_facts=task.extra_facts, asks=task.asks)
