"""Settings of the addition task: the record that a checkpoint saves, and the parts that training configs contain."""

import dataclasses
from typing import ClassVar

from critkl_jax.config import at_least, between, convert_fields

MOST_DIGITS = 1000  # of an operand: the solution then has about three million characters


@dataclasses.dataclass(frozen=True)
class AdditionPretraining:
  """Settings of pre-training on additions of up to N digits.

  Attributes:
    known_digits: N, the most digits of an operand.
    pad_vocabulary: Whether the task's vocabulary of 41 characters is padded to the model's; otherwise a model of
      another vocabulary size is refused.
  """

  known_digits: int = 5
  pad_vocabulary: bool = False

  def __post_init__(self):
    convert_fields(self)
    between(self, 1, MOST_DIGITS, 'known_digits')


@dataclasses.dataclass(frozen=True)
class AdditionFinetuning:
  """Settings of fine-tuning on additions of N + k digits.

  Attributes:
    extra_digits: k: problems have N + k digits, where N is the most digits seen in the reference's pre-training.
    wrong_reward: Reward of a wrong answer, where a right one gets 1: 0 in the paper, -1 in its released code.
  """

  extra_digits: int = 1
  wrong_reward: float = 0.0

  def __post_init__(self):
    convert_fields(self)
    between(self, 0, MOST_DIGITS, 'extra_digits')
    if not self.wrong_reward < 1:
      raise ValueError(f'wrong_reward: expected less than 1, the reward of a right response, got {self.wrong_reward}.')


@dataclasses.dataclass(frozen=True)
class Addition:
  """Settings of the addition task, as a checkpoint saves them.

  Attributes:
    known_digits: N, the most digits seen in pre-training.
    extra_digits: k: problems have N + k digits.
    wrong_reward: reward of a wrong answer, where a right one gets 1.
    vocab_size: number of token ids to which the 41 characters are padded; 0 for no padding.
  """

  name: ClassVar[str] = 'addition'  # in checkpoints
  known_digits: int = 5
  extra_digits: int = 0
  wrong_reward: float = 0.0
  vocab_size: int = 0

  def __post_init__(self):
    convert_fields(self)
    between(self, 1, MOST_DIGITS, 'known_digits')
    at_least(self, 0, 'vocab_size')
    AdditionFinetuning(self.extra_digits, self.wrong_reward)  # checks both fields

  @classmethod
  def of_pretraining(cls, task: AdditionPretraining, vocab_size: int) -> 'Addition':
    """Returns the settings for a model of `vocab_size` tokens that is pre-trained on additions."""
    return cls(task.known_digits, vocab_size=vocab_size if task.pad_vocabulary else 0)

  def finetuned(self, task: AdditionFinetuning) -> 'Addition':
    """Returns the settings for fine-tuning a model that was pre-trained with these settings."""
    return dataclasses.replace(self, extra_digits=task.extra_digits, wrong_reward=task.wrong_reward)
