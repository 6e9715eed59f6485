"""Fine-tunes a pre-trained model by reinforcement learning: on more digits than it was pre-trained on, or on questions.

    python -m experiments.finetune --kl=prioritized --workdir=runs/finetune
    python -m experiments.finetune --model=Qwen3-0.6B --task=questions --prompts=train.jsonl --workdir=runs/questions

Without flags: the reference that comes with the package (N = 5), N + 1 digits, PPO, the prioritized KL penalty. The
same command resumes a stopped run. Writes checkpoints, metrics.jsonl, curves.png and summary.json into the workdir.
"""

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from critkl_jax import sharding
from critkl_jax.analysis import evaluation
from critkl_jax.config import flat_values
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.runtime import checkpoint, hosts, loop, resuming, storage
from critkl_jax.runtime.compilation import compilation_seconds
from critkl_jax.runtime.failure_signatures import MEANING, signatures
from critkl_jax.tasks.known_tasks import known_task_of, to_json_object
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.task import Task
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.host_step import make_host_step
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.presets import FINETUNE_PRESETS
from critkl_jax.training.train_step import make_train_step

from . import paths
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
from .reference import (
  check_ensemble,
  keep_reference,
  load_ensemble,
  load_reference,
  locate_reference,
  model_and_task,
  task_settings,
  tested_before,
)
from .tables import before_after_rows, command
from .workdirs import claim, held, refuse_fewer_steps

WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune', 'Directory of checkpoints, metrics and pictures.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')
define_devices()
define_training()


def check() -> tuple[Any, ...]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  config = read_config(FINETUNE_PRESETS)
  track = read_trackers(config)
  check_devices()
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  refuse_fewer_steps(workdir / 'checkpoints', config.num_iterations, 'num_iterations')
  reference = locate_reference(config, workdir)
  model, task = model_and_task(config, reference)
  check_ensemble(config, reference)
  return config, workdir, track, model, task


