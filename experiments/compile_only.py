"""Compiles a train step for accelerators that are not there, and says whether it fits.

    pip install '.[tpu]'
    python -m experiments.compile_only --preset=paper --topology=v5e:2x4 --mesh=data:4,model:2 --dtype=bfloat16

Takes the flags of `experiments.finetune`, and the sizes of the model from --model. Nothing is allocated and nothing
runs: memory of a device by kind, and the data that devices exchange, are read from the compiled program.
"""

import re
from collections.abc import Sequence
from unittest import mock

import jax
from absl import flags
from jax.sharding import Mesh

from critkl_jax import population, sharding, storage
from critkl_jax.config import FinetuneConfig, replace
from critkl_jax.footprint import Footprint, footprint, needed_flops, num_parameters
from critkl_jax.gpt2 import GPT2
from critkl_jax.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from critkl_jax.tasks.addition import plus_task

from . import targets
from .exits import refuse
from .flags import define_config, keep_no_programs, read_config, run
from .workdirs import refuse_other_file

keep_no_programs()
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', 'Kind and number of devices: v4, v5e, v5p or v6e with the shape '
                               'of the slice, or H100:8 for GPUs of one machine.')
MESH = flags.DEFINE_string('mesh', '', 'Devices along the axes member, data and model; all along data if not given.')
MEMBERS = flags.DEFINE_integer('members', 1, 'Members of a study, which differ in their seeds.', lower_bound=1)
MAPPING = flags.DEFINE_enum('population_map', 'auto', ['auto', *population.MAPPINGS],
                            'How members are computed, as in experiments.sweep.')
MODEL = flags.DEFINE_enum('model', None, list(PRETRAIN_PRESETS), 'Sizes of the model; those of --preset if not given.')
JSON = flags.DEFINE_string('json', None, 'File that takes the figures.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')


def main() -> None:
  """Compiles and prints."""
  jax.config.update('jax_platforms', 'cpu')
  config = read_config(FINETUNE_PRESETS)
  name = MODEL.value or flags.FLAGS.preset
  if name not in PRETRAIN_PRESETS:
    refuse(f'--model: expected one of {tuple(PRETRAIN_PRESETS)}; the preset {name!r} names no sizes.')
  pretraining = PRETRAIN_PRESETS[name]
  task = plus_task(pretraining.known_digits, config.extra_digits)
  if JSON.value:
    refuse_other_file(JSON.value, ('topology', 'mesh', 'fits'), 'json')
  try:
    model = GPT2(config.model_of(pretraining.model))
    mesh = sharding.make_mesh(MESH.value, targets.devices_of(TOPOLOGY.value))
    config = enough_episodes(config, mesh)
  except ValueError as error:
    refuse(f'--{error}')
  memory = targets.chip_of(TOPOLOGY.value).memory_gib
  configs = population.product(config, seed=range(MEMBERS.value))
  found = {'parameters': num_parameters(model), 'flops': len(configs) * needed_flops(model, task, config),
           'topology': TOPOLOGY.value, 'mesh': dict(mesh.shape), 'dtype': model.config.dtype,
           'episodes': config.episodes, 'members': len(configs)}
  print(f'{name}: {found["parameters"]:,} parameters, {config.episodes} episodes of up to {task.response_length} '
        f'tokens, {config.minibatches * config.epochs} updates'
        f'{f" for each of {MEMBERS.value} members" if MEMBERS.value > 1 else ""}; {TOPOLOGY.value} as '
        f'{mesh_text(mesh)}, {model.config.dtype}')
  print(f'a step needs {found["flops"]:.3g} FLOP where every response is as long as the longest right one', flush=True)
  try:
    with mock.patch('jax.default_backend', return_value=targets.backend_of(TOPOLOGY.value)):
      compiled = footprint(model, task, configs, mesh, MAPPING.value)
  except jax.errors.JaxRuntimeError as error:
    found |= {'fits': False, 'reason': out_of_memory(error)}
  else:
    found |= {'fits': compiled.memory['total'] <= memory * 2**30, 'memory': compiled.memory,
              'collectives': [row._asdict() for row in compiled.collectives], 'compile_seconds': compiled.seconds}
    print_compiled(compiled)
  said = found.get('reason') or f'{found["memory"]["total"] / 2**30:.2f} of {memory} GiB a device'
  if found['fits'] and targets.backend_of(TOPOLOGY.value) == 'gpu' and found['memory']['total'] > 0.75 * memory * 2**30:
    said += ', with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 0.75 of a GPU\'s memory if nobody says more'
  print(f'{"fits" if found["fits"] else "DOES NOT FIT"}: {said}')
  if JSON.value:
    storage.write_json(JSON.value, found)


def enough_episodes(config: FinetuneConfig, mesh: Mesh) -> FinetuneConfig:
  """Returns the config with as many episodes as can be shared out, and says so if they are more than were asked for."""
  own, size = config.episodes // config.minibatches, mesh.shape['data']
  if own % size == 0:
    return config
  more = -(-own // size) * size
  print(f'an update takes {own} episodes, which data:{size} does not divide: compiled for {more} of them, as '
        f'--episodes={more * config.minibatches} would have it')
  return replace(config, episodes=more * config.minibatches)


def mesh_text(mesh: Mesh) -> str:
  """Returns a mesh as its flag names it."""
  return ','.join(f'{axis}:{size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'


def print_compiled(compiled: Footprint) -> None:
  """Prints memory and collectives."""
  print(f'compiled in {compiled.seconds:.0f} s')
  print('\nmemory of a device, MiB')
  for name, size in compiled.memory.items():
    print(f'{name:>12} {size / 2**20:12.1f}')
  print('\ncollectives, as they stand in the program (what stands in a loop is done in each of its rounds)')
  print(f'{"kind":>20} {"in a loop":>10} {"number":>8} {"MiB on a device":>16}')
  for row in compiled.collectives:
    print(f'{row.kind:>20} {"yes" if row.in_loop else "no":>10} {row.number:>8} {row.bytes / 2**20:16.2f}')
  if not compiled.collectives:
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
