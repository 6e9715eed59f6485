"""Pre-trains a GPT-2, or a Llama of its size, on additions of up to N digits or stories of up to N facts; tests it.

    python -m experiments.pretrain --preset=tiny --workdir=runs/pretrain
    python -m experiments.pretrain --preset=stories --workdir=runs/pretrain_stories

The same command resumes a stopped run.
"""

import time
from collections.abc import Callable
from typing import Any

from absl import flags
from jax.sharding import Mesh

from critkl_jax.analysis.evaluation import accuracies
from critkl_jax.models.architectures import make_model
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.runtime import hosts, storage
from critkl_jax.runtime.pretraining import check_pretraining, pretrain
from critkl_jax.tasks.addition import (
  DISTRIBUTIONS,
  LENGTH_MARGIN,
  TOKENIZER,
  Addition,
  by_digits_and_distribution,
  prompt_length,
  solution_length,
)
from critkl_jax.tasks.known_tasks import KNOWN_TASKS
from critkl_jax.tasks.stories import Stories, by_facts
from critkl_jax.tasks.task import check_vocabulary
from critkl_jax.training.config import PretrainConfig
from critkl_jax.training.presets import PRETRAIN_PRESETS

from . import paths
from .exits import refuse
from .flags import (
  check_attention,
  check_devices,
  define_config,
  define_devices,
  define_training,
  read_config,
  read_mesh,
  read_trackers,
  run,
)
from .tables import command, print_accuracies, print_sets, sets_of
from .workdirs import claim

WORKDIR = flags.DEFINE_string('workdir', 'runs/pretrain', 'Directory of checkpoints and metrics.')
define_config(PretrainConfig, PRETRAIN_PRESETS, 'tiny')
define_devices()
define_training()


def check() -> tuple[Any, ...]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  config = read_config(PRETRAIN_PRESETS)
  track = read_trackers(config)
  check_devices()
  try:
    settings = KNOWN_TASKS[config.task].pretrained(config)
    check_vocabulary(KNOWN_TASKS[config.task].make(settings), config.model.vocab_size)
  except ValueError as error:
    larger = config.task == 'addition' and config.model.vocab_size > TOKENIZER.vocab_size
    refuse(f'--{error}{" --pad_vocabulary does that." if larger else ""}')
  numbers, unit, needed = tested(settings)
  if needed > config.model.context_length:
    refuse(f'--context_length: N+{numbers[-1] - numbers[0]} = {numbers[-1]} {unit} need {needed}, got '
           f'{config.model.context_length}.')
  return config, paths.read_workdir('workdir', WORKDIR.value), track, settings


def tested(settings: Addition | Stories) -> tuple[list[int], str, int]:
  """Returns the numbers of digits or facts of the tests, their unit, and the context that the longest test needs."""
  if isinstance(settings, Stories):
    numbers = [settings.known_facts + k for k in (0, 2, 4)]
    task, _ = by_facts(settings, numbers)
    return numbers, 'facts', task.prompt_length + task.response_length
  longest = settings.known_digits + 2
  return [longest - 2, longest - 1, longest], 'digits', (
      prompt_length(longest) + solution_length(longest) + LENGTH_MARGIN)


def main(config: PretrainConfig, workdir: storage.Path, track: Callable, settings: Addition | Stories) -> None:
  """Pre-trains the model, then prints and saves its accuracies."""
  start, mesh = time.monotonic(), read_mesh(config.batch_size)
  model, (numbers, unit, _) = make_model(config.model_config), tested(settings)
  check_attention(config.model)
  claim(workdir, 'pretrain')
  check_pretraining(config, workdir)
  what = 'additions' if config.task == 'addition' else config.task
  hosts.say(f'Pre-training on {what} of 1..{numbers[0]} {unit}: {config.num_steps} steps of {config.batch_size} texts, '
            f'in {workdir}.\nThe first steps compile a program for each number of {unit}, up to a minute each on a '
            'CPU. In the bar: loss in nats a token; acc, share of right next tokens.')
  state = pretrain(config, workdir, mesh, track, flags.FLAGS.damaged)
  if config.eval_problems:
    hosts.say('Testing the model. Each line of the table is compiled first, which takes 5 to 20 s on a CPU.')
    table = test(model, state.params, config, settings, numbers, mesh)
    storage.write_json(workdir / 'summary.json', {'accuracy': table})
  reference = workdir / 'reference'
  own_task = [] if config.task == 'addition' else [f'--task={config.task}']
  hosts.say(f'{time.monotonic() - start:.0f} s. In {workdir}: reference/, checkpoints/, metrics.jsonl'
            f'{", summary.json" if config.eval_problems else ""}.\nNext, fine-tune it: '
            f'{command("finetune", *own_task, f"--reference={reference}", f"--workdir={workdir}-finetune")}')


def test(model: LanguageModel, params: Any, config: PretrainConfig, settings: Addition | Stories, numbers: list[int],
         mesh: Mesh | None) -> list[dict[str, Any]]:
  """Tests the model, prints a line for each number of digits or facts, and returns the rows of the table."""
  if isinstance(settings, Stories):
    sets = sets_of(settings, numbers, config.eval_problems, seed=0)
    return print_sets(accuracies(model, params, sets, mesh=mesh), 'greedy answers')
  lengths = list(DISTRIBUTIONS)
  sets = by_digits_and_distribution(settings, numbers, lengths, config.eval_problems, config.model.context_length)
  rows = accuracies(model, params, sets, mesh=mesh)
  return print_accuracies(rows, numbers, lengths, settings.known_digits, config.eval_problems)


if __name__ == '__main__':
  run(main, check)
