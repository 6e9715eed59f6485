"""Arrays spread (sharded) over the devices of a mesh: reads their sharding, and calls a function on each device's part.

JAX has three kinds of mesh axes. `Explicit`: the sharding is part of an array's type and known while a program is
traced. `Auto`: the compiler finds the sharding later. `Manual`: inside `shard_map`, where each device has its own part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from critkl_jax.ops.weighted_kl.operands import varying_axes

Axes = str | tuple[str, ...] | None


def explicit_axes(x: chex.Array) -> tuple[Axes, ...]:
  """Returns, for each axis of an array, the Explicit mesh axes over which it is spread; None if it is not spread."""
  sharding = getattr(jax.typeof(x), 'sharding', None)
  if sharding is None or sharding.mesh.empty:
    return (None,) * x.ndim
  kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types))
  found = []
  for axes in (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))):
    names = tuple(name for name in ((axes,) if isinstance(axes, str) else axes or ())
                  if kinds.get(name) == AxisType.Explicit)
    found.append(names if len(names) > 1 else names[0] if names else None)
  return tuple(found)


def is_spread(*arrays: chex.Array | None) -> bool:
  """Returns whether any of the arrays is spread over Explicit mesh axes."""
  return any(any(explicit_axes(x)) for x in arrays if x is not None)


def refuse_axis_name(axis_name: Axes) -> None:
  """Raises ValueError if `axis_name` is given for arrays on Explicit axes, whose types already name the axes."""
  if axis_name is not None:
    raise ValueError('axis_name: is for arrays inside shard_map; outside, the types of the arrays name the axes, so '
                     'leave it out.')


def check_axis_name(axis_name: Axes, embedding: chex.Array) -> None:
  """Raises ValueError unless `embedding`, inside `shard_map`, is spread over the axes `axis_name`."""
  names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
  if not names <= varying_axes(embedding):
    raise ValueError(f'axis_name: expected an embedding spread over {axis_name!r}, in a shard_map that checks it '
                     '(check_vma=True).')


def replicated(x: chex.Array) -> chex.Array:
  """Gathers, on every device, an array that is spread over Explicit mesh axes; returns any other array unchanged."""
  return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())) if is_spread(x) else x


def compiler_partitions() -> bool:
  """Returns whether the compiler may have to partition the program that is traced now.

  With a mesh in the context: whether one of its axes of type Auto has more than one device. Inside `shard_map`, the
  mapped axes are Manual and do not count. Without a mesh: whether JAX has more than one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    return any(kind == AxisType.Auto and mesh.shape[name] > 1 for name, kind in zip(mesh.axis_names, mesh.axis_types))
  return jax.device_count() > 1


def on_each_device(fn: Callable[..., Any], of_tokens: dict[str, chex.Array | None],
                   tables: dict[str, chex.Array | None], token_rank: int, summed: bool = False) -> Any:
  """Calls a function on each device's part of per-token arrays and vocabulary tables, with `shard_map`.

  Args:
    fn: (of_tokens, tables, axis_name) -> results, called with a device's own part of each array. `axis_name` names the
      mesh axes over which the vocabulary is spread; None if it is not. Results are arrays whose first axes are those of
      the tokens.
    of_tokens: argument name -> array `[*tokens, ...]` or None, such as `[B, T, D]`. Only the axes of the tokens may be
      spread, in the same way in all arrays.
    tables: argument name -> array `[V, ...]` or None. Only the first axis may be spread, in the same way in all arrays.
    token_rank: the number of axes of the tokens, 2 for `[B, T]`.
    summed: whether `fn` returns `(sum over tokens [], results)` instead of results.

  Returns:
    The results, spread like the tokens. With `summed`, `(sum, results)`, the sum taken over all tokens of all devices.

  Raises:
    ValueError: if the arrays of one dict are not spread in the same way, or an axis is spread that must not be.
  """
  token_axes = _common_axes(of_tokens, token_rank)
  (vocab_axes,) = _common_axes(tables, 1)
  over = tuple(name for axes in token_axes for name in ((axes,) if isinstance(axes, str) else axes or ()))

  def local(of_tokens, tables):
    found = fn(of_tokens, tables, vocab_axes)
    if not summed:
      return found
    return (jax.lax.psum(found[0], over) if over else found[0]), found[1]

  of_each = PartitionSpec(*token_axes)
  mesh = next(jax.typeof(x).sharding.mesh for x in (*of_tokens.values(), *tables.values()) if is_spread(x))
  return jax.shard_map(local, mesh=mesh, in_specs=_specs((of_tokens, tables)),
                       out_specs=(PartitionSpec(), of_each) if summed else of_each)(of_tokens, tables)


def _specs(tree):
  return jax.tree.map(lambda x: PartitionSpec(*explicit_axes(x)), tree)


def _common_axes(arrays: dict[str, chex.Array | None], rank: int) -> Sequence[Axes]:
  """Returns the mesh axes over which the first `rank` axes of all arrays are spread."""
  first, common = '', None
  for name, x in arrays.items():
    if x is None:
      continue
    own = explicit_axes(x)
    if any(own[rank:]):
      raise ValueError(f'{name}: its axes after the first {rank} must not be spread over devices, got {own}; call '
                       'jax.sharding.reshard first.')
    if common is None:
      first, common = name, own[:rank]
    elif own[:rank] != common:
      raise ValueError(f'{name}: is spread over {own[:rank]}, but {first} over {common}; call jax.sharding.reshard '
                       'first.')
  return common
