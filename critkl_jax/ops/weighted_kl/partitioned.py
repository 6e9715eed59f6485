"""The operation on arrays that the compiler partitions (mesh axes of type Auto): a part of the tokens at a time.

With n steps, each step takes every n-th token, so that each device computes with its own tokens. It computes whole
logits of these tokens, so that a spread vocabulary stays spread. Nothing of the vocabulary's size is gathered. The
backward pass computes the logits again, 12 R D V operations in all.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.logits import fused_row
from critkl_jax.ops.weighted_kl.operands import Operands, Settings, raw_logits
from critkl_jax.ops.weighted_kl.statistics import Row


def pick_steps(num_tokens: int, length: int, vocab_size: int, memory_budget: int) -> int:
  """Picks the number of steps: the smallest with which the logits of a step fit into memory, at most `length`.

  These are the float32 logits of policy and reference, spread over the memory budgets of all devices.

  Args:
    num_tokens: R.
    length: the size of the last axis of the tokens, T for `[B, T]`; each step takes a part of this axis.
    vocab_size: V.
    memory_budget: bytes on each device.
  """
  needed = -(-8 * num_tokens * vocab_size // (memory_budget * jax.device_count()))
  return max(min(needed, length), 1)


def row_of(operands: Operands, settings: Settings, steps: int, length: int) -> Row:
  """Computes the statistics of each token, float32 `[R, 1]` each; gradients flow to `operands.policy`.

  Args:
    operands: the arrays.
    settings: static settings; `axis_name` is None.
    steps: the number of steps.
    length: as in `pick_steps`.
  """

  @jax.checkpoint
  def of_some(hidden, ref_hidden, actions):
    some = operands.replace(policy=operands.policy.replace(hidden=hidden),
                            reference=operands.reference.replace(hidden=ref_hidden), actions=actions)
    return fused_row(settings.one_temperature, *raw_logits(some, settings), actions, operands.temperature,
                     operands.certainty_temperature)

  return in_steps(of_some, (operands.policy.hidden, operands.reference.hidden, operands.actions), steps, length)


def in_steps(fn: Callable[..., Any], arrays: tuple[chex.Array, ...], steps: int, length: int) -> Any:
  """Computes `fn(*arrays)` in steps. Of each group of `length` consecutive rows, row t belongs to step t mod steps.

  Args:
    fn: arrays `[n, ...]`, for any number n of rows -> PyTree of arrays `[n, 1]`.
    arrays: `[R, ...]`.
    steps: the number of steps.
    length: a divisor of R, such as T where R = B T.

  Returns:
    The results of `fn` for all rows in their order, `[R, 1]` each.
  """
  if steps <= 1:
    return fn(*arrays)
  in_step = -(-length // steps)

  def split(x):
    x = x.reshape(-1, length, *x.shape[1:])
    x = jnp.pad(x, [(0, 0), (0, in_step * steps - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(-1, in_step, steps, *x.shape[2:]), 2, 0).reshape(steps, -1, *x.shape[2:])

  def join(x):
    return jnp.moveaxis(x.reshape(steps, -1, in_step), 0, 2).reshape(-1, in_step * steps)[:, :length].reshape(-1, 1)

  return jax.tree.map(join, jax.lax.map(lambda part: fn(*part), tuple(map(split, arrays))))
