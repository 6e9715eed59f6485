"""A study as one program: its members differ in seed and numbers, advance together and share one reference.

Letters: P members.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import sharding
from critkl_jax.config import FinetuneConfig, flat_values, replace
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.initial_state import Hyperparameters, check_ensemble, finetuning_keys, init_policy, with_value_head
from critkl_jax.losses import Coefficients
from critkl_jax.records import TrainState
from critkl_jax.tasks.task import Task
from critkl_jax.train_step import make_train_step

MAPPINGS = ('vmap', 'scan', 'shard')
# Fields in which members may differ: all others are part of the program.
VARIED = ('kl', 'learning_rate', 'discount', 'gae_lambda', *Coefficients.__dataclass_fields__, 'seed')
# Of the state, the members' own arrays have a leading axis P; step and references are shared.
_AXES = TrainState(params=0, opt_state=0, step=None, ref_params=None, ensemble=None)


def product(config: FinetuneConfig, **values: Iterable[Any]) -> tuple[FinetuneConfig, ...]:
  """Returns a config for each combination of the values, the last field changing fastest.

  A penalty without a certainty takes the exponent of `config`, so that combinations which mean the same are one member.

  Args:
    config: gives the fields that are not named.
    **values: field -> its values.

  Raises:
    ValueError: if a field cannot vary within one program, or a value is not allowed.
  """
  for name in values:
    if name not in VARIED:
      raise ValueError(f'{name}: members of one program may differ in {VARIED}, not in this.')
  members = (replace(config, **dict(zip(values, some))) for some in itertools.product(*values.values()))
  return tuple(dict.fromkeys(m if m.loss.kl == 'prioritized' else replace(
      m, certainty_exponent=config.loss.certainty_exponent) for m in members))


def names(configs: Sequence[FinetuneConfig]) -> tuple[str, ...]:
  """Returns a name for each member, made of the fields in which they differ: `kl=standard-seed=0`."""
  return tuple('-'.join(f'{name}={value}' for name, value in own.items()) or 'member' for own in differences(configs))


def differences(configs: Sequence[FinetuneConfig]) -> tuple[dict[str, Any], ...]:
  """Returns what is a member's own: the fields in which members differ, the exponent only where a penalty has one."""
  values = [flat_values(config) for config in configs]
  fields = [name for name in VARIED if len({repr(v[name]) for v in values}) > 1]
  return tuple({name: v[name] for name in fields if name != 'certainty_exponent' or v['kl'] == 'prioritized'}
               for v in values)


def shared_config(configs: Sequence[FinetuneConfig]) -> FinetuneConfig:
  """Returns the config of the program that advances all members.

  Where penalties are mixed it is that of a prioritized one: the standard penalty is its exponent 0, and none its
  coefficient 0 (`Coefficients.of`).

  Raises:
    ValueError: if there is no member, or some differ in a field that is part of the program.
  """
  if not configs:
    raise ValueError('configs: expected 1 member or more, got none.')
  first = flat_values(configs[0])
  for config in configs:
    other = [name for name, value in flat_values(config).items() if value != first[name] and name not in VARIED]
    if other:
      raise ValueError(f'{other[0]}: members of one program may differ in {VARIED}, not in this.')
  mixed = len({config.loss.kl for config in configs}) > 1
  return replace(configs[0], kl='prioritized') if mixed else configs[0]


def init_population(model: GPT2, configs: Sequence[FinetuneConfig], ref_params: Any, mesh: Mesh,
                    ensemble: Sequence[Any] = ()) -> TrainState:
  """Returns the state of all members before the first iteration, each as `init_finetuning` makes it.

  Args:
    model: the policy network.
    configs: of P members.
    ref_params: parameters of the pre-trained model.
    mesh: where the arrays lie, members spread over `member`.
    ensemble: parameters of the configs' further references.

  Returns:
    A `TrainState` whose `params` and `opt_state` have a leading axis P; the others have none, and none of its arrays is
    shared with the arguments.
  """
  config = shared_config(configs)
  init = functools.partial(_init, model, config)
  references = sharding.place((ref_params, check_ensemble(config, ensemble)), mesh)
  keys = sharding.replicate(jnp.stack([finetuning_keys(config)[0] for config in configs]), mesh)
  shapes = jax.eval_shape(init, keys, *references)
  return jax.jit(init, out_shardings=_placement(shapes, mesh))(keys, *references)


def _init(model, config, keys, ref_params, ensemble):
  params, opt_state = jax.vmap(lambda key: init_policy(model, config, ref_params, key))(keys)
  kept, _ = init_policy(model, config, ref_params, keys[0])
  return jax.tree.map(jnp.copy, TrainState(params, opt_state, jnp.int32(0), kept, with_value_head(ensemble, kept)))


