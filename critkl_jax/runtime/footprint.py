"""Measures the memory and the collectives of a train step before it runs.

Everything is read from the compiled program, which may be compiled for devices that this machine does not have.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, as_language_model
from critkl_jax.records import TrainState
from critkl_jax.tasks.task import Task
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_policy
from critkl_jax.training.train_step import make_train_step

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32,
         's64': 64, 'u64': 64, 'f64': 64}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(r'\b(?:body|condition|to_apply|calls|(?:branch|true|false)_computations?)='
                     r'(?:\{([^}]*)\}|%?([\w.\-]+))')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_SHAPE = re.compile(r'\b(' + '|'.join(_BITS) + r')\[([\d,]*)\]')


class Footprint(NamedTuple):
  """Memory and collectives of a compiled step.

  Attributes:
    memory: bytes on a device: `policy`, `optimizer`, `reference` (with its ensemble), `temporary` (while a step runs),
      `program`, `total`.
    collectives: exchanges of data between devices, by kind.
    seconds: duration of tracing and compilation.
  """

  memory: dict[str, int]
  collectives: list['Collective']
  seconds: float


class Collective(NamedTuple):
  """The collectives of one kind, inside or outside of loops.

  Attributes:
    kind: one of `KINDS`.
    in_loop: whether they are inside a loop, and so run in each of its iterations.
    number: how many the program's text contains.
    bytes: total size of their results on a device; a collective in a loop counts once.
  """

  kind: str
  in_loop: bool
  number: int
  bytes: int


def compile_footprint(model: LanguageModel, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh,
                      mapping: str = 'auto') -> Footprint:
  """Compiles the train step of one run, or of the members of a study, from shapes alone.

  Args:
    model: the policy's model.
    task: problems and reward.
    configs: of one run, or of P members.
    mesh: devices, possibly of a topology that this machine does not have.
    mapping: as in `population.make_population_step`; ignored for one run.

  Returns:
    A `Footprint`.

  Raises:
    ValueError: as `population.make_population_step`.
    JaxRuntimeError: if the compiler finds that the program does not fit.
  """
  model, start = as_language_model(model), time.monotonic()
  if len(configs) > 1:
    state, numbers = population.state_shapes(model, configs, mesh), population.numbers_shapes(configs, mesh)
    step = population.make_population_step(model, task, configs, mesh, mapping)
  else:
    state, step = state_shapes(model, configs[0], mesh), make_train_step(model, task, configs[0], mesh)
    numbers = jax.eval_shape(lambda: (finetuning_keys(configs[0])[1], Hyperparameters.of(configs[0])))
    numbers = sharding.shapes(numbers, NamedSharding(mesh, PartitionSpec()))
  compiled = step.lower(state, *numbers).compile()
  stats = compiled.memory_analysis()
  memory = {name: bytes_on_a_device(tree) for name, tree in (
      ('policy', state.params), ('optimizer', state.opt_state), ('reference', (state.ref_params, state.ensemble)))}
  memory |= {'temporary': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes}
  memory['total'] = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
                     + memory['temporary'] + memory['program'])
  return Footprint(memory, collectives(compiled.as_text()), time.monotonic() - start)


def state_shapes(model: LanguageModel, config: FinetuneConfig, mesh: Mesh) -> TrainState:
  """Returns the shapes and shardings of the state that `init_finetuning` makes on the mesh."""

  def init(key):
    params, opt_state = init_policy(model, config, model.init(key), key)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0), ref_params=params,
                      ensemble=(params,) * len(config.ensemble_paths))

  shapes = jax.eval_shape(init, jax.random.key(0))
  return sharding.shapes(shapes, sharding.shardings(shapes, mesh, model.partition))


def needed_flops(model: LanguageModel, task: Task, config: FinetuneConfig) -> float:
  """Returns the FLOP of an iteration whose responses all have the length of the longest solution.

  If the task has no solutions, responses have the greatest length that the task allows. The sum counts one forward
  pass (`forward_flops`) for the rollout, one for the reference, and three for each epoch of gradients.

  Raises:
    ValueError: if the model has no `forward_flops`.
  """
  model = as_language_model(model)
  if model.forward_flops is None:
    raise ValueError(f'model: {model.name!r} has no forward_flops.')
  length = task.prompt_length + (task.solution_length or task.response_length)
  return (2 + 3 * config.epochs) * model.forward_flops([length] * config.episodes)


def num_parameters(model: LanguageModel) -> int:
  """Returns the number of parameters, including the value head."""
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(as_language_model(model).init, jax.random.key(0))))


def bytes_on_a_device(tree: Any) -> int:
  """Returns the bytes that one device holds of a PyTree of shapes with shardings."""
  return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def collectives(text: str) -> list[Collective]:
  """Counts the collectives of a compiled program.

  Args:
    text: `compiled.as_text()`, of any backend.

  Returns:
    A record for each kind, inside and outside of loops, in the order of `KINDS`.
  """
  bodies = _computations(text)
  looped = _inside_loops(bodies)
  number: Counter[tuple[str, bool]] = Counter()
  size: Counter[tuple[str, bool]] = Counter()
  for name, lines in bodies.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if match:
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else match[2]  # how TPU programs write it
        key = kind, name in looped
        number[key] += 1
        size[key] += _result_bytes(match[1], match[2], '-start(' in line)
  return [Collective(kind, in_loop, number[kind, in_loop], size[kind, in_loop])
          for kind in KINDS for in_loop in (False, True) if number[kind, in_loop]]


def _computations(text: str) -> dict[str, list[str]]:
  bodies, name = {}, None
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      name = match[1]
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)
  return bodies


def _inside_loops(bodies: dict[str, list[str]]) -> set[str]:
  """Returns the names of the computations that run inside a loop."""

  def called(line):
    return [name.strip().lstrip('%') for several, one in _CALLED.findall(line) for name in (several or one).split(',')]

  frontier = [name for lines in bodies.values() for line in lines if ' while(' in line for name in called(line)]
  inside: set[str] = set()
  while frontier:
    name = frontier.pop()
    if name in bodies and name not in inside:
      inside.add(name)
      frontier += [x for line in bodies[name] for x in called(line)]
  return inside


def _result_bytes(shapes: str, kind: str, started: bool) -> int:
  """Returns the bytes of a collective's result.

  The asynchronous start of an all-reduce returns only its results. Other starts return their operands, then as many
  results, and u32 scalars for internal use; only the results are counted.
  """
  found = [(dtype, dims) for dtype, dims in _SHAPE.findall(shapes) if not (started and dtype == 'u32' and not dims)]
  if started and kind != 'all-reduce':
    found = found[len(found) // 2:]
  return sum(_BITS[dtype] // 8 * math.prod(int(n) for n in dims.split(',') if n) for dtype, dims in found)
