"""Fine-tunes a pre-trained GPT-2 by reinforcement on additions longer than it has ever seen.

    python -m experiments.finetune --kl=prioritized --workdir=runs/finetune

Without flags: the reference that comes with the package, N + 1 digits, PPO, the prioritized KL penalty. The same
command goes on where it was stopped. Writes checkpoints, metrics.jsonl, curves.png and summary.json into the workdir.
"""

import json
import pathlib
import shutil
import time
from typing import Any

import jax
from absl import flags

from critkl_jax import checkpoint, evaluate, runner
from critkl_jax.analysis.curves import plot_learning_curves
from critkl_jax.config import FINETUNE_PRESETS, FinetuneConfig, GPT2Config, flat_values
from critkl_jax.gpt2 import GPT2
from critkl_jax.records import TrainState
from critkl_jax.tasks.addition import plus_task
from critkl_jax.train_step import Hyperparameters, finetuning_keys, init_finetuning, make_train_step
from experiments.flags import define_config, read_config, run
from experiments.tables import before_after_rows

WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune', 'Directory of checkpoints, metrics and pictures.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')


def main() -> None:
  """Tests the reference, fine-tunes it, tests the result and says what changed."""
  start = time.monotonic()
  config, workdir = read_config(FINETUNE_PRESETS), pathlib.Path(WORKDIR.value)
  reference = keep_reference(config, workdir)
  known = reference.info.known_digits
  model = GPT2(model_config(config, reference))
  task = plus_task(known, config.extra_digits)
  needed = task.prompt_length + task.response_length
  if needed > model.config.context_length:
    raise SystemExit(f'error: --extra_digits: {known} + {config.extra_digits} digits need a context of {needed}, and '
                     f'the reference has {model.config.context_length}; take fewer.')

  state = init_finetuning(model, config, reference.params)
  test = make_test(model, config, known)
  info = checkpoint.CheckpointInfo(model=model.config, known_digits=known, training=config)
  before = tested_before(test, state, workdir)
  _, key = finetuning_keys(config)
  step, hyperparameters = make_train_step(model, task, config), Hyperparameters.of(config)
  state = runner.run(lambda state, _: step(state, key, hyperparameters), state, config.num_iterations, info, workdir,
                     config.save_every, show=('accuracy', 'kl', 'entropy', 'weight'))
  report(config, known, before, test(state.params), workdir, time.monotonic() - start)


def keep_reference(config: FinetuneConfig, workdir: pathlib.Path) -> checkpoint.Checkpoint:
  """Reads the reference, and keeps a copy under the workdir, from which the run goes on and is analysed later."""
  kept = workdir / 'reference'
  if checkpoint.latest(workdir / 'checkpoints'):
    return checkpoint.load_checkpoint(kept)
  shutil.rmtree(kept, ignore_errors=True)  # of a run that was stopped before it saved anything
  before_file(workdir).unlink(missing_ok=True)
  reference = checkpoint.load_checkpoint(config.reference or checkpoint.SHIPPED_REFERENCE)
  manager = checkpoint.open_manager(kept)
  state = TrainState(params=reference.params, opt_state=None, step=reference.step)
  checkpoint.save(manager, state, reference.info, with_optimizer=False)
  manager.close()
  return reference


def model_config(config: FinetuneConfig, reference: checkpoint.Checkpoint) -> GPT2Config:
  """Returns the policy's config, or exits with one line if the reference does not allow it."""
  try:
    return config.model_of(reference.info.model)
  except ValueError as error:
    raise SystemExit(f'error: --{error}') from error


def make_test(model: GPT2, config: FinetuneConfig, known: int):
  """Makes `params -> {'N': accuracy, 'N+k': accuracy, critical-token statistics}`, always on the same problems."""
  task = plus_task(known, config.extra_digits)
  answer, read = evaluate.make_answer(model, task), evaluate.make_reader(model, task)
  longest = known + config.extra_digits
  problem_key, answer_key = jax.random.split(jax.random.key(1_000_003))
  digits = {'N': known, f'N+{config.extra_digits}': longest}
  problems = {name: evaluate.draw_problems(jax.random.fold_in(problem_key, n), config.eval_problems, 'plus', n, known,
                                           longest) for name, n in digits.items() if config.eval_problems}

  def test(params: Any) -> dict[str, Any]:
    result = {name: float(evaluate.answer_all(answer, params, drawn, answer_key).mean())
              for name, drawn in problems.items()}
    if problems:
      result['tokens'] = evaluate.solution_statistics(read, params, problems[f'N+{config.extra_digits}'])
    return result

  return test


def tested_before(test, state: TrainState, workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the reference's test; a continued run reads it from the workdir instead of testing again."""
  file = before_file(workdir)
  if not file.is_file():
    runner.write_text(file, json.dumps(test(state.ref_params)) + '\n')
  return json.loads(file.read_text())


def before_file(workdir: pathlib.Path) -> pathlib.Path:
  """Returns where the reference's test is kept."""
  return workdir / 'before.json'


def report(config: FinetuneConfig, known: int, before: dict[str, Any], after: dict[str, Any], workdir: pathlib.Path,
           seconds: float) -> None:
  """Prints the table, draws the curves and writes the summary."""
  rows = runner.read_metrics(workdir / 'metrics.jsonl')
  loss = config.loss
  name = loss.kl if loss.kl != 'prioritized' else f'prioritized, exponent {loss.certainty_exponent:g}'
  plot_learning_curves(rows, workdir / 'curves.png',
                       f'{known} + {config.extra_digits} digits, {loss.algorithm.upper()}, KL penalty: {name}')
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
      'known_digits': known,
      'config': flat_values(config),
      'device': jax.devices()[0].device_kind,
  }
  runner.write_text(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
  if config.eval_problems:
    print(before_after_rows(accuracy, {'N': f'{known} digits', longer: f'{known + config.extra_digits} digits'}))
  print(f'{seconds:.0f} s. In {workdir}: summary.json, curves.png, metrics.jsonl, checkpoints/, reference/.')


if __name__ == '__main__':
  run(main)
