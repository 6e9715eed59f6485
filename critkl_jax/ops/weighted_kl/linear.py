"""The operation on hidden states with its gradient, whatever implementation takes the sums."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import chunked
from critkl_jax.ops.weighted_kl.operands import Operands, Settings, Side, varying_axes
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, Sums, finish, merge


class Plan(NamedTuple):
  """How the operation is carried out; static.

  Attributes:
    implementation: a key of `FORWARD` and `BACKWARD`.
    settings: what the arrays mean.
    tile: tokens and vocabulary that `chunked` holds at a time in vocabulary mode.
    held: the same in token mode; None if that mode is not worth its memory.
  """

  implementation: str
  settings: Settings
  tile: chunked.Tile
  held: chunked.Held | None


# Kernels are imported when they are asked for: Pallas takes a third of a second, and its Triton backend will go.


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


# Plan -> (operands) -> Sums, and -> (operands, row, cotangents) -> Side of gradients
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
def row_of(plan: Plan, policy: Side, operands: Operands) -> Row:
  """Returns what the hidden states say of each token; gradients go to `policy`, which replaces the operands' own."""
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
def accumulated(plan: Plan, row_loss: Callable[..., chex.Array], policy: Side, operands: Operands,
                extra: Sequence[chex.Array], closed_over: Sequence[chex.Array]) -> tuple[chex.Array, Row]:
  """Returns the summed `row_loss` of all tokens and what the hidden states say of each; the gradient of the loss is
  taken with it, where it is asked for."""
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
  """Returns gradients in the types of the arrays, summed over the devices that hold the same array in `shard_map`."""

  def one(grad, x):
    shared = tuple(varying_axes(grad) - varying_axes(x))
    return (jax.lax.psum(grad, shared) if shared else grad).astype(x.dtype)

  return jax.tree.map(one, grads, policy)


def _of_all_parts(sums: Sums, axis_name: str | None) -> Sums:
  """Returns the sums over the vocabulary of all devices of a mesh axis, the same on each."""
  if axis_name is None:
    return sums
  count, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  # A psum of arrays that are 0 elsewhere: unlike all_gather its result is known to be the same on all devices.
  gathered = jax.tree.map(
      lambda x: jax.lax.psum(jnp.zeros((count, *x.shape), x.dtype).at[here].set(x), axis_name), sums)
  parts = [jax.tree.map(lambda x, i=i: x[i], gathered) for i in range(count)]
  return functools.reduce(merge, parts)
