"""Compiles a train step for accelerators that this machine does not have, and prints whether it fits their memory.

    pip install '.[tpu]'
    python -m experiments.compile_only --preset=paper --topology=v5e:2x4 --mesh=data:4,model:2 --dtype=bfloat16

    python -m experiments.compile_only --model=qwen3_0_6b --topology=H100:1 --episodes=64 --minibatches=8 \\
        --response_length=1024 --rollout=cached --dtype=bfloat16 --remat --scan_layers

Takes the flags of `experiments.finetune`, and the sizes of the model from --model: a preset, qwen3_0_6b, llama3_8b, or
a Hugging Face model directory, of which it reads config.json alone. Nothing is allocated and nothing runs: the memory
of a device by kind, and the data that devices exchange, are read from the compiled program.
"""

import re
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
from absl import flags
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.config import nearest, replace
from critkl_jax.models import huggingface
from critkl_jax.models.architectures import make_model
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.models.llama import SIZES
from critkl_jax.runtime import storage
from critkl_jax.runtime.footprint import Footprint, compile_footprint, needed_flops, num_parameters
from critkl_jax.tasks.addition import Addition, plus_task_of
from critkl_jax.tasks.fixed_lengths import fixed_lengths
from critkl_jax.tasks.questions.config import MOST_TOKENS
from critkl_jax.tasks.task import Task
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS

from . import paths, targets
from .exits import refuse
from .flags import check_mesh, define_config, keep_no_programs, read_config, run
from .workdirs import refuse_other_file

keep_no_programs()
MOST_MEMBERS, DEFAULT_LENGTH = 10_000, 256
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', 'Kind and number of devices: v4, v5e, v5p or v6e with the shape '
                               'of the slice, or H100:8 for GPUs of one machine.')
MESH = flags.DEFINE_string('mesh', '', 'Devices along the axes member, data and model; all along data if not given.')
MEMBERS = flags.DEFINE_integer('members', 1, 'Members of a study, which differ in their seeds.', 1, MOST_MEMBERS)
MAPPING = flags.DEFINE_enum('population_map', 'auto', ['auto', *population.MAPPINGS],
                            'Mapping of the members to devices, as in experiments.sweep.')
PROMPT_LENGTH = flags.DEFINE_integer('prompt_length', None, 'Q, tokens of a prompt, for a model that no preset names '
                                     f'({DEFAULT_LENGTH} if not given, as --response_length).', 1, MOST_TOKENS)
JSON = flags.DEFINE_string('json', None, 'JSON file for the results.')
READ_HERE = ('model', 'response_length')  # flags that mean more here than the config's fields
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')
flags.FLAGS['model'].help = ('Sizes of the model: a preset, qwen3_0_6b, llama3_8b, or a Hugging Face model directory; '
                             'those of --preset if not given.')
flags.FLAGS['response_length'].help = f'T, tokens of a response ({DEFAULT_LENGTH} if not given).'


def check() -> tuple[str, FinetuneConfig, LanguageModel, Task]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  config = read_config(FINETUNE_PRESETS, without=READ_HERE)
  check_mesh(MESH.value)
  paths.check_file('json', JSON.value)
  if JSON.value:
    refuse_other_file(JSON.value, ('topology', 'mesh', 'fits'), 'json')
  name = flags.FLAGS.model or flags.FLAGS.preset
  if name in PRETRAIN_PRESETS:
    sizes, task = PRETRAIN_PRESETS[name].model, addition_task(name, config)
  else:
    sizes = sizes_of(name)
    task = fixed_lengths(sizes.vocab_size, PROMPT_LENGTH.value or DEFAULT_LENGTH,
                         flags.FLAGS.response_length or DEFAULT_LENGTH)
    needed = task.prompt_length + task.response_length
    if needed > sizes.context_length:
      refuse(f'--response_length: prompts of {task.prompt_length} tokens and responses of {task.response_length} need '
             f'a context of {needed}, and {name} has {sizes.context_length}.')
  try:
    targets.check_topology(TOPOLOGY.value)
    model = make_model(config.model_of(sizes))
  except ValueError as error:
    refuse(f'--{error}')
  if model.config.attention == 'cudnn' and targets.backend_of(TOPOLOGY.value) != 'gpu':
    refuse(f"--attention: 'cudnn' needs an NVIDIA GPU, got --topology={TOPOLOGY.value}; give --attention=auto.")
  return name, config, model, task


