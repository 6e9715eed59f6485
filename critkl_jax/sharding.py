"""Where arrays lie on a mesh of devices, with axes `member`, `data` and `model`.

Members of a population are spread over `member`, episodes over `data`, and the products of the model over `model`:
heads and hidden units (Megatron-LM, arXiv 1909.08053). At rest parameters and optimizer state are spread over `data`
and `model` together (ZeRO, arXiv 1910.02054), and gathered over `data` when a pass begins. All of it is annotation: the
compiler makes the collectives, and on no mesh, or one device, nothing changes.

`on_mesh` gives a program the mesh; the functions below find it in the context.
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
# The axis of a parameter that is spread over `model` in a pass, by the end of its path; others are whole there. So is
# `c_attn`: queries, keys and values stand side by side in its columns, and the model takes its heads out of each.
_MODEL_AXIS = {('mlp', 'c_fc', 'kernel'): 1, ('mlp', 'c_fc', 'bias'): 0, ('mlp', 'c_proj', 'kernel'): 0,
               ('attn', 'c_proj', 'kernel'): 0}


# Meshes.


def make_mesh(text: str = '', devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh from text such as `data:4,model:2`.

  Args:
    text: sizes of axes; those not named have size 1, and `-1` takes what devices are left. Empty for all devices along
      `data`.
    devices: the devices; all of all hosts if None. Sizes that multiply to fewer take the first ones.

  Raises:
    ValueError: if an axis is unknown or given twice, the sizes do not fit the number of devices, or a host would have
      none of them.
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
  """Returns the size of each axis that text names, `-1` for what devices are left; raises as `make_mesh` does, and asks
  for no device."""
  found = re.findall(r'(?:^|,)(\w+):(-1|[0-9]{1,9})(?=,|$)', text or 'data:-1')
  if ','.join(map(':'.join, found)) != (text or 'data:-1') or not dict(found).keys() <= set(AXES) or len(
      dict(found)) < len(found):
    raise ValueError(f'mesh: expected sizes of {AXES}, such as data:4,model:2, got {text!r}.')
  return dict.fromkeys(AXES, 1) | {axis: int(size) for axis, size in found}


def without_members(mesh: Mesh) -> Mesh | None:
  """Returns the mesh on which all devices serve one member, those of `member` along `data`; None for one device."""
  if mesh.size == 1:
    return None
  return Mesh(mesh.devices.reshape(1, -1, mesh.shape['model']), AXES, axis_types=(AxisType.Auto,) * 3)


def on_mesh(mesh: Mesh | None, fn: Callable) -> Callable:
  """Returns `fn`, to be jitted, as it is traced with a mesh as its context; `fn` itself if there is none."""
  if mesh is None:
    return fn

  @functools.wraps(fn)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)

  return traced


def axis_size(axis: str) -> int:
  """Returns the size of an axis of the mesh in whose context a program is traced; 1 on no mesh."""
  return _sizes().get(axis, 1)


def check_episodes(mesh: Mesh, num_episodes: int) -> None:
  """Checks that every device along `data` gets equally many of the episodes of an update.

  Raises:
    ValueError: if not.
  """
  size = mesh.shape['data']
  if num_episodes % size:
    raise ValueError(f'mesh: an update takes {num_episodes} episodes, which data:{size} does not divide; take fewer '
                     'devices along data, more --episodes or fewer --minibatches.')


# Annotations inside a program.


def constrain(x: chex.Array, *axes: str | None) -> chex.Array:
  """Returns `x` with its leading axes spread over axes of the mesh (None: whole), those that divide its shape."""
  if _on_one_device():
    return x
  sizes = _sizes()
  fitting = (axis if axis and size % sizes[axis] == 0 else None for size, axis in zip(x.shape, axes))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def episodes(tree: Any, axis: int = 0) -> Any:
  """Returns arrays `[B, ...]`, or with B at another axis, with episodes spread over `data`."""
  return jax.tree.map(lambda x: constrain(x, *(None,) * axis, 'data'), tree)


def whole(tree: Any) -> Any:
  """Returns arrays that every device holds all of, so that every host can read them."""
  return jax.tree.map(constrain, tree)


def gathered(params: Any, dtype: str = 'float32', blocks: bool = True) -> Any:
  """Returns parameters as a pass takes them: whole over `data`, spread over `model`.

  Their gradient is summed into the shares that devices hold at rest.

  Args:
    params: the parameters.
    dtype: type in which matrices of the blocks will be multiplied; they are brought to it before they travel. Not for
      parameters whose gradient is taken: its sum over devices would be rounded.
    blocks: whether those of the blocks (`h_0`, `h_1`, ..., or `h` with a leading axis) are gathered too.
  """
  if _on_one_device():
    return params
  sizes = _sizes()

  def one(path, x):
    names = _names(path)
    in_block = names[:1] == ('h',) or ''.join(names[:1]).startswith('h_')
    x = x.astype(dtype) if in_block and names[-1] == 'kernel' else x
    return _gather(x, path, sizes) if blocks or not in_block else x

  return jax.tree_util.tree_map_with_path(one, params)


def gathered_block(params: Any) -> Any:
  """Returns the parameters of one block as `gathered` does."""
  if _on_one_device():
    return params
  sizes = _sizes()
  return jax.tree_util.tree_map_with_path(lambda path, x: _gather(x, path, sizes), params)


def at_rest(tree: Any) -> Any:
  """Returns parameters, or a PyTree with parameters in it such as an optimizer's state, spread over all devices."""
  return _placed(tree, over_data=True)


