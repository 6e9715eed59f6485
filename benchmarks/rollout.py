"""Tokens per second of a rollout, plain and speculative, beside a teacher-forced pass over the same tokens.

    python -m benchmarks.rollout --json=rollout.json

64 episodes of N+1 problems at temperature 1. Only tokens of responses count. Models larger than the shipped reference
write as it does (`benchmarks.models`). Every repeat draws other problems; figures are medians over the repeats.
"""

import json
import pathlib
import statistics

import jax
from absl import flags

from benchmarks import models, timing
from critkl_jax import slices
from critkl_jax.gpt2 import GPT2
from critkl_jax.losses import action_log_probs
from critkl_jax.rollout import pick_method, respond, score
from critkl_jax.tasks.addition import plus_task
from critkl_jax.train_step import shorter_lengths
from experiments.flags import run

PRESETS = flags.DEFINE_list('presets', ['tiny', 'paper'], 'Sizes of the model.')
EPISODES = flags.DEFINE_integer('episodes', 64, 'Episodes in a rollout.', lower_bound=1)
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rollouts at `tiny`; a fifth of them elsewhere.', lower_bound=1)
WINDOW = flags.DEFINE_integer('window', 0, 'Tokens of a speculative window; 0 for the default.', lower_bound=0)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of activations.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')

METHODS = ('cached', 'speculative')


def measure(preset: str, repeats: int) -> dict:
  """Returns the figures of one size."""
  config, params, known_digits = models.load(preset, dtype=DTYPE.value)
  model, task = GPT2(config), plus_task(known_digits, 1)
  sample = {method: jax.jit(lambda params, problems, key, m=method: respond(
      model, params, task, problems, key, method=m, window=WINDOW.value)) for method in METHODS}

  @jax.jit
  def teacher_force(params, rollout):
    """Returns log-probabilities and values of the responses, as fast as the reference pass of a train step."""
    def read(part):
      logits, values = score(model, params, part)
      return action_log_probs(logits, part.actions), values

    size = slices.pick_size(EPISODES.value, rollout.prompt.shape[1] + rollout.actions.shape[1])
    return slices.read(read, rollout, shorter_lengths(task), size)

  speed, steps, accepted = {name: [] for name in ('teacher_forced', *METHODS)}, {m: [] for m in METHODS}, []
  for repeat in range(repeats + 1):  # the first one warms up
    problem_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), repeat))
    problems = jax.vmap(task.sample)(jax.random.split(problem_key, EPISODES.value))
    for method in METHODS:
      rollout, time = timing.result_and_seconds(sample[method], params, problems, key)
      num_tokens = int(rollout.mask.sum())
      speed[method].append(num_tokens / time)
      steps[method].append(int(rollout.num_calls.max()))
    accepted.append(num_tokens / int(rollout.num_calls.sum()))
    _, time = timing.result_and_seconds(teacher_force, params, rollout)
    speed['teacher_forced'].append(num_tokens / time)
    print(f'{preset} {"warm-up" if repeat == 0 else repeat}: ' + ', '.join(
        f'{name} {values[-1]:.0f} tokens/s' for name, values in speed.items()) + f'; steps {steps["cached"][-1]}, '
        f'{steps["speculative"][-1]}', flush=True)
  found = {name: statistics.median(values[1:]) for name, values in speed.items()}
  default = pick_method(task.draft is not None)
  found['default'], found['default_method'] = found[default], default
  found['sequential_steps'] = {method: statistics.median(values[1:]) for method, values in steps.items()}
  found['all_sequential_steps'] = {method: values[1:] for method, values in steps.items()}
  return found | {'tokens_per_call': statistics.median(accepted[1:]), 'episodes': EPISODES.value, 'repeats': repeats}


def main() -> None:
  """Measures each size and prints a table."""
  device = jax.devices()[0].device_kind
  results = {'device': device, 'dtype': DTYPE.value}
  for preset in PRESETS.value:
    results[preset] = measure(preset, REPEATS.value if preset == 'tiny' else max(REPEATS.value // 5, 1))
  print(f'\n{device}, {DTYPE.value}, {EPISODES.value} episodes, medians')
  for preset in PRESETS.value:
    found = results[preset]
    for name in ('teacher_forced', *METHODS):
      steps = found['sequential_steps'].get(name, '')
      chosen = '  (default)' if name == found['default_method'] else ''
      print(f'{preset:>8} {name:>15} {found[name]:10.0f} tokens/s  {found[name] / found["teacher_forced"]:5.2f} of '
            f'teacher-forced  {steps!s:>6} steps{chosen}')
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
