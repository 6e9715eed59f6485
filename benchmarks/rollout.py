"""Tokens per second of cached and speculative rollouts, against a teacher-forced pass over the same tokens.

    python -m benchmarks.rollout --json=rollout.json

64 episodes of N + 1 digits at temperature 1; only response tokens count. Larger models are the shipped reference,
widened (`benchmarks.models`). Every repeat draws new problems; results are medians over the repeats.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import flags

from benchmarks import models, timing
from critkl_jax.models.gpt2 import gpt2
from critkl_jax.rl.losses import action_log_probs
from critkl_jax.runtime import storage
from critkl_jax.sampling.generation import pick_method, respond
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.addition import plus_task
from critkl_jax.tasks.task import Task
from critkl_jax.training import slices
from critkl_jax.training.presets import PRETRAIN_PRESETS
from experiments import parsing, paths
from experiments.flags import run

PRESETS = flags.DEFINE_list('presets', ['tiny', 'paper'], 'Sizes of the model.')
EPISODES = flags.DEFINE_integer('episodes', 64, 'Episodes in a rollout.', lower_bound=1)
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rollouts at `tiny`; a fifth of them elsewhere.', lower_bound=1)
WINDOW = flags.DEFINE_integer('window', 0, 'Tokens of a speculative window; 0 for the default.', lower_bound=0)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of activations.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')

METHODS = ('cached', 'speculative')


class Setting(NamedTuple):
  """The programs to time at one size of the model.

  Attributes:
    preset: the model's size.
    episodes: B.
    task: task of N + 1 digits.
    params: the policy's parameters.
    programs: `teacher_forced` or a method -> (jitted function, its arguments: arrays or shapes).
  """

  preset: str
  episodes: int
  task: Task
  params: Any
  programs: dict[str, tuple[Callable, tuple]]


def prepare(preset: str, episodes: int, dtype: str = 'float32', window: int = 0, **changes: Any) -> Setting:
  """Makes the programs of one size; `changes` as in `models.load`."""
  config, params, known_digits = models.load(preset, dtype=dtype, **changes)
  model, task = gpt2(config), plus_task(known_digits, 1, vocab_size=config.vocab_size)
  sample = {method: jax.jit(lambda params, problems, key, m=method: respond(
      model, params, task, problems, key, method=m, window=window)) for method in METHODS}

  @jax.jit
  def teacher_force(params, rollout):
    """Returns log-probabilities and values of the responses, as fast as the reference pass of a train step."""
    def read(part):
      logits, values = score(model, params, part)
      return action_log_probs(logits, part.actions), values

    size = slices.pick_size(episodes, rollout.prompt.shape[1] + rollout.actions.shape[1])
    return slices.read(read, rollout, (task.solution_length,), size)

  drawn = params, *draw(task, episodes, 0)
  programs = {method: (sample[method], drawn) for method in METHODS}
  programs['teacher_forced'] = teacher_force, (params, jax.eval_shape(sample['cached'], *drawn))
  return Setting(preset, episodes, task, params, programs)


def draw(task: Task, episodes: int, repeat: int) -> tuple[Any, jax.Array]:
  """Draws the problems of a repeat, with a leading axis, and returns them with the key of their responses."""
  problem_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), repeat))
  return jax.jit(jax.vmap(task.sample))(jax.random.split(problem_key, episodes)), key


def measure(setting: Setting, programs: dict[str, Callable], repeats: int) -> dict[str, Any]:
  """Times the compiled programs of one size and returns the results."""
  speed, steps, accepted = {name: [] for name in ('teacher_forced', *METHODS)}, {m: [] for m in METHODS}, []
  for repeat in range(repeats + 1):  # the first one warms up
    problems, key = draw(setting.task, setting.episodes, repeat)
    for method in METHODS:
      rollout, time = timing.result_and_seconds(programs[method], setting.params, problems, key)
      num_tokens = int(rollout.mask.sum())
      speed[method].append(num_tokens / time)
      steps[method].append(int(rollout.num_calls.max()))
    accepted.append(num_tokens / int(rollout.num_calls.sum()))
    _, time = timing.result_and_seconds(programs['teacher_forced'], setting.params, rollout)
    speed['teacher_forced'].append(num_tokens / time)
    print(f'{setting.preset} {"warm-up" if repeat == 0 else repeat}: ' + ', '.join(
        f'{name} {values[-1]:.0f} tokens/s' for name, values in speed.items()) + f'; steps {steps["cached"][-1]}, '
        f'{steps["speculative"][-1]}', flush=True)
  found = {name: statistics.median(values[1:]) for name, values in speed.items()}
  default = pick_method(setting.task.draft is not None)
  found['default'], found['default_method'] = found[default], default
  found['sequential_steps'] = {method: statistics.median(values[1:]) for method, values in steps.items()}
  found['all_sequential_steps'] = {method: values[1:] for method, values in steps.items()}
  return found | {
      'tokens_per_call': statistics.median(accepted[1:]), 'episodes': setting.episodes, 'repeats': repeats}


def check() -> tuple[()]:
  """Exits with one line if the flags are invalid."""
  parsing.check_known('presets', parsing.read_names(PRESETS), list(PRETRAIN_PRESETS))
  paths.check_file('json', JSON.value)
  return ()


def main() -> None:
  """Measures each size and prints a table."""
  device = jax.devices()[0].device_kind
  results = {'device': device, 'dtype': DTYPE.value}
  for preset in PRESETS.value:
    setting = prepare(preset, EPISODES.value, DTYPE.value, WINDOW.value)
    programs, seconds = timing.compile_together(setting.programs)
    print(f'{preset}: compiled in {seconds:.1f} s', flush=True)
    results[preset] = measure(setting, programs, REPEATS.value if preset == 'tiny' else max(REPEATS.value // 5, 1))
  print(f'\n{device}, {DTYPE.value}, {EPISODES.value} episodes, medians')
  for preset in PRESETS.value:
    found = results[preset]
    for name in ('teacher_forced', *METHODS):
      steps = found['sequential_steps'].get(name, '')
      chosen = '  (default)' if name == found['default_method'] else ''
      print(f'{preset:>8} {name:>15} {found[name]:10.0f} tokens/s  {found[name] / found["teacher_forced"]:5.2f} of '
            f'teacher-forced  {steps!s:>6} steps{chosen}')
  if JSON.value:
    storage.write_json(JSON.value, results)


if __name__ == '__main__':
  run(main, check)
