"""Tests a checkpoint by operand length.

    python -m experiments.evaluate --checkpoint=runs/finetune --digits=5,6,7
"""

import json
import pathlib

from absl import flags

from critkl_jax import checkpoint, evaluate
from critkl_jax.gpt2 import GPT2

from .flags import run
from .tables import accuracy_rows

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
  loaded = checkpoint.load_checkpoint(CHECKPOINT.value, STEP.value)
  known = loaded.info.known_digits
  try:
    digits = [int(n) for n in DIGITS.value] if DIGITS.value else [known, known + 1, known + 2]
    table = evaluate.accuracy_table(GPT2(loaded.info.model), loaded.params, known, digits, DISTRIBUTION.value,
                                    NUM_PROBLEMS.value, SEED.value, GREEDY.value, TEMPERATURE.value)
  except ValueError as error:
    raise SystemExit(f'error: --digits: {error}') from error
  print(f'{loaded.path}: step {loaded.step}, pre-trained on 1..{known} digits; accuracy with 95% bootstrap intervals')
  print(accuracy_rows(table))
  if JSON.value:
    result = {'checkpoint': str(loaded.path), 'step': loaded.step, 'known_digits': known, 'accuracy': table}
    pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
