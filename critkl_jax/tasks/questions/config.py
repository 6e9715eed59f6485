"""Settings of the task `questions`."""

import dataclasses
import json
from typing import Any, ClassVar

from critkl_jax.config import at_least, convert_fields

MOST_TOKENS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
  """Settings of questions that a run and its checkpoints share.

  Attributes:
    chat: Whether prompts are put into the chat template of the model directory, as messages of the user.
    chat_options: Variables of the chat template, as a JSON object.
    stop: A text that ends an answer, besides the end-of-sequence tokens; empty for none.
    response_length: T, the most tokens of a response, its end token included; 0 for those of the longest answer.
    held_out: Share of the different prompts that tests use and training does not, spread evenly over the file.
  """

  chat: bool = False
  chat_options: str = ''
  stop: str = ''
  response_length: int = 0
  held_out: float = 0.1

  @property
  def template_options(self) -> dict[str, Any]:
    """The variables of the chat template."""
    return json.loads(self.chat_options or '{}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFinetuning(TextSettings):
  """Settings of fine-tuning on questions from a file.

  Attributes:
    model: Hugging Face model directory, whose weights are the reference (`huggingface.load_pretrained`); empty for the
      checkpoint of `reference`, which was made from such a directory.
    prompts: JSON-lines file with `prompt` (a text, or messages with `role` and `content`) and `answer` in each line.
  """

  model: str = ''
  prompts: str = ''

  def __post_init__(self):
    convert_fields(self)
    _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(TextSettings):
  """Settings of the task, as a checkpoint saves them; files are named by their absolute paths.

  Attributes:
    prompts: JSON-lines file of prompts and answers.
    checksum: checksum of this file, which must not change between runs that belong together.
    tokenizer: model directory with tokenizer.json.
    tokenizer_checksum: checksum of the files of the tokenizer, which must not change either.
    vocab_size: number of token ids of the model.
  """

  name: ClassVar[str] = 'questions'  # in checkpoints
  prompts: str
  checksum: int
  tokenizer: str
  tokenizer_checksum: int
  vocab_size: int

  def __post_init__(self):
    convert_fields(self, checksum=2**32 - 1, tokenizer_checksum=2**32 - 1)
    at_least(self, 1, 'vocab_size')
    _check(self)


def _check(config: TextSettings) -> None:
  """Raises ValueError if a setting is not allowed; the message names it."""
  if not 0 <= config.response_length <= MOST_TOKENS:
    raise ValueError(f'response_length: expected 0 to {MOST_TOKENS}, got {config.response_length}.')
  if not 0 <= config.held_out < 1:
    raise ValueError(f'held_out: expected 0 or more and less than 1, got {config.held_out}.')
  try:
    options = json.loads(config.chat_options or '{}')
  except ValueError as error:
    raise ValueError(f'chat_options: expected a JSON object, got {config.chat_options!r} ({error}).') from error
  if not isinstance(options, dict):
    raise ValueError(f'chat_options: expected a JSON object, got {config.chat_options!r}.')
  if options and not config.chat:
    raise ValueError(f'chat_options: has no effect with chat=False, got {config.chat_options!r}; set chat=True.')
