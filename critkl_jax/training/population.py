"""A population: runs that differ in seed and numbers advance together as one program and share one reference.

Letters: P members of a population.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import sharding
from critkl_jax.config import counting_values, flat_values, replace, switched_off
from critkl_jax.models.language_model import LanguageModel, as_language_model
from critkl_jax.records import TrainState
from critkl_jax.rl.losses import Coefficients
from critkl_jax.tasks.task import Task
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import (
  Hyperparameters,
  check_ensemble,
  finetuning_keys,
  init_policy,
  with_critic,
)
from critkl_jax.training.memory import Memory
from critkl_jax.training.train_step import make_train_step

MAPPINGS = ('vmap', 'scan', 'shard')
# Fields in which members may differ; all other fields are part of the program.
VARIED = ('kl', 'learning_rate', 'discount', 'gae_lambda', *Coefficients.__dataclass_fields__, 'gate_threshold',
          'gate_fraction', 'seed')
# Metrics of the penalty; 0 for members without one.
_OF_PENALTY = ('weight', 'weight_q01', 'weight_q50', 'weight_q99', 'weight_critical', 'kl_penalty', 'weighted_kl')
# Axes of `vmap`: the members' own arrays have a leading axis P; step and references are shared.
_AXES = TrainState(params=0, opt_state=0, step=None, ref_params=None, ensemble=None)


def product(config: FinetuneConfig, **values: Iterable[Any]) -> tuple[FinetuneConfig, ...]:
  """Makes a config for each combination of the values; the last field changes fastest.

  Where a combination switches a field off, the field is left out; configs that are then equal become one member.

  Args:
    config: gives all other fields.
    **values: field -> its values.

  Raises:
    ValueError: if a field cannot vary within one program, a value is not allowed, or a field is switched off in every
      combination.
  """
  for name in values:
    if name not in VARIED:
      raise ValueError(f'{name}: members of one program may differ in {VARIED}, not in this.')
  combinations = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
  usual = flat_values(config)
  off = [switched_off(type(config), usual | own).keys() & own.keys() for own in combinations]
  never = set.intersection(*map(set, off)) if off else set()  # `replace` refuses these by name
  return tuple(dict.fromkeys(
      replace(config, **{name: value for name, value in own.items() if name not in left_out or name in never})
      for own, left_out in zip(combinations, off)))


def names(configs: Sequence[FinetuneConfig]) -> tuple[str, ...]:
  """Names each member by the fields in which members differ: `kl=standard-seed=0`."""
  return tuple('-'.join(f'{name}={value}' for name, value in own.items()) or 'member' for own in differences(configs))


def differences(configs: Sequence[FinetuneConfig]) -> tuple[dict[str, Any], ...]:
  """Returns, for each member, the values of the fields in which members differ and that count for it."""
  values = [counting_values(config) for config in configs]
  fields = [name for name in VARIED if len({repr(v[name]) for v in values if name in v}) > 1]
  return tuple({name: v[name] for name in fields if name in v} for v in values)


def shared_config(configs: Sequence[FinetuneConfig]) -> FinetuneConfig:
  """Returns the config of the program that advances all members.

  If members have different penalties, the program has the prioritized penalty: exponent 0 makes it the standard
  penalty, and coefficient 0 no penalty (`Coefficients.of`).

  Raises:
    ValueError: if there is no member, or members differ in a field that is part of the program and counts for them.
  """
  if not configs:
    raise ValueError('configs: expected 1 member or more, got none.')
  program: dict[str, Any] = {}
  for config in configs:
    for name, value in counting_values(config).items():
      if name not in VARIED and program.setdefault(name, value) != value:
        raise ValueError(f'{name}: members of one program may differ in {VARIED}, not in this.')
  mixed = len({config.loss.kl for config in configs}) > 1
  first = replace(configs[0], kl='prioritized') if mixed else configs[0]
  # Only values that count for their member: a member's penalty may switch some of these fields off.
  return replace(first, **{name: program[name] for name in program.keys() & counting_values(first).keys()})


def init_population(model: LanguageModel, configs: Sequence[FinetuneConfig], ref_params: Any, mesh: Mesh,
                    ensemble: Sequence[Any] = ()) -> TrainState:
  """Makes the state of all members before the first iteration, each as in `init_finetuning`.

  Args:
    model: the policy's model.
    configs: configs of the P members.
    ref_params: parameters of the pre-trained model.
    mesh: holds the arrays; members are sharded over its axis `member`.
    ensemble: parameters of the configs' further references.

  Returns:
    A `TrainState`. Only `params` and `opt_state` have a leading axis P; no array is shared with the arguments.

  Raises:
    ValueError: as `shared_config`, `init_policy` and `check_ensemble`.
  """
  model, config = as_language_model(model), shared_config(configs)
  init = functools.partial(_init, model, config)
  references = sharding.place((ref_params, check_ensemble(config, ensemble)), mesh, model.partition)
  keys = sharding.replicate(jnp.stack([finetuning_keys(config)[0] for config in configs]), mesh)
  shapes = jax.eval_shape(init, keys, *references)
  return jax.jit(init, out_shardings=_placement(shapes, mesh, model.partition))(keys, *references)


def _init(model, config, keys, ref_params, ensemble):
  params, opt_state = jax.vmap(lambda key: init_policy(model, config, ref_params, key))(keys)
  kept, _ = init_policy(model, config, ref_params, keys[0])
  return jax.tree.map(jnp.copy, TrainState(params, opt_state, jnp.int32(0), kept, with_critic(model, ensemble, kept)))


def numbers_of(configs: Sequence[FinetuneConfig], mesh: Mesh) -> tuple[chex.PRNGKey, Hyperparameters]:
  """Places the members' keys `[P]` and numbers, float32 `[P]` each, on a mesh."""
  return sharding.put(_numbers_of(configs), NamedSharding(mesh, PartitionSpec('member')))