def numbers_of(configs: Sequence[FinetuneConfig], mesh: Mesh) -> tuple[chex.PRNGKey, Hyperparameters]:
  """Returns the members' keys `[P]` and numbers, float32 `[P]` each, on a mesh."""
  return sharding.put(_numbers_of(configs), NamedSharding(mesh, PartitionSpec('member')))


def _numbers_of(configs):
  keys = jnp.stack([finetuning_keys(config)[1] for config in configs])
  return keys, jax.tree.map(lambda *x: jnp.stack(x), *map(Hyperparameters.of, configs))


def make_population_step(model: GPT2, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh, mapping: str = 'auto',
                         probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> Callable:
  """Makes one iteration of all members, `(state, keys, hyperparameters) -> (state, metrics [P])`, jitted, the state
  donated.

  A member's results are those of `make_train_step` alone, up to rounding.

  Args:
    model: the policy network.
    task: problems and reward.
    configs: of P members.
    mesh: of `init_population`.
    mapping: `vmap` computes the members side by side, `scan` one after another, `shard` spreads them over the mesh's
      axis `member`, one after another on each part; `auto` picks, see `pick_mapping`.
    probe: as in `make_train_step`.

  Returns:
    The step; keys and hyperparameters are those of `numbers_of`.

  Raises:
    ValueError: if the mapping is unknown or does not fit the mesh, or members differ in what is part of the program.
  """
  shared, mapping = shared_config(configs), _named(mapping, len(configs), mesh)
  single = make_train_step(model, task, shared, probe=probe)
  penalised = np.array([config.loss.kl != 'none' for config in configs], np.float32)

  in_turn = _one_after_another(single)
  # Devices that share no member need not wait for one another; XLA cannot have it so where some of them do.
  spread = _on_each(in_turn) if mesh.shape['member'] == mesh.size else _on_each_part(in_turn, mesh)
  at_once = jax.vmap(single, (_AXES, 0, 0), (_AXES, 0))
  mapped = {'scan': in_turn, 'vmap': at_once, 'shard': spread}[mapping]

  def step(state, keys, hyperparameters):
    placement = _placement(state, mesh)
    state, metrics = mapped(state, keys, hyperparameters)
    metrics |= {name: penalised * metrics[name] for name in ('weight', 'weighted_kl', 'weight_critical')}
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
  """Makes `(params, *shared) -> arrays [P, ...]`, jitted: `fn(params, *shared)` of each of P members, one after another
  on each device.

  Args:
    fn: (parameters of one member, shared arrays) -> PyTree of arrays.
    mesh: of `init_population`; of its axes only `member` may be greater than 1.

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


def compile_step(model: GPT2, task: Task, configs: Sequence[FinetuneConfig], mesh: Mesh, mapping: str = 'auto',
                 probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> tuple[Callable, 'Memory']:
  """Compiles the step of a population from shapes alone, and says what memory it takes: nothing is allocated for it.

  Args:
    model: the policy network.
    task: problems and reward.
    configs: of P members.
    mesh: of `init_population`.
    mapping: as in `make_population_step`.
    probe: as in `make_train_step`.

  Returns:
    The compiled step, for arrays placed as those of `init_population`, and its memory.

  Raises:
    ValueError: as `make_population_step`.
  """
  state, numbers = state_shapes(model, configs, mesh), numbers_shapes(configs, mesh)
  step = make_population_step(model, task, configs, mesh, mapping, probe)
  compiled = step.lower(state, *numbers).compile()
  stats, mapping = compiled.memory_analysis(), _named(mapping, len(configs), mesh)
  own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state))) // mesh.size
  step = step if jax.config.jax_debug_nans else compiled  # of the two only jit can say where NaN comes from
  return step, Memory(state=own, shared=stats.argument_size_in_bytes - own, temporary=stats.temp_size_in_bytes,
                          members=len(configs) // mesh.shape['member'], mapping=mapping)


def state_shapes(model: GPT2, configs: Sequence[FinetuneConfig], mesh: Mesh) -> TrainState:
  """Returns what `init_population` does as shapes that lie on the mesh, to compile for."""
  key = jax.eval_shape(lambda: jnp.stack([jax.random.key(0)] * len(configs)))
  ref_params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  config = shared_config(configs)
  state = jax.eval_shape(
      functools.partial(_init, model, config), key, ref_params, (ref_params,) * len(config.ensemble_paths))
  return sharding.shapes(state, _placement(state, mesh))


def numbers_shapes(configs: Sequence[FinetuneConfig], mesh: Mesh) -> tuple[chex.PRNGKey, Hyperparameters]:
  """Returns what `numbers_of` does as shapes that lie on the mesh."""
  numbers = jax.eval_shape(lambda: _numbers_of(configs[:1] * len(configs)))
  return sharding.shapes(numbers, NamedSharding(mesh, PartitionSpec('member')))


class Memory(NamedTuple):
  """What the step of a population takes on a device, in bytes.

  Attributes:
    state: of the members on this device.
    shared: the reference and numbers.
    temporary: while a step runs.
    members: on this device.
    mapping: how they are computed.
  """

  state: int
  shared: int
  temporary: int
  members: int
  mapping: str

  @property
  def total(self) -> int:
    """All of it."""
    return self.state + self.shared + self.temporary

  def fitting(self, limit: int) -> int:
    """Returns how many members a device with `limit` bytes holds: all that is temporary grows with them under `vmap`,
    otherwise a copy of their state alone."""
    fixed, each = self.shared + self.temporary - self._growing, (self.state + self._growing) / self.members
    return max(int((limit - fixed) / each), 0)

  def of(self, members: int) -> 'Memory':
    """Returns what another number of members takes, by the same rule."""
    times = members / self.members
    return self._replace(state=int(times * self.state), members=members,
                         temporary=int(self.temporary + (times - 1) * self._growing))

  @property
  def _growing(self) -> int:
    return self.temporary if self.mapping == 'vmap' else min(self.state, self.temporary)


def available_memory(mesh: Mesh) -> int | None:
  """Returns the free bytes of a device of a mesh, of a CPU its share of the host's free memory; None if it cannot be
  known."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  stats = own[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  meminfo, group = pathlib.Path('/proc/meminfo'), pathlib.Path('/sys/fs/cgroup')
  found = re.search(r'MemAvailable:\s+(\d+) kB', meminfo.read_text()) if meminfo.is_file() else None
  free = [int(found[1]) * 1024] if found else []
  if (group / 'memory.max').is_file() and (group / 'memory.max').read_text().strip().isdigit():  # of a container
    free.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
  return max(min(free), 0) // len(own) if free else None


def pick_mapping(mesh: Mesh) -> str:
  """Returns the mapping where none is named: `shard` where the mesh has an axis of members, else `scan` on a CPU and
  `vmap` on an accelerator, which one member does not fill."""
  if mesh.shape['member'] > 1:
    return 'shard'
  return 'scan' if jax.default_backend() == 'cpu' else 'vmap'


def members_mesh(num_members: int, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh where none is named: as many of the devices, all if None, as can take equally many members."""
  devices = jax.devices() if devices is None else devices
  number = max(n for n in range(1, len(devices) + 1) if num_members % n == 0)
  return sharding.make_mesh(f'member:{number}', devices)


def member(state: TrainState, index: int) -> TrainState:
  """Returns the state of one member, of arrays of the host; see `members_on_host`."""
  params, opt_state = jax.tree.map(lambda x: x[index], (state.params, state.opt_state))
  return state.replace(params=params, opt_state=opt_state)


def members_on_host(tree: Any) -> Iterator[Any]:
  """Yields arrays `[P, ...]` member by member as NumPy arrays, on every host, wherever the members lie.

  Members of other hosts come one at a time, so that no device ever holds more than one that is not its own.
  """
  arrays = jax.tree.leaves(tree)
  if all(x.is_fully_addressable for x in arrays):
    tree = jax.device_get(tree)
    yield from (jax.tree.map(lambda x, i=i: x[i], tree) for i in range(arrays[0].shape[0]))
    return

  def take(tree, index):  # every device looks among its own: to slice would bring all members together
    def one(x):
      chosen = jnp.arange(x.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (x.ndim - 1)) == index
      return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), 0, dtype=x.dtype)

    return jax.tree.map(one, tree)

  take = jax.jit(take, out_shardings=NamedSharding(arrays[0].sharding.mesh, PartitionSpec()))
  for index in range(arrays[0].shape[0]):
    yield jax.device_get(take(tree, np.int32(index)))


def stack(members: Sequence[TrainState]) -> TrainState:
  """Returns the state of a population as NumPy arrays, step and reference being those of the first member."""
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


def _placement(state, mesh) -> TrainState:
  """Returns where the arrays of a population's state lie."""
  params, opt_state = sharding.shardings((state.params, state.opt_state), mesh, members=True)
  return TrainState(params=params, opt_state=opt_state, step=NamedSharding(mesh, PartitionSpec()),
                    ref_params=sharding.shardings(state.ref_params, mesh),
                    ensemble=sharding.shardings(state.ensemble, mesh))
