"""Microbatching: runs a pass over slices of episodes, cut to their length.

On a CPU, the arrays of a pass over a few thousand tokens stay in the caches and in memory that is already mapped; a
pass over a whole minibatch writes every array to new memory, and matrix products wait for it. Accelerators and meshes
of several devices process a minibatch as one slice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.records import Rollout
from critkl_jax.sampling.decoding import any_across_vmap

_CPU_TOKENS = 2048  # in a slice


def pick_size(num_episodes: int, num_tokens: int) -> int:
  """Picks the number of episodes in a slice, a divisor of `num_episodes`, for episodes of `num_tokens` tokens.

  A slice has all episodes on accelerators, if devices share the episodes, and under `jax_debug_nans`, which cannot look
  into loops.
  """
  if jax.default_backend() != 'cpu' or sharding.axis_size('data') > 1 or jax.config.jax_debug_nans:
    return num_episodes
  most = max(_CPU_TOKENS // num_tokens, 1)
  return max(n for n in range(1, min(most, num_episodes) + 1) if num_episodes % n == 0)


def by_length(mask: chex.Array) -> chex.Array:
  """Returns the permutation `[B]` that sorts episodes with masks `[B, T]` by length."""
  return jnp.argsort(_lengths(mask))


def _lengths(mask):
  """Returns the lengths `[B]` of episodes with masks `[B, T]`, up to the last true entry."""
  return jnp.max(mask.astype(jnp.int32) * jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)[None], 1)


def split(tree: Any, size: int) -> Any:
  """Reshapes arrays `[B, ...]` to `[B / size, size, ...]`."""
  return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def at_length(fn: Callable[[int], Any], lengths: Sequence[int], mask: chex.Array) -> Any:
  """Calls `fn(length)` with the smallest of the ascending `lengths` that fits all episodes with masks `[B, T]`.

  Every length is compiled, and one is executed; under `vmap` it is the same for all members. Results must have the same
  shape for all lengths.
  """
  if jax.config.jax_debug_nans:  # it cannot look into branches
    return fn(lengths[-1])
  branches = [lambda n=n: fn(n) for n in lengths]
  longest = jnp.max(_lengths(mask))
  return jax.lax.switch(sum(any_across_vmap(longest > n).astype(jnp.int32) for n in lengths[:-1]), branches)


def read(fn: Callable[[Rollout], Any], rollout: Rollout, lengths: Sequence[int], size: int) -> Any:
  """Computes arrays per action of a rollout with `fn`, in slices of `size` episodes of similar length.

  Args:
    fn: rollout of `size` episodes cut to n tokens -> PyTree of arrays `[size, n, ...]`.
    rollout: B episodes of T tokens.
    lengths: ascending lengths below T; a slice is cut to the first that fits.
    size: a divisor of B.

  Returns:
    The PyTree of arrays `[B, T, ...]`, in the order of the episodes; zeros beyond the length of each slice.
  """
  num_tokens = rollout.actions.shape[1]

  def read_slice(part):
    def at(length):
      return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, num_tokens - length)] + [(0, 0)] * (x.ndim - 2)),
                          fn(cut(part, length)))

    return at_length(at, (*lengths, num_tokens), part.mask)

  order = by_length(rollout.mask)
  parts = sharding.episodes(split(jax.tree.map(lambda x: x[order], rollout), size), axis=1)
  back = jnp.argsort(order)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[back], jax.lax.map(read_slice, parts))


def weighted_mean(fn: Callable[[Any], Any], tree: Any, counts: chex.Array, size: int) -> Any:
  """Averages the results of `fn` over slices of `size` episodes, weighted by the sums of their counts.

  Args:
    fn: slice -> PyTree of means over the slice.
    tree: the episodes, a PyTree of arrays `[B, ...]`.
    counts: float32 `[B]` what each episode counts in these means, such as its number of tokens.
    size: a divisor of B.

  Returns:
    The means over all episodes.
  """
  count = jnp.maximum(jnp.sum(counts), 1.0)

  def of_slice(part, part_counts):
    weight = jnp.sum(part_counts) / count
    return jax.tree.map(lambda x: weight * x, fn(part))

  if size == counts.shape[0]:
    return fn(tree)
  parts = split((tree, counts), size)
  first = jax.eval_shape(of_slice, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of_slice(*part)), None), zeros, parts)[0]


def cut(rollout: Rollout, length: int) -> Rollout:
  """Cuts the responses of a rollout to `length` tokens."""
  names = ('actions', 'mask', 'log_probs', 'values')
  return rollout.replace(**{name: getattr(rollout, name)[:, :length] for name in names})
