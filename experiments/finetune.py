"""Fine-tunes a pre-trained GPT-2 by reinforcement on additions longer than it has ever seen.

    python -m experiments.finetune --kl=prioritized --workdir=runs/finetune

Without flags: the reference that comes with the package, N + 1 digits, PPO, the prioritized KL penalty. The same
command goes on where it was stopped. Writes checkpoints, metrics.jsonl, curves.png and summary.json into the workdir.
"""

import json
import pathlib
import time
from typing import Any

import jax
from absl import flags

from critkl_jax import checkpoint, evaluate, hosts, runner, sharding
from critkl_jax.analysis.curves import plot_learning_curves
from critkl_jax.config import FinetuneConfig, flat_values
from critkl_jax.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.signatures import MEANING, signatures
from critkl_jax.train_step import make_train_step

from .flags import define_config, define_devices, read_config, read_mesh, run
from .reference import keep_reference, load_ensemble, model_and_task, tested_before
from .tables import before_after_rows

WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune', 'Directory of checkpoints, metrics and pictures.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')
define_devices()


def main() -> None:
  """Tests the reference, fine-tunes it, tests the result and says what changed."""
  start = time.monotonic()
  config, workdir = read_config(FINETUNE_PRESETS), pathlib.Path(WORKDIR.value)
  mesh = read_mesh(config.episodes // config.minibatches)
  reference = keep_reference(config, workdir, mesh)
  known = reference.info.known_digits
  model, task = model_and_task(config, reference)
  state = init_finetuning(model, config, reference.params, mesh, load_ensemble(config, reference, mesh))
  test = evaluate.make_test(model, known, config.extra_digits, config.eval_problems, mesh=mesh)
  info = checkpoint.CheckpointInfo(model=model.config, known_digits=known, training=config)
  del reference  # the state has its own
  before = tested_before(test, state.ref_params, workdir)
  step = make_train_step(model, task, config, mesh)
  key, hyperparameters = sharding.replicate((finetuning_keys(config)[1], Hyperparameters.of(config)), mesh)
  state = runner.run(lambda state, _: step(state, key, hyperparameters), state, config.num_iterations, info, workdir,
                     config.save_every, show=('accuracy', 'kl', 'entropy', 'weight'))
  report(config, known, before, test(state.params)[0], workdir, time.monotonic() - start)


def report(config: FinetuneConfig, known: int, before: dict[str, Any], after: dict[str, Any], workdir: pathlib.Path,
           seconds: float) -> None:
  """Prints the table, draws the curves and writes the summary; of several hosts the first one does."""
  if not hosts.is_first():
    return
  rows = runner.read_metrics(workdir / 'metrics.jsonl')
  loss = config.loss
  name = loss.kl if loss.kl != 'prioritized' else f'prioritized, exponent {loss.certainty_exponent:g}'
  plot_learning_curves(rows, workdir / 'curves.png',
                       f'{known} + {config.extra_digits} digits, {loss.algorithm.upper()}, KL penalty: {name}',
                       reference=before.get(f'N+{config.extra_digits}'), penalty=loss.kl)
  longer = f'N+{config.extra_digits}'
  accuracy = {when: {key: result[key] for key in ('N', longer) if key in result}
              for when, result in (('before', before), ('after', after))}
  summary = {
      'accuracy': accuracy,
      'tokens': {'before': before.get('tokens'), 'after': after.get('tokens')},
      'wall_seconds': seconds,
      'training_seconds': sum(row['seconds'] for row in rows),
      'tokens_sampled': sum(row['num_tokens'] for row in rows),
      'last_iteration': rows[-1] if rows else None,
      'signatures': [name for name, seen in signatures(rows).items() if seen],
      'known_digits': known,
      'config': flat_values(config),
      'device': jax.devices()[0].device_kind,
  }
  runner.write_text(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
  if config.eval_problems:
    print(before_after_rows(accuracy, {'N': f'{known} digits', longer: f'{known + config.extra_digits} digits'}))
  for name in summary['signatures']:
    print(f'{name}: {MEANING[name]}.')
  print(f'{seconds:.0f} s. In {workdir}: summary.json, curves.png, metrics.jsonl, checkpoints/, reference/.')


if __name__ == '__main__':
  run(main)