def _numbers_of(configs):
  keys = jnp.stack([finetuning_keys(config)[1] for config in configs])
  return keys, jax.tree.map(lambda *x: jnp.stack(x), *map(Hyperparameters.of, configs))


def make_population_step(model: LanguageModel, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh,
                         mapping: str = 'auto', probe: Callable[[Any], dict[str, chex.Array]] | None = None
                         ) -> Callable:
  """Makes the step of all members, `(state, keys, hyperparameters) -> (state, metrics [P])`, jitted with state donated.

  A member's results are the same as with `make_train_step`, up to rounding.

  Args:
    model: the policy's model.
    task: gives problems and rewards.
    configs: configs of the P members.
    mesh: the mesh of `init_population`.
    mapping: `vmap` computes the members side by side, `scan` one after another, `shard` shards them over the mesh's
      axis `member` and computes them one after another on each part; `auto` picks, see `pick_mapping`.
    probe: as in `make_train_step`.

  Returns:
    The step; its keys and hyperparameters come from `numbers_of`.

  Raises:
    ValueError: if the mapping is unknown or does not fit the mesh, or members differ in a field that is part of the
      program.
  """
  model, shared, mapping = as_language_model(model), shared_config(configs), _named(mapping, len(configs), mesh)
  single = make_train_step(model, task, shared, probe=probe)
  penalised = np.array([config.loss.kl != 'none' for config in configs], np.float32)

  in_turn = _one_after_another(single)
  # If each device has members of its own, no device waits for another; if devices share a member, all keep in step.
  spread = _on_each(in_turn) if mesh.shape['member'] == mesh.size else _on_each_part(in_turn, mesh)
  at_once = jax.vmap(single, (_AXES, 0, 0), (_AXES, 0))
  mapped = {'scan': in_turn, 'vmap': at_once, 'shard': spread}[mapping]

  def step(state, keys, hyperparameters):
    placement = _placement(state, mesh, model.partition)
    state, metrics = mapped(state, keys, hyperparameters)
    metrics |= {name: penalised * metrics[name] for name in _OF_PENALTY
                if name in metrics}  # a task may not mark critical tokens
    return jax.lax.with_sharding_constraint((state, metrics), (placement, NamedSharding(mesh, PartitionSpec())))

  return jax.jit(sharding.on_mesh(mesh, step), donate_argnums=0)


