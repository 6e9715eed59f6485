"""The operation in Triton kernels, written in Pallas, for NVIDIA GPUs.

The forward pass is one kernel: a program takes a block of tokens and a share of the vocabulary, multiplies block by
block, and keeps only running sums. The backward pass loops over blocks of the vocabulary: a kernel computes their
logits again and writes the gradient `[R, block]` of the logits; two XLA products then give the gradients of hidden
states and embedding. This costs 12 R D V operations in all, and no `[R, V]` array exists.

Arrays may have any size: loads and stores are masked past their ends.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width.
"""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from critkl_jax.ops.weighted_kl.chunked import LANES, MEMORY_BUDGET
from critkl_jax.ops.weighted_kl.operands import (
    Operands,
    Settings,
    Side,
    add_rows,
    biased_and_capped,
    dot,
    scaled,
    spread_like,
    through_scaling,
)
from critkl_jax.ops.weighted_kl.statistics import (
    MINUS_INFINITY,
    Cotangents,
    Row,
    Sums,
    block_sums,
    logit_gradients,
    merge,
)

TOKENS, COLUMNS = 64, 64  # shape of the tile of logits of one program; Triton needs powers of two
PROGRAMS = 512  # fewer leave a part of the GPU idle; the vocabulary is divided until there are as many
_PARAMS = plgpu.CompilerParams(num_warps=8, num_stages=3)  # fits the registers of an H100
_DEPRECATED = 'The Pallas Triton backend is deprecated'  # beginning of a warning of jax 0.12


def forward(operands: Operands, settings: Settings, interpret: bool = False) -> Sums:
  """Computes the sums over the vocabulary for each token, float32 `[R, 1]` each.

  Args:
    operands: the arrays.
    settings: static settings.
    interpret: whether the kernel runs in plain JAX, for tests on a machine without a GPU.
  """
  num_tokens, vocab_size = operands.actions.shape[0], operands.policy.embedding.shape[0]
  if num_tokens == 0:
    return spread_like(operands, Sums.zeros(0))
  token_blocks, column_blocks = pl.cdiv(num_tokens, TOKENS), pl.cdiv(vocab_size, COLUMNS)
  _expect_deprecation()
  shares = pl.next_power_of_2(min(pl.cdiv(PROGRAMS, token_blocks), column_blocks))
  shape = _shape_like(operands, (shares, token_blocks * TOKENS, 1), jnp.float32)
  sums = pl.pallas_call(
      functools.partial(_forward_kernel, settings=settings, column_blocks=column_blocks),
      out_shape=Sums(**dict.fromkeys(Sums.__dataclass_fields__, shape)),
      out_specs=Sums(**dict.fromkeys(Sums.__dataclass_fields__, pl.BlockSpec((None, TOKENS, 1), _share_and_tokens))),
      grid=(token_blocks, shares), interpret=interpret, name='weighted_kl_forward', compiler_params=_PARAMS,
      cost_estimate=_cost(operands, vocab_size, 4 - settings.one_temperature),
  )(_kernel_operands(operands))
  while shares > 1:
    shares //= 2
    sums = merge(*(jax.tree.map(lambda x, part=part: x[part], sums) for part in (slice(shares), slice(shares, None))))
  return jax.tree.map(lambda x: x[0, :num_tokens], sums)


def backward(operands: Operands, settings: Settings, row: Row, cotangents: Cotangents, interpret: bool = False) -> Side:
  """Computes the gradients of the policy's hidden states, embedding and bias.

  Args:
    operands: the arrays.
    settings: static settings.
    row: statistics of each token over the whole vocabulary.
    cotangents: cotangents of each token.
    interpret: whether the kernel runs in plain JAX.

  Returns:
    A `Side` of gradients in the dtypes of the arrays.
  """
  policy = operands.policy
  (num_tokens, _), vocab_size = policy.hidden.shape, policy.embedding.shape[0]
  blank = jax.tree.map(jnp.zeros_like, policy)
  if num_tokens == 0:
    return spread_like(operands, blank)
  _expect_deprecation()
  block = _pick_block(num_tokens, vocab_size, _gradient_type(policy))
  given = spread_like(operands, (_kernel_operands(operands), row, cotangents))

  def of_block(j, grads):
    first = jnp.minimum(j * block, vocab_size - block)  # the last block overlaps the one before, with 0
    gradient = _logit_gradient(*given, jnp.stack([first, j * block]), settings, block, interpret)
    embedding = jax.lax.dynamic_slice_in_dim(policy.embedding, first, block)
    return Side(hidden=grads.hidden + dot(gradient, embedding, (1, 0)),
                embedding=add_rows(grads.embedding, dot(gradient, policy.hidden, (0, 0)), first),
                bias=None if policy.bias is None else add_rows(grads.bias, jnp.sum(gradient, 0, jnp.float32), first))

  blank = spread_like(operands, blank.replace(hidden=jnp.zeros(policy.hidden.shape, jnp.float32)))
  count = pl.cdiv(vocab_size, block)
  grads = of_block(jnp.int32(0), blank) if count == 1 else jax.lax.fori_loop(0, count, of_block, blank)
  return grads.replace(hidden=grads.hidden.astype(policy.hidden.dtype))