def own_tokens_mean(fn: Callable, spread: Any, shared: Any, mask: chex.Array) -> Any:
  """Returns `fn(spread, shared)`, means over tokens, computed by each device from its own episodes.

  For functions that the compiler cannot take apart, such as kernels and loops over tokens.

  Args:
    fn: -> PyTree of float32 means over the tokens where the mask is true.
    spread: arrays `[B, ...]`.
    shared: arrays that every device needs whole; gradients flow into them.
    mask: bool `[B, T]`.
  """
  if _on_one_device():
    return fn(spread, shared)
  axes = _token_axes(mask.shape[0])

  def local(spread, shared, mask):
    num_tokens = jnp.sum(mask, dtype=jnp.float32)
    share = num_tokens / jnp.maximum(jax.lax.psum(num_tokens, axes), 1.0)
    return jax.tree.map(lambda x: jax.lax.psum(share * x, axes), fn(spread, shared))

  own, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(local, in_specs=(own, whole, own), out_specs=whole)(spread, shared, mask)


def own_tokens(fn: Callable, spread: Any, shared: Any) -> Any:
  """Returns `fn(spread, shared)`, arrays `[B, ...]`, computed by each device from its own episodes; see
  `own_tokens_mean`."""
  if _on_one_device():
    return fn(spread, shared)
  own = PartitionSpec(_token_axes(jax.tree.leaves(spread)[0].shape[0]))
  return jax.shard_map(fn, in_specs=(own, PartitionSpec()), out_specs=own)(spread, shared)


# Places outside of programs.


def shardings(tree: Any, mesh: Mesh, members: bool = False) -> Any:
  """Returns where the arrays of a PyTree with parameters in it lie at rest.

  Args:
    tree: arrays or their shapes.
    mesh: the mesh.
    members: whether each array has a leading axis of members, which is spread over `member`.

  Returns:
    A PyTree of `NamedSharding`.
  """
  sizes = dict(mesh.shape)
  first = ('member',) if members else ()

  def of(path, x):
    return NamedSharding(mesh, _normal((*first, *_spec(path, x.shape[len(first):], sizes, over_data=True)), sizes))

  return jax.tree_util.tree_map_with_path(of, tree)


