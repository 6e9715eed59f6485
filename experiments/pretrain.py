"""Pre-trains a GPT-2 from scratch on additions of up to N digits and tests it on N, N+1 and N+2.

    python -m experiments.pretrain --preset=tiny --workdir=runs/pretrain

The same command goes on where it was stopped.
"""

import json
import pathlib

from absl import flags

from critkl_jax import hosts, runner
from critkl_jax.config import PretrainConfig
from critkl_jax.evaluate import accuracy_table
from critkl_jax.gpt2 import GPT2
from critkl_jax.presets import PRETRAIN_PRESETS
from critkl_jax.pretraining import pretrain
from critkl_jax.tasks.addition import LENGTH_MARGIN, prompt_length, solution_length

from .flags import define_config, define_devices, read_config, read_mesh, run
from .tables import accuracy_rows

WORKDIR = flags.DEFINE_string('workdir', 'runs/pretrain', 'Directory of checkpoints and metrics.')
define_config(PretrainConfig, PRETRAIN_PRESETS, 'tiny')
define_devices()


def main() -> None:
  """Pre-trains, then prints and saves the accuracy table."""
  config = read_config(PRETRAIN_PRESETS)
  model = GPT2(config.model)
  tested = [config.known_digits + k for k in range(3)]
  needed = prompt_length(tested[-1]) + solution_length(tested[-1]) + LENGTH_MARGIN
  if needed > config.model.context_length:
    raise SystemExit(f'error: --context_length: N+2 = {tested[-1]} digits need {needed}, got '
                     f'{config.model.context_length}.')
  mesh, workdir = read_mesh(config.batch_size), pathlib.Path(WORKDIR.value)
  state = pretrain(config, workdir, mesh)
  table = accuracy_table(
      model, state.params, config.known_digits, tested, ['identical', 'varying', 'plus'], config.eval_problems,
      mesh=mesh) if config.eval_problems else []
  if not hosts.is_first():
    return
  print(f'Parameters for --reference: {workdir / "reference"}')
  if table:
    print(accuracy_rows(table))
    runner.write_text(workdir / 'summary.json', json.dumps({'accuracy': table}, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
