"""Where the time of an iteration goes, and how it compares with the machine's matrix products.

    python -m benchmarks.train_step --json=train_step.json
    python -m benchmarks.train_step --growth --json=growth.json --picture=growth.png

Each part is jitted alone: rollout, reward, reference pass, advantages, update, and a step of pre-training. Fractions
are of the rate of a large matrix product in the same run. FLOP are those that the mathematics needs, for real tokens:
nothing for padding, for scores above the diagonal, for rejected drafts; an update is three forward passes. `--growth`
times the passes over right solutions, over operand length, episodes and model size. Models larger than the shipped
reference write as it does (`benchmarks.models`).
"""

import functools
import json
import math
import pathlib
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import models, timing
from critkl_jax import train_step
from critkl_jax.config import PRETRAIN_PRESETS, FinetuneConfig
from critkl_jax.gpt2 import GPT2
from critkl_jax.pretrain_step import init_pretraining, make_pretrain_step, pretraining_keys
from critkl_jax.records import Rollout
from critkl_jax.tasks.addition import plus_task, pretraining_task
from experiments.flags import run

PRESETS = flags.DEFINE_list('presets', ['tiny', 'small', 'paper'], 'Sizes of the model.')
EPISODES = flags.DEFINE_list('episodes', ['96', '96', '8'], 'Episodes in an iteration, for each of the sizes.')
GROWTH = flags.DEFINE_bool('growth', False, 'Time the passes over length, episodes and size instead.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls, after one to warm up; one where an iteration takes minutes.',
                               lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of activations.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')
PICTURE = flags.DEFINE_string('picture', 'growth.png', 'File that takes the picture of --growth.')

PARTS = ('rollout', 'reward', 'reference', 'advantages', 'update')


class Iteration:
  """The parts of one iteration, each jitted alone, with their arguments at hand."""

  def __init__(self, preset: str, episodes: int, digits: int | None = None, solutions: bool = False):
    model_config, params, known_digits = models.load(preset, dtype=DTYPE.value)
    config = FinetuneConfig(episodes=episodes, minibatches=math.gcd(episodes, 3))
    digits = digits or known_digits + 1
    self.task = task = plus_task(min(known_digits, digits), max(digits - known_digits, 0))
    self.model, self.config, self.model_config = GPT2(config.model_of(model_config)), config, model_config
    self.state = train_step.init_finetuning(self.model, config, params)
    _, self.key = train_step.finetuning_keys(config)
    self.numbers = train_step.Hyperparameters.of(config)
    bind = functools.partial
    lengths = train_step.shorter_lengths(task)
    self.collect = jax.jit(bind(train_step.collect, self.model, task, config))
    self.reference_pass = jax.jit(bind(train_step.reference_pass, self.model, config, lengths=lengths))
    self.make_batch = jax.jit(bind(train_step.make_batch, self.model, config))
    self.update = jax.jit(bind(train_step.update, self.model, config, lengths=lengths))
    self.problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(1), episodes))
    self.reward = jax.jit(jax.vmap(task.reward))
    self.rollout = self._solutions() if solutions else self.collect(self.state.params, self.key, 1.0)[0]
    self.rewards = self.reward(self.problems, self.rollout.actions, self.rollout.mask)
    self.ref_output = self.reference_pass(self.state.ref_params, self.rollout)
    self.batch = self.make_batch(self.state, self.rollout, self.rewards, self.ref_output, self.numbers)

  def _solutions(self) -> Rollout:
    prompt, solution = (jax.vmap(f)(self.problems) for f in (self.task.prompt, self.task.solution))
    blank = jnp.zeros(solution.mask.shape)
    return Rollout(prompt=prompt.tokens, prompt_mask=prompt.mask, actions=solution.tokens, mask=solution.mask,
                   log_probs=blank, values=blank)

  def calls(self) -> dict[str, Any]:
    """Returns a call of each part."""
    return {
        'rollout': lambda: self.collect(self.state.params, self.key, 1.0),
        'reward': lambda: self.reward(self.problems, self.rollout.actions, self.rollout.mask),
        'reference': lambda: self.reference_pass(self.state.ref_params, self.rollout),
        'advantages': lambda: self.make_batch(self.state, self.rollout, self.rewards, self.ref_output, self.numbers),
        'update': lambda: self.update(self.state, self.rollout, self.ref_output, self.batch, self.key, self.numbers)}

  def flops(self) -> dict[str, float]:
    """Returns the FLOP that each part needs, where it is made of products."""
    lengths = np.asarray(self.rollout.mask.sum(1) + self.rollout.prompt_mask.sum(1) - 1)
    forward = timing.forward_flops(self.model_config, lengths)
    return {'rollout': forward, 'reference': forward, 'update': 3 * forward}


