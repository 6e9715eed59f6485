"""Tests a checkpoint by operand length.

    python -m experiments.evaluate --checkpoint=runs/finetune --digits=5,6,7
"""


from absl import flags

from critkl_jax import checkpoint, evaluate, hosts, storage
from critkl_jax.gpt2 import GPT2

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
NUM_PROBLEMS = flags.DEFINE_integer('num_problems', 200, 'Problems in a cell of the table.', lower_bound=1)
GREEDY = flags.DEFINE_boolean('greedy', True, 'Take the most probable tokens instead of samples.')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Of the samples, where not greedy.', lower_bound=1e-6)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of problems and samples.')
JSON = flags.DEFINE_string('json', None, 'File that takes the table as JSON.')


def main() -> None:
  """Prints the table and writes it as JSON where asked."""
  if JSON.value:
    refuse_other_file(JSON.value, ('checkpoint', 'step', 'known_digits', 'accuracy'), 'json')
  hosts.say(f'Reading {CHECKPOINT.value}.')
  loaded = checkpoint.load_checkpoint(CHECKPOINT.value, STEP.value)
  known = loaded.info.known_digits
  try:
    digits = [int(n) for n in DIGITS.value] if DIGITS.value else [known, known + 1, known + 2]
  except ValueError:
    refuse(f'--digits: expected numbers, got {DIGITS.value}.')
  hosts.say(f'Testing {loaded.path}, step {loaded.step}, pre-trained on 1..{known} digits. Each line of the table is '
            'compiled first, which takes 5 to 20 s on a CPU.')
  try:
    rows = evaluate.accuracies(GPT2(loaded.info.model), loaded.params, known, digits, DISTRIBUTION.value,
                               NUM_PROBLEMS.value, SEED.value, GREEDY.value, TEMPERATURE.value)
    whose = 'greedy answers' if GREEDY.value else f'answers sampled at temperature {TEMPERATURE.value:g}'
    table = print_accuracies(rows, digits, DISTRIBUTION.value, known, NUM_PROBLEMS.value, whose)
  except ValueError as error:
    refuse(f'--{error}')
  if JSON.value:
    result = {'checkpoint': str(loaded.path), 'step': loaded.step, 'known_digits': known, 'accuracy': table}
    storage.write_json(JSON.value, result)
  written = f'In {JSON.value}: the same table. ' if JSON.value else ''
  path = CHECKPOINT.value if STEP.value is None else loaded.path
  print(f'{written}Next, token by token: {command("analyze", f"--checkpoints={path}")}')


if __name__ == '__main__':
  run(main)