def main(config: FinetuneConfig, workdir: storage.Path, track: Callable, model: LanguageModel, task: Task) -> None:
  """Tests the reference, fine-tunes it, tests the result, and prints both accuracies."""
  start = time.monotonic()
  mesh = read_mesh(config.episodes // config.minibatches)
  check_attention(model.config)
  claim(workdir, 'finetune')
  pool = held.enter_context(RewardPool(config.reward_workers, config.reward_seconds)) if task.host else None
  reference = load_reference(config, workdir, mesh)
  settings = task_settings(config, reference)
  known = known_task_of(settings)
  info = checkpoint.CheckpointInfo(model=model.config, task=settings, training=config, architecture=model.name)
  finished = resuming.check_workdir(workdir, info)
  state = init_finetuning(model, config, reference.params, mesh, load_ensemble(config, mesh))
  draw = functools.partial(known.before_and_after, settings=settings, number=config.eval_problems)
  test = evaluation.make_test(model, task, draw, mesh=mesh, pool=pool)
  keep_reference(workdir, reference)
  del reference  # the state has its own
  key, hyperparameters = sharding.replicate((finetuning_keys(config)[1], Hyperparameters.of(config)), mesh)
  step = make_host_step(model, task, config, mesh, pool) if task.host else make_train_step(model, task, config, mesh)
  hosts.say(describe_run(config, known.about(settings)))
  doing = describe_preparation(config, finished, compiles=task.host is None)
  with (hosts.waiting(doing) if doing else contextlib.nullcontext(),
        concurrent.futures.ThreadPoolExecutor(1) as other):  # the compiler leaves a core to the test
    ready = task.host is not None or finished >= config.num_iterations
    compiled = other.submit(compile_if_needed, ready, step, state, key, hyperparameters)
    before = tested_before(test, state.ref_params, config, settings, workdir)
    step = compiled.result()
  if finished < config.num_iterations:
    hosts.say('Training. In the bar: acc, share of right answers among those just sampled; kl, distance of the policy '
              'from the\nreference in nats a token; tok/s, tokens trained on in a second.')
  own = {'samples': lambda: step.samples} if task.host else {}

  def advance(state, number):
    return step(state, key, hyperparameters, number) if task.host else step(state, key, hyperparameters)

  state = loop.run(advance, state, config.num_iterations, info, workdir, config.save_every, show=('accuracy', 'kl'),
                   track=track, damaged=flags.FLAGS.damaged, **own)
  if config.eval_problems:
    hosts.say('Testing the fine-tuned model on the same problems ...')
  report(config, settings, before, test(state.params)[0], workdir, time.monotonic() - start)


def compile_if_needed(done: bool, step: Callable, *arguments: Any) -> Callable:
  """Compiles the step for its arguments; returns it as it is if `done`, or if jit must check for NaN."""
  return step if done or jax.config.jax_debug_nans else step.lower(*arguments).compile()


def describe_run(config: FinetuneConfig, about: str) -> str:
  """Describes the run in two lines, of which the first is about the task."""
  loss = config.loss
  penalty = {'prioritized': f'prioritized KL penalty (weight certainty^{loss.certainty_exponent:g})',
             'standard': 'standard KL penalty', 'none': 'no KL penalty'}[loss.kl]
  return (
      f'{about}\n'
      f'{config.num_iterations} iterations of {config.episodes} sampled answers, {loss.algorithm.upper()}, {penalty}.')


def describe_preparation(config: FinetuneConfig, finished: int, compiles: bool = True) -> str:
  """Describes the work before the first iteration and its usual duration; empty if there is none.

  Args:
    config: the run's config.
    finished: number of finished iterations.
    compiles: whether the step is compiled then, and not in the first iteration.
  """
  parts = [f'testing the reference on up to 2 x {config.eval_problems} problems'] if config.eval_problems else []
  parts += ['compiling the training step'] if compiles and finished < config.num_iterations else []
  text = ' and '.join(parts)
  return text and f'{text[0].upper()}{text[1:]}\n(20 to 90 s on a CPU; less once the programs are in the cache) ...'


def report(config: FinetuneConfig, settings: Any, before: dict[str, Any], after: dict[str, Any], workdir: storage.Path,
           seconds: float) -> None:
  """Prints the table, draws the curves and writes the summary, on the first host only."""
  if not hosts.is_first():
    return
  from critkl_jax.analysis.curves import plot_learning_curves  # slow import, not needed at the start

  rows, known = loop.read_metrics(workdir / 'metrics.jsonl'), known_task_of(settings)
  loss, sets = config.loss, known.named_sets(settings)
  name = loss.kl if loss.kl != 'prioritized' else f'prioritized, exponent {loss.certainty_exponent:g}'
  plot_learning_curves(rows, workdir / 'curves.png',
                       f'{known.title(settings)}, {loss.algorithm.upper()}, KL penalty: {name}',
                       reference=before.get(list(sets)[-1]), penalty=loss.kl)
  accuracy = {when: {key: result[key] for key in sets if key in result}
              for when, result in (('before', before), ('after', after))}
  summary = {
      'accuracy': accuracy,
      'tokens': {'before': before.get('tokens'), 'after': after.get('tokens')},
      # A resumed run is several commands: iterations are those of all commands, without compilation.
      'seconds': {'this_command': seconds, 'compilation_in_this_command': compilation_seconds(),
                  'all_iterations': sum(row['seconds'] for row in rows)},
      'tokens_sampled': sum(row['num_tokens'] for row in rows),
      'last_iteration': rows[-1] if rows else None,
      'signatures': [name for name, seen in signatures(rows).items() if seen],
      'task': to_json_object(settings),
      'config': flat_values(config),
      'device': jax.devices()[0].device_kind,
  }
  storage.write_json(workdir / 'summary.json', summary)
  if config.eval_problems:
    print(before_after_rows(accuracy, sets, config.eval_problems))
  for name in summary['signatures']:
    print(f'{name}: {MEANING[name]}.')
  print(f'{seconds:.0f} s. Learning curves: {workdir / "curves.png"}; numbers: {workdir / "summary.json"}.\n'
        f'Next, look inside: {command("analyze", f"--checkpoints={workdir}")}')


if __name__ == '__main__':
  run(main, check)