def put(tree: Any, places: Any) -> Any:
  """Returns arrays where `places` says, one sharding or a PyTree of them; those of one host are the same on all.

  `jax.device_put` does the same on one host; on several it refuses typed keys, and arrays that once had a place.
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


def place(tree: Any, mesh: Mesh | None) -> Any:
  """Returns parameters of this host, the same on all hosts, spread over a mesh as `shardings` says; on the default
  device if there is none."""
  return jax.device_put(tree) if mesh is None else put(tree, shardings(tree, mesh))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """Returns arrays of this host, the same on all hosts, as arrays that every device of the mesh holds all of; the same
  arrays if there is no mesh."""
  return tree if mesh is None else put(tree, NamedSharding(mesh, PartitionSpec()))


def bound(tree: Any) -> Any:
  """Binds arrays to the devices on which they lie: a fresh array is free to move, and jit compiles once for free and
  once for bound arguments. Arrays of a program that is being traced stay as they are."""
  return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else jax.device_put(x, x.sharding), tree)


def shapes(tree: Any, places: Any) -> Any:
  """Returns shapes that lie somewhere, to compile for: `places` is one sharding, or a PyTree of them."""
  places = jax.tree.map(lambda _: places, tree) if isinstance(places, jax.sharding.Sharding) else places
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _sizes() -> dict[str, int]:
  return dict(jax.sharding.get_abstract_mesh().shape)


def _on_one_device() -> bool:
  """Returns whether there is no mesh in the context, or nothing to spread a model and its episodes over."""
  return axis_size('data') == axis_size('model') == 1


def _token_axes(num_episodes):
  """Returns the axes of the mesh over which so many episodes can be spread, `data` before `model`."""
  axes: tuple[str, ...] = ()
  for axis in ('data', 'model'):
    if axis_size(axis) > 1 and num_episodes % math.prod(map(axis_size, (*axes, axis))) == 0:
      axes += (axis,)
  return axes


def _placed(tree, over_data):
  if _on_one_device():
    return tree
  sizes = _sizes()
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(x, _spec(path, x.shape, sizes, over_data)), tree)


def _gather(x, path, sizes):
  return _spread(x, _spec(path, x.shape, sizes, over_data=False), _spec(path, x.shape, sizes, over_data=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(x, spec, of_gradient):
  """Returns `x` spread in one way, its gradient in another."""
  del of_gradient
  return jax.lax.with_sharding_constraint(x, spec)


_spread.defvjp(lambda x, spec, of_gradient: (jax.lax.with_sharding_constraint(x, spec), None),
               lambda spec, of_gradient, _, grad: (jax.lax.with_sharding_constraint(grad, of_gradient),))


def _spec(path, shape, sizes, over_data) -> PartitionSpec:
  """Returns the spread of one parameter: an axis over `model` by its name, the largest that is left over `data`, or
  over both where the name says nothing."""
  names = _names(path)
  if names[:1] == ('h',):
    return PartitionSpec(None, *_spec(path[1:], shape[1:], sizes, over_data))
  axes: list[Any] = [None] * len(shape)
  at = _MODEL_AXIS.get(names[-3:])
  if at is not None and shape[at] % sizes['model'] == 0:
    axes[at] = 'model'
  over = ('data',) if 'model' in axes else ('data', 'model')
  for axis in sorted((i for i in range(len(shape)) if axes[i] is None), key=lambda i: -shape[i]):
    if over_data and shape[axis] % math.prod(sizes[name] for name in over) == 0:
      axes[axis] = over
      break
  return _normal(axes, sizes)


def _names(path) -> tuple[str, ...]:
  return tuple(str(getattr(entry, 'key', '')) for entry in path)


def _normal(axes, sizes) -> PartitionSpec:
  """Returns a spread as a compiled program names it, without axes of size 1, so that its results are taken for arrays
  placed like its arguments."""
  kept = []
  for axis in axes:
    names = tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if sizes.get(name, 1) > 1)
    kept.append(names if len(names) > 1 else names[0] if names else None)
  while kept and kept[-1] is None:
    kept.pop()
  return PartitionSpec(*kept)
