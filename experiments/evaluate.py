"""Tests the accuracy of a checkpoint, or of a Hugging Face model directory, by problem set.

    python -m experiments.evaluate --checkpoint=runs/finetune --digits=5,6,7
    python -m experiments.evaluate --checkpoint=runs/stories --facts=6,8,10
    python -m experiments.evaluate --model=Qwen3-0.6B --task=questions --prompts=test.jsonl --held_out=0
"""

import dataclasses
from typing import Any

from absl import flags

from critkl_jax.analysis import evaluation
from critkl_jax.analysis.reading import model_of
from critkl_jax.models import attention
from critkl_jax.rl.loss_config import TEMPERATURES
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.tasks.addition import DISTRIBUTIONS, Addition, by_digits_and_distribution, task_of_digits
from critkl_jax.tasks.questions import Questions, TextFinetuning, question_sets
from critkl_jax.tasks.stories import FACTS as FACTS_ALONE
from critkl_jax.tasks.stories import MOST_FACTS, PLACE, Stories
from critkl_jax.tasks.task import check_vocabulary
from critkl_jax.training.config import MOST_PROBLEMS

from . import parsing, paths
from .exits import refuse
from .flags import define_imported, pool_of_flags, read_imported, run
from .reference import check_facts, check_length, check_rewards, imported, load_imported, refuse_text
from .tables import command, print_accuracies, print_sets, sets_of
from .workdirs import held, refuse_other_file

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', str(checkpoint.SHIPPED_REFERENCE), 'Workdir, checkpoint directory or step directory.')
STEP = flags.DEFINE_integer('step', None, 'Step of a run to test; the latest if not given.')
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N, N+1 and N+2 if not given.')
FACTS = flags.DEFINE_list('facts', None, 'Facts of the stories; N and N + k, or N + 4 of a pre-trained model, if not '
                          'given.')
ASKS = flags.DEFINE_enum('asks', None, [PLACE, FACTS_ALONE], 'What is asked of stories; as in training if not given.')
DISTRIBUTION = flags.DEFINE_multi_enum(
    'distribution', list(DISTRIBUTIONS), list(DISTRIBUTIONS), 'Lengths of the operands.')
NUM_PROBLEMS = flags.DEFINE_integer('num_problems', 200, 'Problems of each cell of the table.', 1, MOST_PROBLEMS)
GREEDY = flags.DEFINE_boolean('greedy', True, 'Take the most probable tokens instead of samples.')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Temperature of the samples, with --nogreedy.', *TEMPERATURES)
SEED = parsing.define_seed()
JSON = flags.DEFINE_string('json', None, 'JSON file for the table.')
define_imported()


def check() -> tuple[checkpoint.Checkpoint, TextFinetuning | None, list[int]]:
  """Checks the flags and returns the arguments of `main`, or exits with one line; reads no parameters."""
  given, text = parsing.read_digits(DIGITS), read_imported()
  if not CHECKPOINT.value:
    refuse('--checkpoint: expected a path, got an empty one.')
  if text and flags.FLAGS['checkpoint'].present:
    refuse('--checkpoint: give this or --model, not both.')
  if len(set(DISTRIBUTION.value)) < len(DISTRIBUTION.value):
    refuse(f'--distribution: expected none twice, got {", ".join(DISTRIBUTION.value)}.')
  paths.check_file('json', JSON.value)
  found = imported(text) if text else checkpoint.find_checkpoint(CHECKPOINT.value, STEP.value)
  if JSON.value:
    own = 'known_digits' if isinstance(found.info.task, Addition) else 'task'
    refuse_other_file(JSON.value, ('checkpoint', 'step', own, 'accuracy'), 'json')
  own_flags = {'addition': ('digits', 'distribution'), 'stories': ('facts', 'asks')}
  for name in (name for task, names in own_flags.items() for name in names if task != found.info.task.name):
    if flags.FLAGS[name].present:
      refuse(f"--{name}: has no effect on the task '{found.info.task.name}'; leave it out.")
  if isinstance(found.info.task, Stories):
    asked = dataclasses.replace(found.info.task, asks=ASKS.value or found.info.task.asks)
    found = dataclasses.replace(found, info=dataclasses.replace(found.info, task=asked))
    return found, text, check_facts(found, parsing.read_digits(FACTS, MOST_FACTS))
  if isinstance(found.info.task, Questions):
    with refuse_text():
      task, _ = question_sets(found.info.task)
    check_rewards(task)
    check_length(task, found.info.model)
    return found, text, []
  settings = checkpoint.settings_of(found, Addition)
  known = settings.known_digits
  digits = given or [known, known + 1, known + 2]
  try:
    for number in digits:
      check_vocabulary(task_of_digits(settings, number, found.info.model.context_length), found.info.model.vocab_size)
  except ValueError as error:
    refuse(f'--{error}' if 'digits' in str(error) else f'--checkpoint: {found.path}: {error}')
  return found, text, digits


def main(found: checkpoint.Checkpoint, text: TextFinetuning | None, digits: list[int]) -> None:
  """Prints the table, and writes it as JSON if asked."""
  hosts.say(f'Reading {found.path if text else CHECKPOINT.value}.')
  loaded = load_imported(text) if text else dataclasses.replace(
      checkpoint.load_checkpoint(found.path), info=found.info)
  say_attention(loaded.info.model.attention)
  whose = 'greedy answers' if GREEDY.value else f'answers sampled at temperature {TEMPERATURE.value:g}'
  result = {'checkpoint': str(loaded.path), 'step': loaded.step}
  if not isinstance(loaded.info.task, Addition):
    pool = held.enter_context(pool_of_flags())
    sets = sets_of(loaded.info.task, digits or None, NUM_PROBLEMS.value, SEED.value)
    rows = evaluation.accuracies(model_of(loaded), loaded.params, sets, GREEDY.value, TEMPERATURE.value, pool=pool)
    result |= {'task': loaded.info.task.name, 'accuracy': print_sets(rows, whose)}
  else:
    result |= {'known_digits': loaded.info.task.known_digits, 'accuracy': test_addition(loaded, digits, whose)}
  if JSON.value:
    storage.write_json(JSON.value, result)
  written = f'In {JSON.value}: the same table. ' if JSON.value else ''
  path = CHECKPOINT.value if STEP.value is None else loaded.path
  following = '' if text else f'Next, token by token: {command("analyze", f"--checkpoints={path}")}'
  print(f'{written}{following}'.strip())


def test_addition(loaded: checkpoint.Checkpoint, digits: list[int], whose: str) -> list[dict[str, Any]]:
  """Tests a checkpoint by number of digits and distribution; prints the table and returns its rows."""
  known = loaded.info.task.known_digits
  hosts.say(f'Testing {loaded.path}, step {loaded.step}, pre-trained on 1..{known} digits. Each line of the table is '
            'compiled first, which takes 5 to 20 s on a CPU.')
  sets = by_digits_and_distribution(loaded.info.task, digits, DISTRIBUTION.value, NUM_PROBLEMS.value,
                                    loaded.info.model.context_length, SEED.value)
  rows = evaluation.accuracies(model_of(loaded), loaded.params, sets, GREEDY.value, TEMPERATURE.value)
  return print_accuracies(rows, digits, DISTRIBUTION.value, known, NUM_PROBLEMS.value, whose)


def say_attention(name: str) -> None:
  """Prints a note if the attention of a checkpoint is not available here, so that plain JAX replaces it."""
  try:
    attention.check_implementation(name)
  except ValueError as error:
    hosts.say(f'The attention of the checkpoint is not available here ({error}); plain JAX replaces it.')


if __name__ == '__main__':
  run(main, check)