def _one_after_another(single):
  def in_turn(state, keys, hyperparameters):
    def advance(own):
      params, opt_state, *numbers = own
      after, metrics = single(state.replace(params=params, opt_state=opt_state), *numbers)
      return after.params, after.opt_state, metrics

    params, opt_state, metrics = jax.lax.map(advance, (state.params, state.opt_state, keys, hyperparameters))
    return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics

  return in_turn


def _on_each(in_turn):
  """Lets each device advance its own members, at its own pace."""
  own, everywhere = PartitionSpec('member'), PartitionSpec()
  parts = TrainState(params=own, opt_state=own, step=everywhere, ref_params=everywhere,
                     ensemble=everywhere)
  return jax.shard_map(in_turn, in_specs=(parts, own, own), out_specs=(parts, own), check_vma=False)


def _on_each_part(in_turn, mesh):
  """Lets each group of devices advance its own members, all groups in step."""

  def split(tree):
    return jax.tree.map(lambda x: x.reshape(mesh.shape['member'], -1, *x.shape[1:]), tree)

  def spread(state, keys, hyperparameters):
    own = state.replace(params=split(state.params), opt_state=split(state.opt_state))
    after, metrics = jax.vmap(in_turn, (_AXES, 0, 0), (_AXES, 0), spmd_axis_name='member')(
        own, split(keys), split(hyperparameters))
    params, opt_state, metrics = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (after.params, after.opt_state, metrics))
    return after.replace(params=params, opt_state=opt_state), metrics

  return spread


def map_members(fn: Callable, mesh: Mesh) -> Callable:
  """Maps `fn` over P members, one after another on each device: makes `(params, *shared) -> arrays [P, ...]`, jitted.

  Args:
    fn: `(parameters of one member, *shared arrays) -> PyTree of arrays`.
    mesh: the mesh of `init_population`; only its axis `member` may be greater than 1.

  Raises:
    ValueError: if the mesh has other axes.
  """
  if mesh.shape['member'] != mesh.size:
    raise ValueError(f'mesh: expected an axis of members alone, got {dict(mesh.shape)}.')
  own, everywhere = PartitionSpec('member'), PartitionSpec()

  def in_turn(params, shared):
    return jax.lax.map(lambda one: fn(one, *shared), params)

  mapped = jax.shard_map(in_turn, in_specs=(own, everywhere), out_specs=own, check_vma=False)
  return jax.jit(sharding.on_mesh(mesh, lambda params, *shared: mapped(params, shared)))


