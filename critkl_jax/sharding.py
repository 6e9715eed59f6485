"""Sharding of arrays over a mesh of devices with the axes `member`, `data` and `model`.

Members of a population are spread over `member`, episodes over `data`, and attention heads and hidden units over
`model` (Megatron-LM, arXiv 1909.08053). Between passes ("at rest") parameters and optimizer state are spread over
`data` and `model` together (ZeRO, arXiv 1910.02054); a pass begins by gathering them over `data`. The model's
`Partition` names the axis of each parameter that is spread over `model`. Inside a program, all functions except
`own_tokens` and `own_tokens_mean` only annotate arrays, and the compiler inserts the collectives. Without a mesh, or on
one device, nothing changes.

`on_mesh` traces a program in the context of a mesh; the functions below read the mesh from the context.

Letters: B episodes, T tokens.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('member', 'data', 'model')
# (parameter path, shape) -> `model`, `whole` or None for each axis; see `models.language_model.LanguageModel`
Partition = Callable[[tuple[str, ...], tuple[int, ...]], Sequence[str | None]]


# Meshes.


def make_mesh(text: str = '', devices: Sequence[Any] | None = None) -> Mesh:
  """Builds a mesh from text such as `data:4,model:2`.

  Args:
    text: sizes of axes. An axis that is not named has size 1; size `-1` takes all remaining devices. Empty: all
      devices along `data`.
    devices: the devices; all devices of all hosts if None. A mesh of fewer devices takes the first of them.

  Raises:
    ValueError: if an axis is unknown or given twice, the sizes do not fit the number of devices, or a host would have
      no device in the mesh.
  """
  sizes = mesh_sizes(text)
  devices = jax.devices() if devices is None else devices
  known = math.prod(size for size in sizes.values() if size != -1)
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) == 1 and known > 0 and len(devices) % known == 0:
    sizes[rest[0]] = len(devices) // known
  number = math.prod(sizes.values())
  if any(size < 1 for size in sizes.values()) or number > len(devices):
    raise ValueError(f'mesh: {text!r} does not fit {len(devices)} devices.')
  hosts = [len({device.process_index for device in some}) for some in (devices, devices[:number])]
  if hosts[0] > hosts[1]:
    raise ValueError(f'mesh: {text!r} takes {number} of {len(devices)} devices, and leaves hosts without any.')
  return Mesh(np.asarray(devices[:number]).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(text: str) -> dict[str, int]:
  """Parses the size of each axis, `-1` for all remaining devices, without initializing a JAX backend.

  Raises:
    ValueError: if an axis is unknown or given twice, or a size is not a number.
  """
  found = re.findall(r'(?:^|,)(\w+):(-1|[0-9]{1,9})(?=,|$)', text or 'data:-1')
  if ','.join(map(':'.join, found)) != (text or 'data:-1') or not dict(found).keys() <= set(AXES) or len(
      dict(found)) < len(found):
    raise ValueError(f'mesh: expected sizes of {AXES}, such as data:4,model:2, got {text!r}.')
  return dict.fromkeys(AXES, 1) | {axis: int(size) for axis, size in found}


def without_members(mesh: Mesh) -> Mesh | None:
  """Returns the mesh with axis `member` folded into `data`, for programs without a population; None for one device."""
  if mesh.size == 1:
    return None
  return Mesh(mesh.devices.reshape(1, -1, mesh.shape['model']), AXES, axis_types=(AxisType.Auto,) * 3)


def on_mesh(mesh: Mesh | None, fn: Callable) -> Callable:
  """Wraps `fn` so that `jax.jit` traces it in the context of `mesh`; returns `fn` itself if `mesh` is None."""
  if mesh is None:
    return fn

  @functools.wraps(fn)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)

  return traced


def axis_size(axis: str) -> int:
  """Returns the size of an axis of the mesh in the tracing context; 1 without a mesh."""
  return _sizes().get(axis, 1)


def check_episodes(mesh: Mesh, num_episodes: int) -> None:
  """Checks that the episodes of an update divide evenly over the devices along `data`.

  Raises:
    ValueError: if they do not.
  """
  size = mesh.shape['data']
  if num_episodes % size:
    raise ValueError(f'mesh: an update takes {num_episodes} episodes, which data:{size} does not divide; take fewer '
                     'devices along data, more --episodes or fewer --minibatches.')


# Annotations inside a program.


def constrain(x: chex.Array, *axes: str | None) -> chex.Array:
  """Spreads the leading axes of `x` over the named mesh axes.

  An axis is not spread if its name is None, or if the mesh axis does not divide it.
  """
  if _on_one_device():
    return x
  sizes = _sizes()
  fitting = (axis if axis and size % sizes[axis] == 0 else None for size, axis in zip(x.shape, axes))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def episodes(tree: Any, axis: int = 0) -> Any:
  """Spreads arrays over `data` along `axis`, their axis of episodes."""
  return jax.tree.map(lambda x: constrain(x, *(None,) * axis, 'data'), tree)


def whole(tree: Any) -> Any:
  """Replicates arrays on every device, so that every host can read them."""
  return jax.tree.map(constrain, tree)


def unpartitioned(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[None, ...]:
  """Spreads no axis over `model`: the `Partition` of a model without tensor parallelism."""
  del path
  return (None,) * len(shape)


def gathered(params: Any, partition: Partition = unpartitioned, dtype: str = 'float32',
             in_dtype: Callable[[tuple[str, ...]], bool] = lambda path: False,
             left: Callable[[tuple[str, ...]], bool] = lambda path: False) -> Any:
  """Gathers parameters over `data` for a pass; they stay spread over `model`.

  Gradients are reduced and scattered back to the sharding at rest.

  Args:
    params: the parameters.
    partition: the model's `Partition`.
    dtype: type to which parameters are cast before the transfer. Keep float32 for parameters that are differentiated:
      the sum of their gradients over devices would be rounded.
    in_dtype: path -> whether a parameter is cast to `dtype`.
    left: path -> whether a parameter keeps its sharding at rest.
  """
  if _on_one_device():
    return params
  sizes = _sizes()

  def one(path, x):
    names = path_names(path)
    x = x.astype(dtype) if in_dtype(names) else x
    return x if left(names) else _spread(x, _spec(names, x.shape, partition, sizes, over_data=False),
                                         _spec(names, x.shape, partition, sizes, over_data=True))

  return jax.tree_util.tree_map_with_path(one, params)


def at_rest(tree: Any, partition: Partition) -> Any:
  """Spreads parameters, or a PyTree that contains them such as an optimizer state, over all devices."""
  if _on_one_device():
    return tree
  sizes = _sizes()
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(
          x, _spec(path_names(path), x.shape, partition, sizes, over_data=True)), tree)


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
  """Returns the names along a `jax.tree_util` path: dict keys, record fields and list indices."""
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def own_tokens_mean(fn: Callable, spread: Any, shared: Any, counts: chex.Array) -> Any:
  """Computes `fn(spread, shared)`, means over episodes, with `shard_map`: each device handles its own episodes.

  Use it for functions that the compiler cannot partition, such as kernels and loops over tokens.

  Args:
    fn: (spread, shared) -> PyTree of float32 means over the episodes.
    spread: arrays `[B, ...]`, spread over devices by episode.
    shared: arrays that every device needs whole; gradients flow into them.
    counts: float32 `[B]` what each episode counts in these means, such as its number of tokens.
  """
  if _on_one_device():
    return fn(spread, shared)
  axes = _token_axes(counts.shape[0])

  def local(spread, shared, counts):
    count = jnp.sum(counts)
    share = count / jnp.maximum(jax.lax.psum(count, axes), 1.0)
    return jax.tree.map(lambda x: jax.lax.psum(share * x, axes), fn(spread, shared))

  own, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(local, in_specs=(own, whole, own), out_specs=whole)(spread, shared, counts)


def own_tokens(fn: Callable, spread: Any, shared: Any) -> Any:
  """Like `own_tokens_mean`, for a function that returns arrays `[B, ...]`."""
  if _on_one_device():
    return fn(spread, shared)
  own = PartitionSpec(_token_axes(jax.tree.leaves(spread)[0].shape[0]))
  return jax.shard_map(fn, in_specs=(own, PartitionSpec()), out_specs=own)(spread, shared)


# Shardings of concrete arrays.


def shardings(tree: Any, mesh: Mesh, partition: Partition, members: bool = False) -> Any:
  """Returns the sharding at rest of each array of a PyTree that contains parameters.

  Args:
    tree: arrays or their shapes.
    mesh: the mesh.
    partition: the model's `Partition`.
    members: whether each array has a leading axis of members, which is spread over `member`.

  Returns:
    A PyTree of `NamedSharding`.
  """
  sizes = dict(mesh.shape)
  first = ('member',) if members else ()

  def of(path, x):
    own = _spec(path_names(path), x.shape[len(first):], partition, sizes, over_data=True)
    return NamedSharding(mesh, _normal((*first, *own), sizes))

  return jax.tree_util.tree_map_with_path(of, tree)


def put(tree: Any, places: Any) -> Any:
  """Moves arrays to `places`, one sharding or a PyTree of shardings; host arrays must be equal on all hosts.

  Like `jax.device_put`, which on several hosts refuses typed keys and arrays that already have a sharding.
  """
  places = jax.tree.map(lambda _: places, tree) if isinstance(places, jax.sharding.Sharding) else places

  def one(x, place):
    if place.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
      return jax.device_put(x, place)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = one(jax.random.key_data(x), NamedSharding(place.mesh, place.spec))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  return jax.tree.map(one, tree, places)


def place(tree: Any, mesh: Mesh | None, partition: Partition) -> Any:
  """Places host parameters on a mesh by `shardings`, or on the default device without a mesh.

  The parameters must be equal on all hosts.
  """
  return jax.device_put(tree) if mesh is None else put(tree, shardings(tree, mesh, partition))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """Replicates host arrays on every device of a mesh; returns them unchanged without a mesh.

  The arrays must be equal on all hosts.
  """
  return tree if mesh is None else put(tree, NamedSharding(mesh, PartitionSpec()))


def bound(tree: Any) -> Any:
  """Commits arrays to their current devices; leaves tracers unchanged.

  jit compiles once for uncommitted arguments, such as fresh arrays, and once more for committed ones.
  """
  return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else jax.device_put(x, x.sharding), tree)


def shapes(tree: Any, places: Any) -> Any:
  """Returns the `ShapeDtypeStruct` of each array with its sharding, for compilation ahead of time.

  `places` is one sharding or a PyTree of shardings.
  """
  places = jax.tree.map(lambda _: places, tree) if isinstance(places, jax.sharding.Sharding) else places
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _sizes() -> dict[str, int]:
  return dict(jax.sharding.get_abstract_mesh().shape)


def _on_one_device() -> bool:
  """Returns whether the context has no mesh, or a mesh with one device along `data` and `model`."""
  return axis_size('data') == axis_size('model') == 1


def _token_axes(num_episodes):
  """Returns the mesh axes over which episodes are spread: `data`, then `model`, as far as their product divides B."""
  axes: tuple[str, ...] = ()
  for axis in ('data', 'model'):
    if axis_size(axis) > 1 and num_episodes % math.prod(map(axis_size, (*axes, axis))) == 0:
      axes += (axis,)
  return axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(x, spec, of_gradient):
  """Constrains `x` to the sharding `spec` and its gradient to `of_gradient`."""
  del of_gradient
  return jax.lax.with_sharding_constraint(x, spec)


_spread.defvjp(lambda x, spec, of_gradient: (jax.lax.with_sharding_constraint(x, spec), None),
               lambda spec, of_gradient, _, grad: (jax.lax.with_sharding_constraint(grad, of_gradient),))


def _spec(names, shape, partition, sizes, over_data) -> PartitionSpec:
  """Returns the sharding of one parameter.

  The partition names the axis that is spread over `model`. With `over_data`, the largest axis that is left and divides
  evenly is spread over `data`, or over both mesh axes if no axis is spread over `model`. An axis marked `whole` is
  never spread.
  """
  wanted = tuple(partition(names, shape))
  axes: list[Any] = ['model' if axis == 'model' and size % sizes['model'] == 0 else None
                     for axis, size in zip(wanted, shape, strict=True)]
  over = ('data',) if 'model' in axes else ('data', 'model')
  free = (i for i in range(len(shape)) if axes[i] is None and wanted[i] != 'whole')
  for axis in sorted(free, key=lambda i: -shape[i]):
    if over_data and shape[axis] % math.prod(sizes[name] for name in over) == 0:
      axes[axis] = over
      break
  return _normal(axes, sizes)


def _normal(axes, sizes) -> PartitionSpec:
  """Returns the canonical form of a sharding: without mesh axes of size 1, as compiled programs report it.

  In this form the shardings of a program's arguments and results compare equal.
  """
  kept = []
  for axis in axes:
    names = tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if sizes.get(name, 1) > 1)
    kept.append(names if len(names) > 1 else names[0] if names else None)
  while kept and kept[-1] is None:
    kept.pop()
  return PartitionSpec(*kept)