def measure(preset: str, episodes: int, repeats: int, rate: float) -> dict[str, Any]:
  """Times the parts, the whole step and a step of pre-training."""
  iteration = Iteration(preset, episodes)
  seconds = {name: timing.median_seconds(call, repeats) for name, call in iteration.calls().items()}
  step = train_step.make_train_step(iteration.model, iteration.task, iteration.config)
  seconds['whole'] = timing.median_seconds(
      lambda: step(jax.tree.map(jnp.copy, iteration.state), iteration.key, iteration.numbers), repeats)
  flops = iteration.flops() | pretraining(preset, seconds, repeats)
  flops['whole'] = sum(flops[name] for name in ('rollout', 'reference', 'update'))
  total = sum(seconds[name] for name in PARTS)
  return {'episodes': episodes, 'tokens': int(iteration.rollout.mask.sum()), 'repeats': repeats, 'seconds': seconds,
          'share': {name: seconds[name] / total for name in PARTS},
          'flops_per_second': {name: value / seconds[name] for name, value in flops.items()},
          'fraction': {name: value / seconds[name] / rate for name, value in flops.items()},
          'peak_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def pretraining(preset: str, seconds: dict[str, float], repeats: int) -> dict[str, float]:
  """Times a step of pre-training at the greatest length of 5 digits, and returns its FLOP."""
  model_config, params, known_digits = models.load(preset, dtype=DTYPE.value)
  config = PRETRAIN_PRESETS[preset]
  task = pretraining_task(known_digits, known_digits)
  step = jax.jit(make_pretrain_step(GPT2(model_config), task, config))
  state, (_, key) = init_pretraining(GPT2(model_config), config).replace(params=params), pretraining_keys(config)
  seconds['pretrain'] = timing.median_seconds(lambda: step(state, key), repeats)
  problems = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), config.batch_size))
  lengths = jax.vmap(task.prompt)(problems).mask.sum(1) + jax.vmap(task.solution)(problems).mask.sum(1) - 1
  return {'pretrain': 3 * timing.forward_flops(model_config, np.asarray(lengths))}


def growth(repeats: int) -> dict[str, list[dict[str, float]]]:
  """Times reference pass and update over operand length, episodes and model size."""
  cases = {'digits': [('tiny', 24, n) for n in (3, 5, 7, 9, 11, 13)],
           'episodes': [('tiny', n, 6) for n in (6, 12, 24, 48, 96)],
           'size': [(preset, 6, 6) for preset in ('tiny', 'small', 'paper')]}
  rows = {}
  for name, settings in cases.items():
    rows[name] = []
    for preset, episodes, digits in settings:
      iteration = Iteration(preset, episodes, digits, solutions=True)
      calls, flops = iteration.calls(), iteration.flops()
      row = {'preset': preset, 'episodes': episodes, 'digits': digits, 'tokens': int(iteration.rollout.mask.sum())}
      for part in ('reference', 'update'):
        row |= {part: timing.median_seconds(calls[part], repeats), f'{part}_flops': flops[part]}
      rows[name].append(row)
      print(f'{name}: {row}', flush=True)
  return rows


def exponent(rows: list[dict[str, float]], value: str) -> float:
  """Returns the slope of log(value) over log(FLOP of a pass): 1 is what the arithmetic says."""
  return float(np.polyfit(np.log([row['reference_flops'] for row in rows]), np.log([row[value] for row in rows]), 1)[0])


def draw(rows: dict[str, list[dict[str, float]]], path: str) -> None:
  """Draws seconds over FLOP for each of the three ways of growing."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout='constrained')
  labels = {'digits': '3 to 13 digits', 'episodes': '6 to 96 episodes', 'size': '0.9 to 86 M parameters'}
  for axis, (name, some) in zip(axes, rows.items()):
    for part in ('reference', 'update'):
      x, y = [row[f'{part}_flops'] for row in some], [row[part] for row in some]
      axis.loglog(x, y, 'o-', label=f'{part}, exponent {exponent(some, part):.2f}')
    axis.set(title=labels[name], xlabel='FLOP needed', ylabel='seconds')
    axis.grid(alpha=0.3, which='both')
    axis.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  """Prints the tables."""
  device, rate = jax.devices()[0].device_kind, timing.matmul_rate(DTYPE.value)
  result = {'device': device, 'dtype': DTYPE.value, 'matmul_flops_per_second': rate}
  print(f'{device}, {DTYPE.value}: matrix products at {rate / 1e9:.0f} GFLOP/s', flush=True)
  if GROWTH.value:
    result['growth'] = growth(REPEATS.value)
    for name, rows in result['growth'].items():
      result[f'exponent_{name}'] = found = {part: exponent(rows, part) for part in ('reference', 'update')}
      print(f'over {name}: time grows with the arithmetic to the power of '
            f'{found["reference"]:.2f} (reference pass), {found["update"]:.2f} (update)')
    draw(result['growth'], PICTURE.value)
  else:
    for preset, episodes in zip(PRESETS.value, EPISODES.value):
      result[preset] = found = measure(preset, int(episodes), 1 if preset == 'paper' else REPEATS.value, rate)
      print(f'\n{preset}: {episodes} episodes, {found["tokens"]} tokens, medians of {found["repeats"]}, peak memory of '
            f'the process {found["peak_memory_mib"]:.0f} MiB')
      for name, value in found['seconds'].items():
        share = f'{100 * found["share"][name]:.1f}%' if name in found['share'] else ''
        fraction = f'{found["fraction"][name]:.2f} of matrix products' if name in found['fraction'] else ''
        print(f'{name:>12} {value:9.3f} s {share:>7}  {fraction}', flush=True)
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  run(main)
