"""Times the parts of an iteration and compares their FLOP/s with the machine's matrix products.

    python -m benchmarks.train_step --json=train_step.json
    python -m benchmarks.train_step --growth --json=growth.json --picture=growth.png

Each part is jitted alone: rollout, reward, reference pass, advantages, update, and a step of pre-training. Fractions
are relative to the FLOP/s of a large matrix product in the same run. FLOP are counted for real tokens only, without
padding, attention scores above the diagonal and rejected drafts; an update counts as three forward passes. `--growth`
times the passes over right solutions against operand length, episodes and model size. Larger models are the shipped
reference, widened (`benchmarks.models`).
"""

import functools
import math
import resource
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import models, timing
from critkl_jax.models.gpt2 import GPT2Config, forward_flops, gpt2
from critkl_jax.records import Experience, TrainState
from critkl_jax.runtime import storage
from critkl_jax.sampling.scoring import as_rollout
from critkl_jax.tasks.addition import plus_task, pretraining_task
from critkl_jax.training import initial_state, train_step
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.presets import PRETRAIN_PRESETS
from critkl_jax.training.pretrain_step import make_pretrain_step, pretraining_keys, pretraining_optimizer
from experiments import parsing, paths
from experiments.flags import run

PRESETS = flags.DEFINE_list('presets', ['tiny', 'small', 'paper'], 'Sizes of the model.')
EPISODES = flags.DEFINE_list('episodes', ['96', '96', '8'], 'Episodes in an iteration, for each of the sizes.')
GROWTH = flags.DEFINE_bool('growth', False, 'Time the passes against length, episodes and size instead.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls, after one to warm up; one where an iteration takes minutes.',
                               lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of activations.')
JSON = flags.DEFINE_string('json', None, 'File for the results.')
PICTURE = flags.DEFINE_string('picture', 'growth.png', 'File for the picture of --growth.')

_LONG = 2048  # a context that holds the solutions of 13 digits
PARTS = ('rollout', 'reward', 'reference', 'advantages', 'update')


class Parts(NamedTuple):
  """The parts of one iteration as separate programs.

  Attributes:
    calls: name -> call of a part, compiled alone; may include the `whole` iteration and a step of pre-training
      (`pretrain`).
    flops: name -> FLOP of a call, for parts dominated by matrix products.
    num_tokens: tokens of the responses.
    compile_seconds: seconds to compile all programs in parallel.
  """

  calls: dict[str, Callable[[], Any]]
  flops: dict[str, float]
  num_tokens: int
  compile_seconds: float


def take_apart(preset: str, episodes: int, digits: int | None = None, names: Sequence[str] = PARTS,
               solutions: bool = False, dtype: str = 'float32', **changes: Any) -> Parts:
  """Compiles the parts of an iteration, on a rollout or on right solutions.

  Args:
    preset: the model's size.
    episodes: B.
    digits: digits of the longer operand; N + 1 if None.
    names: the calls to make, from `PARTS`, `whole` and `pretrain`.
    solutions: whether right solutions replace the rollout.
    dtype: type of activations.
    **changes: as in `models.load`.
  """
  model_config, params, known_digits = models.load(preset, dtype=dtype, **changes)
  config = FinetuneConfig(episodes=episodes, minibatches=math.gcd(episodes, 3), scan_layers=model_config.scan_layers)
  digits = digits or known_digits + 1
  model = gpt2(config.model_of(model_config))
  task = plus_task(min(known_digits, digits), max(digits - known_digits, 0), vocab_size=model.vocab_size)
  state, numbers = initial_state.init_finetuning(model, config, params), initial_state.Hyperparameters.of(config)
  _, key = initial_state.finetuning_keys(config)
  setup = train_step.Setup.of(model, task, config)
  collect, reference_pass, make_batch, update = (
      jax.jit(functools.partial(part, setup))
      for part in (train_step.collect, train_step.reference_pass, train_step.make_batch, train_step.update))
  reward = jax.jit(jax.vmap(task.reward))
  problems = jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(1), episodes))

  # All programs are compiled in parallel from shapes; then each is called with the results of those before it.
  solved = jax.jit(lambda: as_rollout(jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)))
  rollout = solved() if solutions else jax.eval_shape(collect, state.params, key, 1.0)[1]
  rewards = jax.eval_shape(reward, problems, rollout.actions, rollout.mask)
  ref_output = jax.eval_shape(reference_pass, state.ref_params, rollout)
  batch = jax.eval_shape(make_batch, state, rollout, rewards, ref_output, numbers)
  programs = {
      'rollout': (collect, (state.params, key, 1.0)), 'reward': (reward, (problems, rollout.actions, rollout.mask)),
      'reference': (reference_pass, (state.ref_params, rollout)),
      'advantages': (make_batch, (state, rollout, rewards, ref_output, numbers)),
      'update': (update, (state, Experience(rollout, ref_output, batch), key, numbers)),
      'whole': (train_step.make_train_step(model, task, config), (state, key, numbers))}
  if 'pretrain' in names:
    *programs['pretrain'], pretrain_flops = pretraining(preset, model_config, params, known_digits)
  needed = {*names, 'reward', 'reference', 'advantages', *(() if solutions else ('rollout',))}
  made, compile_seconds = timing.compile_together({name: programs[name] for name in programs if name in needed})

  rollout = rollout if solutions else made['rollout'](state.params, key, 1.0)[1]
  rewards = made['reward'](problems, rollout.actions, rollout.mask)
  ref_output = made['reference'](state.ref_params, rollout)
  batch = made['advantages'](state, rollout, rewards, ref_output, numbers)
  calls = {'rollout': lambda: made['rollout'](state.params, key, 1.0),
           'reward': lambda: made['reward'](problems, rollout.actions, rollout.mask),
           'reference': lambda: made['reference'](state.ref_params, rollout),
           'advantages': lambda: made['advantages'](state, rollout, rewards, ref_output, numbers),
           'update': lambda: made['update'](state, Experience(rollout, ref_output, batch), key, numbers),
           'whole': lambda: made['whole'](jax.tree.map(jnp.copy, state), key, numbers),
           'pretrain': lambda: made['pretrain'](*programs['pretrain'][1])}
  forward = forward_flops(model_config, np.asarray(rollout.mask.sum(1) + rollout.prompt_mask.sum(1) - 1))
  flops = {'rollout': forward, 'reference': forward, 'update': 3 * forward, 'whole': 5 * forward}
  if 'pretrain' in names:
    flops['pretrain'] = pretrain_flops
  return Parts(calls={name: calls[name] for name in names}, num_tokens=int(rollout.mask.sum()),
               flops={name: flops[name] for name in names if name in flops}, compile_seconds=compile_seconds)


