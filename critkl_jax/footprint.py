"""What a train step takes before it runs: memory of a device by kind, and what devices exchange.

Everything is read from the compiled program, which can be compiled for devices that are not there.
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

from critkl_jax import population, sharding
from critkl_jax.config import FinetuneConfig
from critkl_jax.gpt2 import GPT2, forward_flops, init_params
from critkl_jax.initial_state import Hyperparameters, finetuning_keys, init_policy
from critkl_jax.records import TrainState
from critkl_jax.tasks.task import Task
from critkl_jax.train_step import make_train_step

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32,
         's64': 64, 'u64': 64, 'f64': 64}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(r'\b(?:body|condition|to_apply|calls|(?:branch|true|false)_computations?)='
                     r'(?:\{([^}]*)\}|%?([\w.\-]+))')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_SHAPE = re.compile(r'\b(' + '|'.join(_BITS) + r')\[([\d,]*)\]')


class Footprint(NamedTuple):
  """What a compiled step takes.

  Attributes:
    memory: bytes on a device: `policy`, `optimizer`, `reference`, `temporary` (while a step runs), `program`, `total`.
    collectives: what devices exchange.
    seconds: that compilation took.
  """

  memory: dict[str, int]
  collectives: list['Collective']
  seconds: float


class Collective(NamedTuple):
  """The collectives of one kind at one depth.

  Attributes:
    kind: one of `KINDS`.
    in_loop: whether they stand in a loop, and happen in each of its rounds.
    number: of them in the text.
    bytes: of their results on a device, all of them together, each counted once.
  """

  kind: str
  in_loop: bool
  number: int
  bytes: int


def footprint(model: GPT2, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh, mapping: str = 'auto'
              ) -> Footprint:
  """Compiles the train step of one run, or of the members of a study, from shapes alone.

  Args:
    model: the policy network.
    task: problems and reward.
    configs: of one run, or of P members.
    mesh: devices; they may be those of a topology that is not there.
    mapping: as in `population.make_population_step`; of no meaning for one run.

  Returns:
    A `Footprint`.

  Raises:
    ValueError: as `population.make_population_step`.
    JaxRuntimeError: if the compiler finds that the program does not fit.
  """
  start = time.monotonic()
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


def state_shapes(model: GPT2, config: FinetuneConfig, mesh: Mesh) -> TrainState:
  """Returns what `init_finetuning` does as shapes that lie on the mesh, to compile for."""

  def init(key):
    params, opt_state = init_policy(model, config, init_params(model, key), key)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0), ref_params=params,
                      ensemble=(params,) * len(config.ensemble_paths))

  shapes = jax.eval_shape(init, jax.random.key(0))
  return sharding.shapes(shapes, sharding.shardings(shapes, mesh))


def needed_flops(model: GPT2, task: Task, config: FinetuneConfig) -> float:
  """Returns the FLOP that an iteration needs where every response is as long as the longest right one: a forward pass
  for the rollout, one for the reference, and three for each update's gradient; see `forward_flops`."""
  length = task.prompt_length + (task.solution_length or task.response_length)
  return (2 + 3 * config.epochs) * forward_flops(model.config, [length] * config.episodes)


def num_parameters(model: GPT2) -> int:
  """Returns the number of parameters, the value head's included."""
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, jax.random.key(0)))))


def bytes_on_a_device(tree: Any) -> int:
  """Returns the bytes that one device holds of a PyTree of shapes that lie on a mesh."""
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
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else match[2]  # as TPUs have it
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
  """Returns the computations that run in the rounds of some loop."""

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
  """Returns the bytes of a result.

  An asynchronous start returns results alone if it is an all-reduce; else operands, as many results, and what it needs
  itself (u32).
  """
  found = [(dtype, dims) for dtype, dims in _SHAPE.findall(shapes) if not (started and dtype == 'u32' and not dims)]
  if started and kind != 'all-reduce':
    found = found[len(found) // 2:]
  return sum(_BITS[dtype] // 8 * math.prod(int(n) for n in dims.split(',') if n) for dtype, dims in found)
