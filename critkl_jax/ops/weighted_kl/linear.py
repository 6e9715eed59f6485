"""Custom gradient of the operation on hidden states, shared by the implementations in `FORWARD`."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import chunked
from critkl_jax.ops.weighted_kl.operands import Operands, Settings, Side, varying_axes
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, Sums, finish, merge


class KernelPlan(NamedTuple):
  """Static choice of the implementation and of its tiles.

  Attributes:
    implementation: a key of `FORWARD` and `BACKWARD`, or another name in `api.LINEAR_IMPLEMENTATIONS`.
    settings: static settings of the operation.
    tile: the tile of `chunked` in vocabulary mode.
    held: the tokens that `chunked` holds in token mode; None if they would be too few to be faster.
    length: the size of the last axis of the tokens.
    steps: the number of steps of `partitioned`.
  """

  implementation: str
  settings: Settings
  tile: chunked.Tile
  held: chunked.Held | None
  length: int = 1
  steps: int = 1


# Kernels are imported on first use: importing Pallas takes a third of a second, and its Triton backend is deprecated.


def _pallas_tpu():
  from critkl_jax.ops.weighted_kl import pallas_tpu
  return pallas_tpu


def _pallas_gpu():
  try:
    from critkl_jax.ops.weighted_kl import pallas_gpu
  except ImportError as error:
    raise ValueError(f"implementation: 'pallas_gpu' needs Pallas's Triton backend, which jax {jax.__version__} does "
                     "not have; take 'chunked', or an older jax.") from error
  return pallas_gpu


# Implementation -> function of a KernelPlan. It returns the forward pass `operands -> Sums`, or the backward pass
# `(operands, row, cotangents) -> Side` with the gradients.
FORWARD = {
    'chunked': lambda plan: functools.partial(chunked.forward, settings=plan.settings, tile=plan.tile),
    'pallas_tpu': lambda plan: functools.partial(_pallas_tpu().forward, settings=plan.settings),
    'pallas_gpu': lambda plan: functools.partial(_pallas_gpu().forward, settings=plan.settings),
}
BACKWARD = {
    'chunked': lambda plan: functools.partial(chunked.backward, settings=plan.settings, tile=plan.tile),
    'pallas_tpu': lambda plan: functools.partial(_pallas_tpu().backward, settings=plan.settings),
    'pallas_gpu': lambda plan: functools.partial(_pallas_gpu().backward, settings=plan.settings),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_of(plan: KernelPlan, policy: Side, operands: Operands) -> Row:
  """Computes the statistics of each token; gradients flow to `policy`, which replaces `operands.policy`."""
  sums = FORWARD[plan.implementation](plan)(operands.replace(policy=policy))
  return finish(_of_all_parts(sums, plan.settings.axis_name))


def _row_forward(plan, policy, operands):
  row = row_of(plan, policy, operands)
  return row, (policy, operands, row)


def _row_backward(plan, saved, gradients):
  policy, operands, row = saved
  grads = BACKWARD[plan.implementation](plan)(
      operands.replace(policy=policy), row=row, cotangents=Cotangents.of(gradients))
  return _like(grads, policy), None


row_of.defvjp(_row_forward, _row_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def accumulated(plan: KernelPlan, row_loss: Callable[..., chex.Array], policy: Side, operands: Operands,
                extra: Sequence[chex.Array], closed_over: Sequence[chex.Array]) -> tuple[chex.Array, Row]:
  """Computes the summed `row_loss` of all tokens and the statistics of each token.

  Under differentiation the forward pass computes the gradient of the loss too.
  """
  loss, row, _ = _accumulate(plan, row_loss, policy, operands, extra, closed_over, with_grads=False)
  return loss, row


def _accumulate(plan, row_loss, policy, operands, extra, closed_over, with_grads):
  return chunked.accumulate(
      operands.replace(policy=policy), plan.settings, plan.held,
      lambda row, *some: row_loss(row, *some, *closed_over), extra, with_grads)


def _accumulated_forward(plan, row_loss, policy, *others):
  loss, row, grads = _accumulate(plan, row_loss, policy, *others, with_grads=True)
  return (loss, row), (policy, grads)


def _accumulated_backward(plan, row_loss, saved, gradients):
  del plan, row_loss
  policy, grads = saved
  return _like(jax.tree.map(lambda x: x.astype(jnp.float32) * gradients[0], grads), policy), None, None, None


accumulated.defvjp(_accumulated_forward, _accumulated_backward)


def _like(grads, policy):
  """Casts gradients to the dtypes of the arrays, summed in `shard_map` over the devices that share an array."""

  def one(grad, x):
    shared = tuple(varying_axes(grad) - varying_axes(x))
    return (jax.lax.psum(grad, shared) if shared else grad).astype(x.dtype)

  return jax.tree.map(one, grads, policy)


def _of_all_parts(sums: Sums, axis_name: str | None) -> Sums:
  """Combines the sums over the vocabulary of all devices of a mesh axis; the result is equal on all."""
  if axis_name is None:
    return sums
  count, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  # Gathers by a psum of zero-padded arrays: unlike all_gather, shard_map knows its result to be equal on all devices.
  gathered = jax.tree.map(
      lambda x: jax.lax.psum(jnp.zeros((count, *x.shape), x.dtype).at[here].set(x), axis_name), sums)
  parts = [jax.tree.map(lambda x, i=i: x[i], gathered) for i in range(count)]
  return functools.reduce(merge, parts)
