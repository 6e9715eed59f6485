"""Episodes a few at a time, in arrays no longer than they are.

On a CPU a pass over a few thousand tokens stays in the caches and in memory that is already mapped; over a whole
minibatch every array is written to fresh memory, and the products wait for it. Accelerators, and several devices, take
a minibatch whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.decoding import any_of_all
from critkl_jax.records import Rollout

_CPU_TOKENS = 2048  # in a slice


def pick_size(num_episodes: int, num_tokens: int) -> int:
  """Returns how many of `num_episodes` episodes of `num_tokens` tokens to take at a time, a divisor of their number;
  all of them while `jax_debug_nans` is on, which cannot look into loops."""
  if jax.default_backend() != 'cpu' or sharding.axis_size('data') > 1 or jax.config.jax_debug_nans:
    return num_episodes
  most = max(_CPU_TOKENS // num_tokens, 1)
  return max(n for n in range(1, min(most, num_episodes) + 1) if num_episodes % n == 0)


def by_length(mask: chex.Array) -> chex.Array:
  """Returns the permutation `[B]` that brings episodes with masks `[B, T]` into the order of their lengths."""
  return jnp.argsort(_lengths(mask))


def _lengths(mask):
  """Returns up to where `[B]` episodes with masks `[B, T]` reach, holes included."""
  return jnp.max(mask.astype(jnp.int32) * jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)[None], 1)


def split(tree: Any, size: int) -> Any:
  """Returns arrays `[B, ...]` as `[B / size, size, ...]`."""
  return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def at_length(fn: Callable[[int], Any], lengths: Sequence[int], mask: chex.Array) -> Any:
  """Calls `fn(length)` with the smallest of the lengths, in rising order, that holds the episodes with masks `[B, T]`.

  Every length is compiled, one is executed; under `vmap` the same one for all members. Results have one shape.
  """
  if jax.config.jax_debug_nans:  # which cannot look into branches
    return fn(lengths[-1])
  branches = [lambda n=n: fn(n) for n in lengths]
  longest = jnp.max(_lengths(mask))
  return jax.lax.switch(sum(any_of_all(longest > n).astype(jnp.int32) for n in lengths[:-1]), branches)


def read(fn: Callable[[Rollout], Any], rollout: Rollout, lengths: Sequence[int], size: int) -> Any:
  """Returns what `fn` says at each action of a rollout, `size` episodes at a time.

  Args:
    fn: rollout of `size` episodes cut to n tokens -> PyTree of arrays `[size, n, ...]`.
    rollout: B episodes of T tokens.
    lengths: lengths below T, in rising order, at which episodes that fit are read.
    size: a divisor of B.

  Returns:
    The PyTree of arrays `[B, T, ...]`, in the order of the episodes; zeros beyond the length at which one was read.
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


def mean_over_tokens(fn: Callable[[Any], Any], tree: Any, mask: chex.Array, size: int) -> Any:
  """Returns what `fn` returns for episodes `tree`, arrays `[B, ...]`, from slices of `size` episodes.

  Args:
    fn: slice -> PyTree of means over its tokens, where `mask` is true.
    tree: the episodes.
    mask: bool `[B, T]`.
    size: a divisor of B.

  Returns:
    The means over all tokens: those of the slices, weighted by their numbers of tokens.
  """
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

  def of_slice(part, part_mask):
    weight = jnp.sum(part_mask, dtype=jnp.float32) / count
    return jax.tree.map(lambda x: weight * x, fn(part))

  if size == mask.shape[0]:
    return fn(tree)
  parts = split((tree, mask), size)
  first = jax.eval_shape(of_slice, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of_slice(*part)), None), zeros, parts)[0]


def cut(rollout: Rollout, length: int) -> Rollout:
  """Returns a rollout without what stands beyond `length` tokens of the responses."""
  names = ('actions', 'mask', 'log_probs', 'values')
  return rollout.replace(**{name: getattr(rollout, name)[:, :length] for name in names})
