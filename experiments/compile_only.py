"""Compiles a train step for accelerators that are not there, and says whether it fits.

    pip install '.[tpu]'
    python -m experiments.compile_only --preset=paper --topology=v5e:2x4 --mesh=data:4,model:2 --dtype=bfloat16

Takes the flags of `experiments.finetune`, and the sizes of the model from --model. Nothing is allocated and nothing
runs: memory of a device by kind, and the data that devices exchange, are read from the compiled program.
"""

import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import sharding
from critkl_jax.analysis.programs import collectives
from critkl_jax.config import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneConfig
from critkl_jax.gpt2 import GPT2, forward_flops, init_params
from critkl_jax.records import TrainState
from critkl_jax.tasks.addition import plus_task
from critkl_jax.train_step import Hyperparameters, finetuning_keys, init_policy, make_train_step
from experiments import targets
from experiments.flags import define_config, read_config, run

TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', 'Kind and number of devices: v4, v5e, v5p or v6e with the shape '
                               'of the slice, or H100:8 for GPUs of one machine.')
MESH = flags.DEFINE_string('mesh', '', 'Devices along the axes data and model; all along data if not given.')
MODEL = flags.DEFINE_enum('model', None, list(PRETRAIN_PRESETS), 'Sizes of the model; those of --preset if not given.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')


def main() -> None:
  """Compiles and prints."""
  jax.config.update('jax_platforms', 'cpu')
  config = read_config(FINETUNE_PRESETS)
  name = MODEL.value or flags.FLAGS.preset
  if name not in PRETRAIN_PRESETS:
    raise SystemExit(f'error: --model: expected one of {tuple(PRETRAIN_PRESETS)}; the preset {name!r} names no sizes.')
  pretraining = PRETRAIN_PRESETS[name]
  task = plus_task(pretraining.known_digits, config.extra_digits)
  try:
    model = GPT2(config.model_of(pretraining.model))
    mesh = sharding.make_mesh(MESH.value, targets.devices_of(TOPOLOGY.value))
    sharding.check_episodes(mesh, config.episodes // config.minibatches)
  except ValueError as error:
    raise SystemExit(f'error: --{error}') from error
  memory = targets.chip_of(TOPOLOGY.value).memory_gib
  found = describe(model, task, config, mesh)
  print(f'{name}: {found["parameters"]:,} parameters, {config.episodes} episodes of up to {task.response_length} '
        f'tokens, {config.minibatches * config.epochs} updates; {TOPOLOGY.value} as {mesh_text(mesh)}, '
        f'{model.config.dtype}')
  print(f'a step needs {found["flops"] / 1e12:.2f} 10^12 FLOP where every response is as long as the longest right one')
  try:
    with mock.patch('jax.default_backend', return_value=targets.backend_of(TOPOLOGY.value)):
      found |= compile_step(model, task, config, mesh)
  except jax.errors.JaxRuntimeError as error:
    found |= {'fits': False, 'reason': out_of_memory(error)}
  else:
    found['fits'] = found['memory']['total'] <= memory * 2**30
    print_compiled(found)
  said = found.get('reason') or f'{found["memory"]["total"] / 2**30:.2f} of {memory} GiB a device'
  print(f'{"fits" if found["fits"] else "DOES NOT FIT"}: {said}')
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(found, indent=2) + '\n')


def mesh_text(mesh: Mesh) -> str:
  """Returns a mesh as its flag names it."""
  return ','.join(f'{axis}:{size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'


def describe(model: GPT2, task, config: FinetuneConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns what is known without compiling."""
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  length = task.prompt_length + (task.solution_length or task.response_length)
  forward = forward_flops(model.config, [length] * config.episodes)
  return {'parameters': sum(x.size for x in jax.tree.leaves(params)), 'flops': (2 + 3 * config.epochs) * forward,
          'topology': TOPOLOGY.value, 'mesh': dict(mesh.shape), 'dtype': model.config.dtype,
          'episodes': config.episodes}


def compile_step(model: GPT2, task, config: FinetuneConfig, mesh: Mesh) -> dict[str, Any]:
  """Compiles the train step from shapes, and returns memory, collectives and time."""
  start = time.monotonic()
  everywhere = NamedSharding(mesh, PartitionSpec())
  numbers = sharding.shapes(
      jax.eval_shape(lambda: (finetuning_keys(config)[1], Hyperparameters.of(config))), everywhere)
  compiled = make_train_step(model, task, config, mesh).lower(state_shapes(model, config, mesh), *numbers).compile()
  stats = compiled.memory_analysis()
  text = compiled.as_text()
  state = state_shapes(model, config, mesh)
  memory = {name: bytes_on_a_device(tree) for name, tree in (
      ('policy', state.params), ('optimizer', state.opt_state), ('reference', state.ref_params))}
  memory |= {'temporary': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes}
  memory['total'] = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
                     + memory['temporary'] + memory['program'])
  return {'memory': memory, 'collectives': [c._asdict() for c in collectives(text)],
          'compile_seconds': time.monotonic() - start}


def state_shapes(model: GPT2, config: FinetuneConfig, mesh: Mesh) -> TrainState:
  """Returns the state as shapes that lie on a mesh."""

  def init(key):
    params, opt_state = init_policy(model, config, init_params(model, key), key)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0), ref_params=params)

  shapes = jax.eval_shape(init, jax.random.key(0))
  return sharding.shapes(shapes, sharding.shardings(shapes, mesh))


def bytes_on_a_device(tree: Any) -> int:
  """Returns the bytes that one device holds of a PyTree of shapes."""
  sizes = (jnp.dtype(x.dtype).itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape) or (1,))))
           for x in jax.tree.leaves(tree))
  return sum(sizes)


def print_compiled(found: dict[str, Any]) -> None:
  """Prints memory and collectives."""
  print(f'compiled in {found["compile_seconds"]:.0f} s')
  print('\nmemory of a device, MiB')
  for name, size in found['memory'].items():
    print(f'{name:>12} {size / 2**20:12.1f}')
  print('\ncollectives, as they stand in the program (what stands in a loop is done in each of its rounds)')
  print(f'{"kind":>20} {"in a loop":>10} {"number":>8} {"MiB on a device":>16}')
  for row in found['collectives']:
    print(f'{row["kind"]:>20} {"yes" if row["in_loop"] else "no":>10} {row["number"]:>8} {row["bytes"] / 2**20:16.2f}')
  if not found['collectives']:
    print('none'.rjust(20))


def out_of_memory(error: Exception) -> str:
  """Returns in one line why a program did not compile; raises what is not about memory."""
  lines: Sequence[str] = str(error).splitlines()
  said = next((line for line in lines if 'Ran out of memory' in line or 'RESOURCE_EXHAUSTED' in line), None)
  if said is None:
    raise error
  amounts = re.findall(r'\d[\d.]*[KMG]', ' '.join(lines[:8]))
  return f'needs {amounts[0]} of {amounts[1]} a device' if len(amounts) > 1 else said[:200]


if __name__ == '__main__':
  run(main)