def pretraining(preset: str, model_config: GPT2Config, params: Any, known_digits: int
                ) -> tuple[Callable, tuple[TrainState, jax.Array], float]:
  """Returns a jitted step of pre-training at the greatest length, its arguments and its FLOP."""
  config = PRETRAIN_PRESETS[preset]
  task = pretraining_task(known_digits, known_digits, model_config.vocab_size)
  step = jax.jit(make_pretrain_step(gpt2(model_config), task, config))
  opt_state = jax.jit(pretraining_optimizer(gpt2(model_config), config).init)(params)
  state = TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))
  problems = jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(0), config.batch_size))
  lengths = jax.jit(lambda: jax.vmap(task.prompt)(problems).mask.sum(1) + jax.vmap(task.solution)(problems).mask.sum(1))
  return step, (state, pretraining_keys(config)[1]), 3 * forward_flops(model_config, np.asarray(lengths()) - 1)


def measure(parts: Parts, repeats: int, rate: float) -> dict[str, Any]:
  """Times each call and compares its FLOP/s with `rate`, that of matrix products."""
  seconds = {name: timing.median_seconds(call, repeats) for name, call in parts.calls.items()}
  total = sum(seconds[name] for name in PARTS)
  return {'tokens': parts.num_tokens, 'repeats': repeats, 'compile_seconds': parts.compile_seconds, 'seconds': seconds,
          'share': {name: seconds[name] / total for name in PARTS},
          'flops_per_second': {name: value / seconds[name] for name, value in parts.flops.items()},
          'fraction': {name: value / seconds[name] / rate for name, value in parts.flops.items()},
          'peak_memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def growth(repeats: int) -> dict[str, list[dict[str, float]]]:
  """Times reference pass and update against operand length, episodes and model size."""
  cases = {'digits': [('tiny', 24, n) for n in (3, 5, 7, 9, 11, 13)],
           'episodes': [('tiny', n, 6) for n in (6, 12, 24, 48, 96)],
           'size': [(preset, 6, 6) for preset in ('tiny', 'small', 'paper')]}
  rows = {}
  for name, settings in cases.items():
    rows[name] = []
    for preset, episodes, digits in settings:
      parts = take_apart(preset, episodes, digits, ('reference', 'update'), solutions=True, dtype=DTYPE.value,
                         context_length=_LONG)
      row = {'preset': preset, 'episodes': episodes, 'digits': digits, 'tokens': parts.num_tokens}
      for part in ('reference', 'update'):
        row |= {part: timing.median_seconds(parts.calls[part], repeats), f'{part}_flops': parts.flops[part]}
      rows[name].append(row)
      print(f'{name}: {row}', flush=True)
  return rows


def exponent(rows: list[dict[str, float]], value: str) -> float:
  """Returns the slope of log(value) over log(FLOP of a pass): 1 if time is proportional to FLOP."""
  return float(np.polyfit(np.log([row['reference_flops'] for row in rows]), np.log([row[value] for row in rows]), 1)[0])


def draw(rows: dict[str, list[dict[str, float]]], path: str) -> None:
  """Draws seconds against FLOP, a panel each for digits, episodes and model size."""
  figure = Figure(figsize=(12, 3.8), layout='constrained')
  axes = figure.subplots(1, 3)
  labels = {'digits': '3 to 13 digits', 'episodes': '6 to 96 episodes', 'size': '0.9 to 86 M parameters'}
  for axis, (name, some) in zip(axes, rows.items()):
    for part in ('reference', 'update'):
      x, y = [row[f'{part}_flops'] for row in some], [row[part] for row in some]
      axis.loglog(x, y, 'o-', label=f'{part}, exponent {exponent(some, part):.2f}')
    axis.set(title=labels[name], xlabel='FLOP needed', ylabel='seconds')
    axis.grid(alpha=0.3, which='both')
    axis.legend()
  figure.savefig(path, dpi=120)


def check() -> tuple[()]:
  """Exits with one line if the flags are invalid."""
  parsing.check_known('presets', parsing.read_names(PRESETS), list(PRETRAIN_PRESETS))
  parsing.read_sizes(EPISODES, len(PRESETS.value))
  paths.check_file('json', JSON.value)
  paths.check_file('picture', PICTURE.value)
  return ()


def main() -> None:
  """Measures each size, or the growth, and prints the tables."""
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
      parts = take_apart(preset, int(episodes), names=(*PARTS, 'whole', 'pretrain'), dtype=DTYPE.value)
      found = measure(parts, 1 if preset == 'paper' else REPEATS.value, rate)
      result[preset] = found = {'episodes': int(episodes)} | found
      print(f'\n{preset}: {episodes} episodes, {found["tokens"]} tokens, medians of {found["repeats"]}, peak memory of '
            f'the process {found["peak_memory_mib"]:.0f} MiB')
      for name, value in found['seconds'].items():
        share = f'{100 * found["share"][name]:.1f}%' if name in found['share'] else ''
        fraction = f'{found["fraction"][name]:.2f} of matrix products' if name in found['fraction'] else ''
        print(f'{name:>12} {value:9.3f} s {share:>7}  {fraction}', flush=True)
  if JSON.value:
    storage.write_json(JSON.value, result)


if __name__ == '__main__':
  run(main, check)
