"""Tests a checkpoint by operand length.

    python -m experiments.evaluate --checkpoint=runs/finetune --digits=5,6,7
"""

from absl import flags

from critkl_jax import attention, checkpoint, evaluate, hosts, storage
from critkl_jax.analysis.reading import model_of
from critkl_jax.config import MOST_PROBLEMS, TEMPERATURES

from . import parsing, paths
from .exits import refuse
from .flags import run
from .tables import command, print_accuracies
from .workdirs import refuse_other_file

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', str(checkpoint.SHIPPED_REFERENCE), 'Workdir, checkpoint directory or step directory.')
STEP = flags.DEFINE_integer('step', None, 'Which step of a directory; the latest if not given.')
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N, N+1 and N+2 if not given.')
DISTRIBUTION = flags.DEFINE_multi_enum(
    'distribution', list(evaluate.DISTRIBUTIONS), list(evaluate.DISTRIBUTIONS), 'Lengths of the operands.')
NUM_PROBLEMS = flags.DEFINE_integer('num_problems', 200, 'Problems in a cell of the table.', 1, MOST_PROBLEMS)
GREEDY = flags.DEFINE_boolean('greedy', True, 'Take the most probable tokens instead of samples.')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Of the samples, where not greedy.', *TEMPERATURES)
SEED = parsing.define_seed()
JSON = flags.DEFINE_string('json', None, 'File that takes the table as JSON.')


def check() -> tuple[checkpoint.Checkpoint, list[int]]:
  """Returns the checkpoint, whose parameters are not read yet, and the numbers of digits, or exits with one line."""
  given = parsing.read_digits(DIGITS)
  if not CHECKPOINT.value:
    refuse('--checkpoint: expected a path, got an empty one.')
  if len(set(DISTRIBUTION.value)) < len(DISTRIBUTION.value):
    refuse(f'--distribution: expected none twice, got {", ".join(DISTRIBUTION.value)}.')
  paths.check_file('json', JSON.value)
  if JSON.value:
    refuse_other_file(JSON.value, ('checkpoint', 'step', 'known_digits', 'accuracy'), 'json')
  found = checkpoint.find_checkpoint(CHECKPOINT.value, STEP.value)
  known = found.info.known_digits
  digits = given or [known, known + 1, known + 2]
  try:
    for number in digits:
      evaluate.task_of(found.info.model, known, number)
  except ValueError as error:
    refuse(f'--{error}' if 'digits' in str(error) else f'--checkpoint: {found.path}: {error}')
  return found, digits


def main(found: checkpoint.Checkpoint, digits: list[int]) -> None:
  """Prints the table and writes it as JSON where asked."""
  hosts.say(f'Reading {CHECKPOINT.value}.')
  loaded, known = checkpoint.load_checkpoint(found.path), found.info.known_digits
  say_attention(loaded.info.model.attention)
  hosts.say(f'Testing {loaded.path}, step {loaded.step}, pre-trained on 1..{known} digits. Each line of the table is '
            'compiled first, which takes 5 to 20 s on a CPU.')
  rows = evaluate.accuracies(model_of(loaded), loaded.params, known, digits, DISTRIBUTION.value, NUM_PROBLEMS.value,
                             SEED.value, GREEDY.value, TEMPERATURE.value)
  whose = 'greedy answers' if GREEDY.value else f'answers sampled at temperature {TEMPERATURE.value:g}'
  table = print_accuracies(rows, digits, DISTRIBUTION.value, known, NUM_PROBLEMS.value, whose)
  if JSON.value:
    result = {'checkpoint': str(loaded.path), 'step': loaded.step, 'known_digits': known, 'accuracy': table}
    storage.write_json(JSON.value, result)
  written = f'In {JSON.value}: the same table. ' if JSON.value else ''
  path = CHECKPOINT.value if STEP.value is None else loaded.path
  print(f'{written}Next, token by token: {command("analyze", f"--checkpoints={path}")}')


def say_attention(name: str) -> None:
  """Says so if the attention that a model was trained with is not here: it is read in plain JAX."""
  try:
    attention.check_implementation(name)
  except ValueError as error:
    hosts.say(f'The checkpoint names an attention that is not here ({error}) and is read with that.')


if __name__ == '__main__':
  run(main, check)
