"""Pre-trains a GPT-2 from scratch on additions of up to N digits and tests it on N, N+1 and N+2.

    python -m experiments.pretrain --preset=tiny --workdir=runs/pretrain

The same command goes on where it was stopped.
"""

import time
from collections.abc import Callable
from typing import Any

from absl import flags

from critkl_jax import hosts, storage
from critkl_jax.config import PretrainConfig
from critkl_jax.evaluate import DISTRIBUTIONS, accuracies
from critkl_jax.gpt2 import GPT2
from critkl_jax.presets import PRETRAIN_PRESETS
from critkl_jax.pretraining import check_pretraining, pretrain
from critkl_jax.tasks.addition import LENGTH_MARGIN, check_vocabulary, prompt_length, solution_length

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
  track, longest = read_trackers(config), config.known_digits + 2
  check_devices()
  try:
    check_vocabulary(config.model.vocab_size)
  except ValueError as error:
    refuse(f'--{error}')
  needed = prompt_length(longest) + solution_length(longest) + LENGTH_MARGIN
  if needed > config.model.context_length:
    refuse(f'--context_length: N+2 = {longest} digits need {needed}, got {config.model.context_length}.')
  return config, paths.read_workdir('workdir', WORKDIR.value), track


def main(config: PretrainConfig, workdir: storage.Path, track: Callable) -> None:
  """Pre-trains, then prints and saves the accuracy table."""
  start, mesh = time.monotonic(), read_mesh(config.batch_size)
  model, tested = GPT2(config.model), [config.known_digits + k for k in range(3)]
  check_attention(config.model)
  claim(workdir, 'pretrain')
  check_pretraining(config, workdir)
  hosts.say(f'Pre-training on additions of 1..{config.known_digits} digits: {config.num_steps} steps of '
            f'{config.batch_size} texts, in {workdir}.\nThe first steps compile a program for each number of digits, '
            'up to a minute each on a CPU. In the bar: loss in nats a token; acc, share of right next tokens.')
  state = pretrain(config, workdir, mesh, track, flags.FLAGS.damaged)
  if config.eval_problems:
    lengths = list(DISTRIBUTIONS)
    hosts.say('Testing the model. Each line of the table is compiled first, which takes 5 to 20 s on a CPU.')
    rows = accuracies(model, state.params, config.known_digits, tested, lengths, config.eval_problems, mesh=mesh)
    table = print_accuracies(rows, tested, lengths, config.known_digits, config.eval_problems)
    storage.write_json(workdir / 'summary.json', {'accuracy': table})
  reference = workdir / 'reference'
  hosts.say(f'{time.monotonic() - start:.0f} s. In {workdir}: reference/, checkpoints/, metrics.jsonl'
            f'{", summary.json" if config.eval_problems else ""}.\nNext, fine-tune it: '
            f'{command("finetune", f"--reference={reference}", f"--workdir={workdir}-finetune")}')


if __name__ == '__main__':
  run(main, check)
