"""Where the time of an iteration goes: rollout, reference pass, advantages, update, each jitted alone, and the whole.

    python -m benchmarks.train_step --json=train_step.json
"""

import functools
import json
import pathlib
import resource
import statistics
import time

import jax
from absl import flags

from critkl_jax import checkpoint, train_step
from critkl_jax.config import FINETUNE_PRESETS
from critkl_jax.gpt2 import GPT2
from critkl_jax.tasks.addition import plus_task
from experiments.flags import run

PRESET = flags.DEFINE_enum('preset', 'tiny', list(FINETUNE_PRESETS), 'Settings of the iteration.')
REFERENCE = flags.DEFINE_string('reference', str(checkpoint.SHIPPED_REFERENCE), 'Checkpoint of the model.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls, after one to warm up.', lower_bound=1)
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')


def median_seconds(call, repeats: int) -> float:
  """Returns the median time of a call, compiled and warmed up, with its results waited for."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def main() -> None:
  """Times the parts and prints their shares."""
  config, reference = FINETUNE_PRESETS[PRESET.value], checkpoint.load_checkpoint(REFERENCE.value)
  model = GPT2(config.model_of(reference.info.model))
  task = plus_task(reference.info.known_digits, config.extra_digits)
  state = train_step.init_finetuning(model, config, reference.params)
  _, key = train_step.finetuning_keys(config)
  numbers = train_step.Hyperparameters.of(config)

  collect = jax.jit(functools.partial(train_step.collect, model, task, config))
  reference_pass = jax.jit(functools.partial(train_step.reference_pass, model, config))
  make_batch = jax.jit(functools.partial(train_step.make_batch, model, config))
  update = jax.jit(functools.partial(train_step.update, model, config))
  rollout, rewards = collect(state.params, key, numbers.loss.temperature)
  ref_output = reference_pass(state.ref_params, rollout)
  batch = make_batch(state, rollout, rewards, ref_output, numbers)
  parts = {
      'rollout': lambda: collect(state.params, key, numbers.loss.temperature),
      'reference': lambda: reference_pass(state.ref_params, rollout),
      'advantages': lambda: make_batch(state, rollout, rewards, ref_output, numbers),
      'update': lambda: update(state, rollout, ref_output, batch, key, numbers),
  }
  seconds = {name: median_seconds(call, REPEATS.value) for name, call in parts.items()}
  step = train_step.make_train_step(model, task, config)
  seconds['whole'] = median_seconds(lambda: step(jax.tree.map(lambda x: x.copy(), state), key, numbers), REPEATS.value)

  total, num_tokens = sum(seconds[name] for name in parts), int(rollout.mask.sum())
  print(f'{jax.devices()[0].device_kind}, {config.episodes} episodes, {num_tokens} tokens sampled, '
        f'medians of {REPEATS.value}')
  for name, value in seconds.items():
    share = f'{100 * value / total:5.1f}%' if name in parts else ''
    print(f'{name:>12} {value:8.2f} s {share:>7} {num_tokens / value:10.0f} tokens/s')
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  print(f'peak memory of the process {peak:.0f} MiB')
  if JSON.value:
    result = {'device': jax.devices()[0].device_kind, 'preset': PRESET.value, 'tokens': num_tokens,
              'peak_memory_mib': peak, 'seconds': seconds, 'share': {name: seconds[name] / total for name in parts}}
    pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
