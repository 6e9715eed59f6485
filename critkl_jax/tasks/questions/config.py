"""Settings of the task `questions`."""

import dataclasses
import json
from typing import Any, ClassVar

from critkl_jax.config import at_least, convert_fields
from critkl_jax.tasks.questions.sources import GYM, is_gym

MOST_TOKENS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
  """Settings of questions that a run and its checkpoints share.

  Attributes:
    chat: Whether prompts are put into the chat template of the model directory, as messages of the user.
    chat_options: Variables of the chat template, as a JSON object.
    stop: A text that ends an answer, besides the end-of-sequence tokens; empty for none.
    response_length: T, the most tokens of a response, its end token included; 0 for those of the longest answer, which
      reward functions do not know.
    held_out: Share of the different prompts that tests use and training does not, spread evenly over the file.
    reward: Reward functions in Python, separated by commas: `module:function`, or a built-in one (`exact_match`,
      `numeric_match`, `f1`, `rouge_l`, `answer_format`, `reasoning_gym`). They get `prompts`, `completions`,
      `completion_ids` and columns, as in TRL, and return a finite number for each completion. Empty to compare the
      tokens of a response with the answer, on the device; for reasoning_gym, its own scores.
    reward_weights: Factors of the reward functions, separated by commas; empty for 1 each.
    success: The least reward that counts as success.
    dataset_options: Settings of a dataset of reasoning_gym, as a JSON object; they override a size of 1000 and seed 0.
  """

  chat: bool = False
  chat_options: str = ''
  stop: str = ''
  response_length: int = 0
  held_out: float = 0.1
  reward: str = ''
  reward_weights: str = ''
  success: float = 1.0
  dataset_options: str = ''

  @property
  def template_options(self) -> dict[str, Any]:
    """The variables of the chat template."""
    return json.loads(self.chat_options or '{}')

  @property
  def gym_options(self) -> dict[str, Any]:
    """The settings of a dataset of reasoning_gym."""
    return json.loads(self.dataset_options or '{}')

  @property
  def reward_functions(self) -> dict[str, float]:
    """The weights of the reward functions in Python by their names; empty to compare tokens."""
    names = [name.strip() for name in self.reward.split(',')] if self.reward else (
        ['reasoning_gym'] if is_gym(self.prompts) else [])
    weights = [float(text) for text in self.reward_weights.split(',')] if self.reward_weights else [1.0] * len(names)
    return dict(zip(names, weights, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFinetuning(TextSettings):
  """Settings of fine-tuning on questions from a file.

  Attributes:
    model: Hugging Face model directory, whose weights are the reference (`huggingface.load_pretrained`); empty for the
      checkpoint of `reference`, which was made from such a directory.
    prompts: JSON-lines file with `prompt` (a text, or messages with `role` and `content`) in each line, and `answer`
      unless reward functions do without it; or `reasoning_gym:NAME`, a dataset of reasoning_gym.
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
    prompts: JSON-lines file of prompts and answers, or `reasoning_gym:NAME`.
    checksum: checksum of its content, which must not change between runs that belong together.
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
  for name in ('chat_options', 'dataset_options'):
    _check_json(name, getattr(config, name))
  if config.template_options and not config.chat:
    raise ValueError(f'chat_options: has no effect with chat=False, got {config.chat_options!r}; set chat=True.')
  if config.gym_options and not is_gym(config.prompts):
    raise ValueError(f'dataset_options: has no effect without task={GYM}NAME, got {config.dataset_options!r}; leave it '
                     'out.')
  if config.prompts:  # without prompts the task is another one, and these settings have no effect
    _check_rewards(config)


def _check_json(name, text):
  try:
    options = json.loads(text or '{}')
  except ValueError as error:
    raise ValueError(f'{name}: expected a JSON object, got {text!r} ({error}).') from error
  if not isinstance(options, dict):
    raise ValueError(f'{name}: expected a JSON object, got {text!r}.')


def _check_rewards(config):
  names = [name.strip() for name in config.reward.split(',')] if config.reward else []
  if len(set(names)) < len(names) or not all(names):
    raise ValueError(f'reward: expected different names separated by commas, got {config.reward!r}.')
  try:
    functions = config.reward_functions
  except ValueError as error:
    number = len(names) or int(is_gym(config.prompts))
    raise ValueError(f'reward_weights: expected {number} numbers separated by commas, one for each function of reward, '
                     f'got {config.reward_weights!r}.') from error
  if not all(abs(weight) < float('inf') for weight in functions.values()):
    raise ValueError(f'reward_weights: expected finite numbers, got {config.reward_weights!r}.')
  if not functions and config.success != 1.0:
    raise ValueError(f'success: has no effect without reward, got {config.success}; leave it out, or set reward.')
  if functions and not config.response_length:
    raise ValueError('response_length: with reward functions, say how long a response may be, in tokens; got 0.')