def addition_task(name: str, config: FinetuneConfig) -> Task:
  """Returns the task of a preset's model, or exits with one line if it does not fit into the context."""
  for flag in ('prompt_length', 'response_length'):
    if flags.FLAGS[flag].value is not None:
      refuse(f'--{flag}: has no effect on addition, the task of {name}; leave it out, or take another --model.')
  pretraining = PRETRAIN_PRESETS[name]
  settings = Addition.of_pretraining(pretraining.addition, pretraining.model.vocab_size).finetuned(config.addition)
  task = plus_task_of(settings)
  needed, context = task.prompt_length + task.response_length, pretraining.model.context_length
  if needed > context:
    refuse(f'--extra_digits: {settings.known_digits} + {config.addition.extra_digits} digits need a context of '
           f'{needed}, and {name} has {context}; take fewer.')
  return task


def sizes_of(name: str) -> Any:
  """Returns the config of a model that no preset names, or exits with one line."""
  if name in SIZES:
    return SIZES[name]
  if name in FINETUNE_PRESETS:
    refuse(f'--model: the preset {name!r} names no sizes; expected one of {(*PRETRAIN_PRESETS, *SIZES)}, or a model '
           'directory.')
  try:
    return huggingface.read_config(name)
  except huggingface.PretrainedError as error:
    near = nearest(name, (*PRETRAIN_PRESETS, *SIZES))
    refuse(f'--model: {error} The nearest of the names {(*PRETRAIN_PRESETS, *SIZES)} is {near!r}.')


def main(name: str, config: FinetuneConfig, model: LanguageModel, task: Task) -> None:
  """Compiles the step, prints its memory and collectives, and writes them as JSON if asked."""
  jax.config.update('jax_platforms', 'cpu')
  try:
    mesh = sharding.make_mesh(MESH.value, targets.devices_of(TOPOLOGY.value))
    config = round_up_episodes(config, mesh)
  except ValueError as error:
    refuse(f'--{error}')
  memory = targets.chip_of(TOPOLOGY.value).memory_gib
  configs = population.product(config, seed=range(MEMBERS.value))
  found = {'parameters': num_parameters(model), 'flops': len(configs) * needed_flops(model, task, config),
           'topology': TOPOLOGY.value, 'mesh': dict(mesh.shape), 'dtype': model.dtype,
           'episodes': config.episodes, 'members': len(configs)}
  print(f'{name}: {found["parameters"]:,} parameters, {config.episodes} episodes of up to {task.response_length} '
        f'tokens, {config.minibatches * config.epochs} updates'
        f'{f" for each of {MEMBERS.value} members" if MEMBERS.value > 1 else ""}; {TOPOLOGY.value} as '
        f'{mesh_text(mesh)}, {model.dtype}')
  print(f'a step needs {found["flops"]:.3g} FLOP where every response is as long as the longest right one', flush=True)
  try:
    with mock.patch('jax.default_backend', return_value=targets.backend_of(TOPOLOGY.value)):
      compiled = compile_footprint(model, task, configs, mesh, MAPPING.value)
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


def round_up_episodes(config: FinetuneConfig, mesh: Mesh) -> FinetuneConfig:
  """Rounds an update's episodes up to a multiple of the data axis's size; prints a note if that changes them."""
  own, size = config.episodes // config.minibatches, mesh.shape['data']
  if own % size == 0:
    return config
  more = -(-own // size) * size
  print(f'an update takes {own} episodes, which data:{size} does not divide: compiled for {more} of them, as '
        f'--episodes={more * config.minibatches} would have it')
  return replace(config, episodes=more * config.minibatches)


def mesh_text(mesh: Mesh) -> str:
  """Formats a mesh like the flag `--mesh`."""
  return ','.join(f'{axis}:{size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'


def print_compiled(compiled: Footprint) -> None:
  """Prints memory and collectives."""
  print(f'compiled in {compiled.seconds:.0f} s')
  print('\nmemory of a device, MiB')
  for name, size in compiled.memory.items():
    print(f'{name:>12} {size / 2**20:12.1f}')
  print('\ncollectives in the text of the program (those in a loop run in each of its iterations)')
  print(f'{"kind":>20} {"in a loop":>10} {"number":>8} {"MiB on a device":>16}')
  for row in compiled.collectives:
    print(f'{row.kind:>20} {"yes" if row.in_loop else "no":>10} {row.number:>8} {row.bytes / 2**20:16.2f}')
  if not compiled.collectives:
    print('none'.rjust(20))


def out_of_memory(error: Exception) -> str:
  """Describes an out-of-memory error of the compiler in one line; raises any other error again."""
  lines: Sequence[str] = str(error).splitlines()
  said = next((line for line in lines if 'Ran out of memory' in line or 'RESOURCE_EXHAUSTED' in line), None)
  if said is None:
    raise error
  amounts = re.findall(r'\d[\d.]*[KMG]', ' '.join(lines[:8]))
  return f'needs {amounts[0]} of {amounts[1]} a device' if len(amounts) > 1 else said[:200]


if __name__ == '__main__':
  run(main, check)