def _expect_deprecation() -> None:
  """Silences JAX's deprecation warning of the Triton backend, which would stop programs that treat warnings as errors.

  The warning is raised when a program is lowered, after the functions here have returned, so the filter has to stay.
  """
  warnings.filterwarnings('ignore', message=_DEPRECATED, category=DeprecationWarning)


def _pick_block(num_tokens: int, vocab_size: int, dtype: Any) -> int:
  """Returns the number of columns of the logits' gradient that are held at a time."""
  columns = MEMORY_BUDGET // (jnp.dtype(dtype).itemsize * num_tokens)
  return min(max(columns // LANES, 1) * LANES, vocab_size)


def _gradient_type(policy: Side) -> Any:
  """Returns the dtype of the gradient of the logits.

  For a bfloat16 model it is bfloat16, twice as fast in products as any other dtype of its exponent range.
  """
  return jnp.bfloat16 if policy.embedding.dtype == policy.hidden.dtype == jnp.bfloat16 else jnp.float32


def _logit_gradient(operands: Operands, row: Row, cotangents: Cotangents, start: chex.Array, settings: Settings,
                    block: int, interpret: bool) -> chex.Array:
  """Computes the gradient `[R, block]` of a block of the logits before soft cap and temperature.

  Args:
    operands: operands from `_kernel_operands`.
    row: statistics of each token.
    cotangents: cotangents of each token.
    start: int32 `[2]`, the first column of the block, and the first column whose gradient is not set to 0.
    settings: static settings.
    block: number of columns.
    interpret: whether the kernel runs in plain JAX.
  """
  num_tokens = operands.actions.shape[0]
  shape = _shape_like(operands, (num_tokens, block), _gradient_type(operands.policy))
  return pl.pallas_call(
      functools.partial(_backward_kernel, settings=settings), out_shape=shape,
      grid=(pl.cdiv(num_tokens, TOKENS), pl.cdiv(block, COLUMNS)), interpret=interpret, name='weighted_kl_backward',
      compiler_params=_PARAMS, cost_estimate=_cost(operands, block, 1),
  )(operands, row, cotangents, spread_like(operands, start))


def _forward_kernel(operands: Operands, sums: Sums, settings: Settings, column_blocks: int):
  """Writes the sums of a block of tokens over a share of the vocabulary; records hold references to arrays."""
  token = pl.program_id(0) * TOKENS
  actions = _load(operands.actions, (token,), (TOKENS,))
  share = pl.cdiv(column_blocks, pl.num_programs(1))
  first = pl.program_id(1) * share

  def of_block(j, sums):
    z, v, v_sure = _tile(operands, settings, token, j * COLUMNS)
    columns = j * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)[None]
    valid = columns < operands.policy.embedding.shape[0]
    return merge(sums, block_sums(z, v, v_sure, (columns == actions[:, None]) & valid, valid))

  total = jax.lax.fori_loop(first, jnp.minimum(first + share, column_blocks), of_block, _blank_sums())
  for name in Sums.__dataclass_fields__:
    getattr(sums, name)[...] = getattr(total, name)


def _backward_kernel(operands: Operands, row: Row, cotangents: Cotangents, start: chex.Array, gradient: chex.Array,
                     settings: Settings):
  """Writes one tile of the gradient of the logits; records hold references to arrays."""
  token, offset = pl.program_id(0) * TOKENS, pl.program_id(1) * COLUMNS
  actions = _load(operands.actions, (token,), (TOKENS,))
  row, cotangents = jax.tree.map(lambda x: _load(x, (token, 0), (TOKENS, 1)), (row, cotangents))
  columns = start[0] + offset + jnp.arange(COLUMNS, dtype=jnp.int32)[None]
  z, v, _ = _tile(operands, settings._replace(one_temperature=True), token, start[0] + offset)
  tile = logit_gradients(z, v, columns == actions[:, None], row, cotangents)
  tile = through_scaling(tile, z, operands.replace(temperature=operands.temperature[0]), settings)
  tile = jnp.where(columns >= start[1], tile, 0.0).astype(gradient.dtype)
  _store(gradient, (token, offset), tile)


def _tile(operands: Operands, settings: Settings, token: chex.Array, column: chex.Array) -> tuple[chex.Array, ...]:
  """Computes z, v and v_sure of a tile of logits, `[TOKENS, COLUMNS]` each, as in `operands.scaled`."""

  def raw(side):
    bias = None if side.bias is None else _load(side.bias, (column,), (COLUMNS,))
    return biased_and_capped(_product(side, token, column), bias, settings.soft_cap)

  return scaled(raw(operands.policy), raw(operands.reference), operands.temperature[0],
                operands.certainty_temperature[0], settings.one_temperature)


def _product(side: Side, token: chex.Array, column: chex.Array) -> chex.Array:
  """Multiplies hidden states and embedding, float32 `[TOKENS, COLUMNS]`."""
  depth = 128 // side.hidden.dtype.itemsize

  def of_part(k, total):
    hidden = _load(side.hidden, (token, k * depth), (TOKENS, depth))
    embedding = _load(side.embedding, (column, k * depth), (COLUMNS, depth))
    return total + dot(hidden, embedding, (1, 1))

  count = pl.cdiv(side.hidden.shape[1], depth)
  return jax.lax.fori_loop(0, count, of_part, jnp.zeros((TOKENS, COLUMNS), jnp.float32))


def _load(ref: Any, starts: tuple[Any, ...], sizes: tuple[int, ...]) -> chex.Array:
  """Loads a part of an array, with 0 past its ends."""
  mask = _inside(ref.shape, starts, sizes)
  other = None if mask is None else jnp.zeros((), ref.dtype)
  return plgpu.load(ref.at[tuple(map(pl.ds, starts, sizes))], mask=mask, other=other)


def _store(ref: Any, starts: tuple[Any, ...], value: chex.Array):
  """Stores a value, dropping entries past the ends of the array."""
  mask = _inside(ref.shape, starts, value.shape)
  plgpu.store(ref.at[tuple(map(pl.ds, starts, value.shape))], value, mask=mask)


def _inside(shape: tuple[int, ...], starts: tuple[Any, ...], sizes: tuple[int, ...]) -> chex.Array | None:
  """Returns the mask of the entries of a part that lie inside an array of this shape; None if all do.

  No part crosses the end of an axis whose length is a multiple of the part's size, since parts start at multiples.
  """
  masks = [start + jax.lax.broadcasted_iota(jnp.int32, sizes, axis) < length
           for axis, (length, start, size) in enumerate(zip(shape, starts, sizes)) if length % size]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _blank_sums() -> Sums:
  """Makes the sums over no entries, `[TOKENS, 1]` each: merging them changes nothing."""
  zero = jnp.zeros((TOKENS, 1), jnp.float32)
  low = zero + MINUS_INFINITY
  blank = Sums(**dict.fromkeys(Sums.__dataclass_fields__, zero))
  return blank.replace(peak=low, ref_peak=low, sure_peak=low)


def _kernel_operands(operands: Operands) -> Operands:
  """Casts operands to vary over the same mesh axes, and scalars to arrays of one entry."""
  return spread_like(operands, operands.replace(
      temperature=operands.temperature[None], certainty_temperature=operands.certainty_temperature[None]))


def _shape_like(operands: Operands, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """Returns the `ShapeDtypeStruct` of an array that varies over all mesh axes of the operands."""
  return jax.eval_shape(lambda: spread_like(operands, jnp.zeros(shape, dtype)))


def _share_and_tokens(i, j):
  """Returns the index of the block of sums that a program writes."""
  return j, i, 0


def _cost(operands: Operands, num_columns: int, exponentials: int) -> pl.CostEstimate:
  """Estimates the cost of a kernel that computes `num_columns` columns of the logits."""
  num_tokens, sides = operands.actions.shape[0], (operands.policy, operands.reference)
  return pl.CostEstimate(
      flops=2 * num_tokens * num_columns * sum(side.hidden.shape[1] for side in sides),
      transcendentals=exponentials * num_tokens * num_columns,
      bytes_accessed=(num_tokens + num_columns) * sum(
          side.hidden.shape[1] * side.hidden.dtype.itemsize for side in sides))
