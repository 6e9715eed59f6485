"""Pre-trains a GPT-2, or a Llama of its size, on additions of up to N digits and tests it on N, N+1 and N+2.

    python -m experiments.pretrain --preset=tiny --workdir=runs/pretrain

The same command resumes a stopped run.
"""

import time
from collections.abc import Callable
from typing import Any

from absl import flags

from critkl_jax.analysis.evaluation import accuracies
from critkl_jax.models.architectures import make_model
from critkl_jax.runtime import hosts, storage
from critkl_jax.runtime.pretraining import check_pretraining, pretrain
from critkl_jax.tasks.addition import (
  DISTRIBUTIONS,
  LENGTH_MARGIN,
  TOKENIZER,
  Addition,
  by_digits_and_distribution,
  plus_task_of,
  prompt_length,
  solution_length,
)
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
from .tables import command, print_accuracies
from .workdirs import claim

WORKDIR = flags.DEFINE_string('workdir', 'runs/pretrain', 'Directory of checkpoints and metrics.')
define_config(PretrainConfig, PRETRAIN_PRESETS, 'tiny')
define_devices()
define_training()


def check() -> tuple[Any, ...]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  config = read_config(PRETRAIN_PRESETS)
  track, longest = read_trackers(config), config.addition.known_digits + 2
  check_devices()
  try:
    check_vocabulary(plus_task_of(settings_of(config)), config.model.vocab_size)
  except ValueError as error:
    larger = config.model.vocab_size > TOKENIZER.vocab_size
    refuse(f'--{error}{" --pad_vocabulary does that." if larger else ""}')
  needed = prompt_length(longest) + solution_length(longest) + LENGTH_MARGIN
  if needed > config.model.context_length:
    refuse(f'--context_length: N+2 = {longest} digits need {needed}, got {config.model.context_length}.')
  return config, paths.read_workdir('workdir', WORKDIR.value), track


def settings_of(config: PretrainConfig) -> Addition:
  """Returns the settings of the addition task."""
  return Addition.of_pretraining(config.addition, config.model.vocab_size)


def main(config: PretrainConfig, workdir: storage.Path, track: Callable) -> None:
  """Pre-trains the model, then prints and saves its accuracies."""
  start, mesh = time.monotonic(), read_mesh(config.batch_size)
  model, tested = make_model(config.model_config), [config.addition.known_digits + k for k in range(3)]
  check_attention(config.model)
  claim(workdir, 'pretrain')
  check_pretraining(config, workdir)
  hosts.say(f'Pre-training on additions of 1..{config.addition.known_digits} digits: {config.num_steps} steps of '
            f'{config.batch_size} texts, in {workdir}.\nThe first steps compile a program for each number of digits, '
            'up to a minute each on a CPU. In the bar: loss in nats a token; acc, share of right next tokens.')
  state = pretrain(config, workdir, mesh, track, flags.FLAGS.damaged)
  if config.eval_problems:
    lengths = list(DISTRIBUTIONS)
    hosts.say('Testing the model. Each line of the table is compiled first, which takes 5 to 20 s on a CPU.')
    sets = by_digits_and_distribution(settings_of(config), tested, lengths, config.eval_problems,
                                      config.model.context_length)
    rows = accuracies(model, state.params, sets, mesh=mesh)
    table = print_accuracies(rows, tested, lengths, config.addition.known_digits, config.eval_problems)
    storage.write_json(workdir / 'summary.json', {'accuracy': table})
  reference = workdir / 'reference'
  hosts.say(f'{time.monotonic() - start:.0f} s. In {workdir}: reference/, checkpoints/, metrics.jsonl'
            f'{", summary.json" if config.eval_problems else ""}.\nNext, fine-tune it: '
            f'{command("finetune", f"--reference={reference}", f"--workdir={workdir}-finetune")}')


if __name__ == '__main__':
  run(main, check)
