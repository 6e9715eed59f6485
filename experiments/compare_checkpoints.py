"""Compares two checkpoints: drift of parameters by layer, KL by position, flipped answers.

    python -m experiments.compare_checkpoints runs/finetune/reference runs/finetune --workdir=runs/compare
"""

import time

from absl import flags

from critkl_jax.analysis import reading
from critkl_jax.analysis.comparison import compare
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.runtime.checkpoint import Checkpoint
from critkl_jax.tasks.addition import Addition, task_of_digits
from critkl_jax.tasks.task import check_vocabulary
from critkl_jax.training.config import MOST_PROBLEMS

from . import parsing, paths
from .exits import refuse
from .flags import run
from .tables import command
from .workdirs import claim, refuse_other_results

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of comparison.json and comparison.png; nothing is written if '
                              'not given.')
PROBLEMS = flags.DEFINE_integer('problems', 128, 'Problems of each number of digits.', 1, MOST_PROBLEMS)
DIGITS = flags.DEFINE_list('digits', None, 'Digits of the longer operand; N and N+1 if not given.')
SEED = parsing.define_seed(text='Seed of the problems.')
SHOWN = flags.DEFINE_integer('shown', 10, 'Number of flipped answers to print.', lower_bound=0)


def check(first: str, second: str) -> tuple[Checkpoint, Checkpoint, list[int] | None, storage.Path | None]:
  """Checks the flags and returns the arguments of `main`, or exits with one line; reads no parameters."""
  digits = parsing.read_digits(DIGITS)
  workdir = None if WORKDIR.value is None else paths.read_workdir('workdir', WORKDIR.value)
  two, one = reading.load_pair(second, first, checkpoint.find_checkpoint)
  known = checkpoint.settings_of(one, Addition).known_digits
  try:
    for found in (one, two):
      task = task_of_digits(found.info.task, max(digits or [known + 1]), found.info.model.context_length)
      check_vocabulary(task, found.info.model.vocab_size)
  except ValueError as error:
    refuse(f'--{error}' if 'digits' in str(error) else f'{found.path}: {error}')
  if workdir:
    refuse_other_results(workdir / 'comparison.json', origin(one, two))
  return one, two, digits, workdir


def main(first: Checkpoint, second: Checkpoint, digits: list[int] | None, workdir: storage.Path | None) -> None:
  """Prints the comparison, and writes it into the workdir if there is one."""
  start = time.monotonic()
  if workdir:
    claim(workdir, 'compare_checkpoints')
  hosts.say(f'Comparing {second.path} with {first.path} on {PROBLEMS.value} problems of each number of digits: two '
            'programs to compile, each 10 to 40 s on a CPU.')
  one, two = (checkpoint.load_checkpoint(found.path) for found in (first, second))
  found = compare(one, two, PROBLEMS.value, digits, SEED.value, progress=True)
  print(f'first:  {one.path}, step {one.step}\nsecond: {two.path}, step {two.step}')
  print_drift(found['drift'], found['left_out'])
  print_answers(found)
  if workdir:
    write(origin(one, two) | found, workdir)
  kept = f'In {workdir}: comparison.json, comparison.png' if workdir else (
      'Nothing was written: --workdir=DIRECTORY keeps all of this as comparison.json and comparison.png')
  print(f'\n{time.monotonic() - start:.0f} s. {kept}.\nNext, token by token: '
        f'{command("analyze", f"--checkpoints={two.path}", f"--reference={one.path}")}')


def origin(one: Checkpoint, two: Checkpoint) -> dict[str, str | int]:
  """Returns the settings of the comparison, as its JSON file holds them."""
  return {'first': str(one.path), 'second': str(two.path), 'problems': PROBLEMS.value, 'seed': SEED.value,
          'digits_asked': ','.join(DIGITS.value or [])}


def print_drift(rows, left_out) -> None:
  """Prints the distance that each layer moved, and the names of arrays that cannot be compared."""
  print(f'\n{"layer":<14}{"parameters":>12}{"distance":>12}{"relative":>12}')
  for row in rows:
    relative = 'was 0' if row['relative'] is None else f'{row["relative"]:.2e}'
    print(f'{row["layer"]:<14}{row["parameters"]:>12,}{row["distance"]:>12.4f}{relative:>12}')
  if left_out:
    print(f'not compared, of another shape or in one alone: {", ".join(left_out[:6])}{", ..." if left_out[6:] else ""}')


def print_answers(found) -> None:
  """Prints accuracies, KL, and the first answers that changed."""
  print('\nAccuracy of greedy answers with 95% intervals over problems, the same for both; gained and lost: answers '
        f'that changed.\n{"digits":>6}{"problems":>10}{"first":>23}{"second":>23}   {"difference":<30}{"gained":>6}'
        f'{"lost":>7}')
  for number, row in found['answers'].items():
    mean, low, high = (100 * x for x in row['difference'])
    before, after = (f'{100 * x:.1f}% [{100 * least:.1f}, {100 * most:.1f}]'
                     for x, (least, most) in zip(row['accuracy'], row['intervals']))
    print(f'{number:>6}{row["num_problems"]:>10}{before:>23}{after:>23}   '
          f'{f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]":<30}{row["gained"]:>6}{row["lost"]:>7}')
  kl = {name: 'none' if value is None else f'{value:.5f}' for name, value in found['kl'].items()
        if name != 'by_position'}
  print(f'\nKL(second || first) on right solutions, nats a token: {kl["mean"]}; at critical tokens {kl["critical"]}, '
        f'elsewhere {kl["other"]}')
  for row in found['flipped'][:SHOWN.value]:
    last = [row[name].rstrip().split('\n')[-1] for name in ('first', 'second')]
    print(f'{row["change"]:>7}: {row["problem"]} = {last[0]!r} -> {last[1]!r}')
  if len(found['flipped']) > SHOWN.value:
    print(f'        and {len(found["flipped"]) - SHOWN.value} more')


def write(found, workdir: storage.Path) -> None:
  """Writes comparison.json and comparison.png."""
  from critkl_jax.analysis.charts import plot_comparison  # slow import, not needed to check flags

  with storage.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  plot_comparison(found, workdir / 'comparison.png')
  storage.write_json(workdir / 'comparison.json', found)


if __name__ == '__main__':
  run(main, check, 'FIRST', 'SECOND')