def compile_step(model: LanguageModel, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh, mapping: str = 'auto',
                 probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> tuple[Callable, Memory]:
  """Compiles the step of a population and measures its memory, from shapes alone, without allocating the state.

  Args:
    model: the policy's model.
    task: gives problems and rewards.
    configs: configs of the P members.
    mesh: the mesh of `init_population`.
    mapping: as in `make_population_step`.
    probe: as in `make_train_step`.

  Returns:
    The compiled step, for arrays placed as by `init_population`, and its memory. Under `jax_debug_nans` the step is the
    jitted function.

  Raises:
    ValueError: as `make_population_step`.
  """
  state, numbers = state_shapes(model, configs, mesh), numbers_shapes(configs, mesh)
  step = make_population_step(model, task, configs, mesh, mapping, probe)
  compiled = step.lower(state, *numbers).compile()
  stats, mapping = compiled.memory_analysis(), _named(mapping, len(configs), mesh)
  own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state))) // mesh.size
  step = step if jax.config.jax_debug_nans else compiled  # only the jitted step can find where NaN comes from
  return step, Memory(state=own, shared=stats.argument_size_in_bytes - own, temporary=stats.temp_size_in_bytes,
                          members=len(configs) // mesh.shape['member'], mapping=mapping)


def state_shapes(model: LanguageModel, configs: Sequence[FinetuneConfig], mesh: Mesh) -> TrainState:
  """Like `init_population`, but returns shapes with their shardings, for compilation."""
  key = jax.eval_shape(lambda: jnp.stack([jax.random.key(0)] * len(configs)))
  model, config = as_language_model(model), shared_config(configs)
  ref_params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(
      functools.partial(_init, model, config), key, ref_params, (ref_params,) * len(config.ensemble_paths))
  return sharding.shapes(state, _placement(state, mesh, model.partition))


def numbers_shapes(configs: Sequence[FinetuneConfig], mesh: Mesh) -> tuple[chex.PRNGKey, Hyperparameters]:
  """Like `numbers_of`, but returns shapes with their shardings."""
  numbers = jax.eval_shape(lambda: _numbers_of(configs[:1] * len(configs)))
  return sharding.shapes(numbers, NamedSharding(mesh, PartitionSpec('member')))


def pick_mapping(mesh: Mesh) -> str:
  """Picks the mapping for `auto`: `shard` if the mesh spreads members, else `scan` on a CPU and `vmap` elsewhere.

  A single member does not fill an accelerator.
  """
  if mesh.shape['member'] > 1:
    return 'shard'
  return 'scan' if jax.default_backend() == 'cpu' else 'vmap'


def members_mesh(num_members: int, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the default mesh: the most devices that share the members evenly; out of all devices if None."""
  devices = jax.devices() if devices is None else devices
  number = max(n for n in range(1, len(devices) + 1) if num_members % n == 0)
  return sharding.make_mesh(f'member:{number}', devices)


def member(state: TrainState, index: int) -> TrainState:
  """Returns the state of one member, from arrays on the host; see `members_on_host`."""
  params, opt_state = jax.tree.map(lambda x: x[index], (state.params, state.opt_state))
  return state.replace(params=params, opt_state=opt_state)


def members_on_host(tree: Any) -> Iterator[Any]:
  """Yields arrays `[P, ...]` member by member as NumPy arrays, on every host, wherever the members lie.

  Members are fetched one at a time across hosts, so that no device holds more than one member of another device.
  """
  arrays = jax.tree.leaves(tree)
  if all(x.is_fully_addressable for x in arrays):
    tree = jax.device_get(tree)
    yield from (jax.tree.map(lambda x, i=i: x[i], tree) for i in range(arrays[0].shape[0]))
    return

  def take(tree, index):  # a sum over own members, since a slice would gather all members
    def one(x):
      chosen = jnp.arange(x.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (x.ndim - 1)) == index
      return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), 0, dtype=x.dtype)

    return jax.tree.map(one, tree)

  take = jax.jit(take, out_shardings=NamedSharding(arrays[0].sharding.mesh, PartitionSpec()))
  for index in range(arrays[0].shape[0]):
    yield jax.device_get(take(tree, np.int32(index)))


def stack(members: Sequence[TrainState]) -> TrainState:
  """Stacks members into the state of a population, as NumPy arrays; step and reference are the first member's."""
  own = [(m.params, m.opt_state) for m in members]
  params, opt_state = jax.tree.map(lambda *x: np.stack(x), *own)
  return members[0].replace(params=params, opt_state=opt_state)


def _named(mapping, num_members, mesh):
  mapping, parts = pick_mapping(mesh) if mapping == 'auto' else mapping, mesh.shape['member']
  if mapping not in MAPPINGS:
    raise ValueError(f"population_map: expected 'auto' or one of {MAPPINGS}, got {mapping!r}.")
  if mapping != 'shard' and parts > 1:
    raise ValueError(f'population_map: {mapping!r} keeps members together, and the mesh has member:{parts}; take '
                     "'shard'.")
  if num_members % parts:
    raise ValueError(f'mesh: member:{parts} does not divide {num_members} members.')
  return mapping


def _placement(state, mesh, partition) -> TrainState:
  """Returns the shardings of a population's state."""
  params, opt_state = sharding.shardings((state.params, state.opt_state), mesh, partition, members=True)
  return TrainState(params=params, opt_state=opt_state, step=NamedSharding(mesh, PartitionSpec()),
                    ref_params=sharding.shardings(state.ref_params, mesh, partition),
                    ensemble=sharding.shardings(state.ensemble, mesh, partition))
