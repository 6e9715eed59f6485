"""The operation as Pallas kernels for TPU v5e and later: logits exist only in VMEM, a tile at a time.

For each block of tokens the forward kernel loops over the vocabulary. For each block of the vocabulary the backward
kernel loops over the tokens, computes the logits of each tile again, and from them both gradients: 12 R D V operations
in all if the widths of policy and reference are equal. Temporary arrays in HBM are `[R, 128]`.

Reads past the end of an array return anything, NaN included. Rows past the last token affect only themselves, and their
writes are dropped; columns past the vocabulary are masked; before a product that sums over rows or columns, those
outside are set to 0 in both factors.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from critkl_jax.ops.weighted_kl.operands import (
    Operands,
    Settings,
    Side,
    block_logits,
    dot,
    spread_like,
    through_scaling,
    varying_axes,
)
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, Sums, block_sums, logit_gradients, merge

LANES = 128
TOKEN_MULTIPLE = 16  # rows of a bfloat16 register
VMEM_LIMIT = 63 * 2**20  # bytes per kernel; a core has 64 MiB (v5p, v7x) or 128 MiB (v5e, v6e)
VMEM_BUDGET = 40 * 2**20  # bytes of blocks and tiles as counted by `_vmem_bytes`
HIDDEN_BUDGET = 32 * 2**20  # bytes of the gradients of hidden states that one call of the backward kernel sums
LARGEST = 512  # most tokens, or vocabulary entries, of a block
_LIVE_TILES = 8  # float32 tiles of logits that a kernel holds at a time


class Blocks(NamedTuple):
  """Block sizes.

  Attributes:
    tokens: tokens of a block.
    vocabulary: vocabulary entries of a block.
    call: number of blocks of tokens whose gradients one call of the backward kernel sums.
  """

  tokens: int
  vocabulary: int
  call: int


def pick_blocks(operands: Operands, with_grads: bool) -> Blocks:
  """Chooses the largest blocks that `VMEM_BUDGET` and `HIDDEN_BUDGET` allow.

  Raises:
    ValueError: if the width is so large that no block fits.
  """
  num_tokens, vocab_size = operands.actions.shape[0], operands.policy.embedding.shape[0]
  tokens = vocabulary = LARGEST
  while _vmem_bytes(operands, tokens, vocabulary, with_grads) > VMEM_BUDGET:
    if vocabulary > tokens or tokens == TOKEN_MULTIPLE:
      vocabulary //= 2
    else:
      tokens //= 2
    if vocabulary < LANES:
      raise ValueError(
          "implementation: 'pallas_tpu' holds whole rows, and 128 of width "
          f'{operands.policy.embedding.shape[1]} (reference {operands.reference.embedding.shape[1]}) do not fit in '
          "VMEM; take 'chunked'.")
  tokens = _even(num_tokens, tokens, TOKEN_MULTIPLE)
  width = pl.cdiv(operands.policy.hidden.shape[1], LANES) * LANES
  count = pl.cdiv(num_tokens, tokens)
  call = _even(count, max(HIDDEN_BUDGET // (4 * tokens * width), 1), 1)
  return Blocks(tokens, _even(vocab_size, vocabulary, LANES), call)


def _vmem_bytes(operands, tokens, vocabulary, with_grads):
  """Counts the VMEM bytes of blocks and tiles, without the summed gradients of hidden states."""
  hidden, embedding = operands.policy.hidden, operands.policy.embedding
  width, ref_width = (pl.cdiv(x.shape[1], LANES) * LANES for x in (embedding, operands.reference.embedding))
  total = 2 * (tokens + vocabulary) * (width + ref_width) * hidden.dtype.itemsize  # double-buffered
  total += 4 * _LIVE_TILES * tokens * vocabulary
  if with_grads:  # gradients in and out, their sum, and products
    total += (3 * tokens + 4 * vocabulary) * width * hidden.dtype.itemsize + 4 * (2 * vocabulary + tokens) * width
  return total


def _even(total, largest, multiple):
  """Returns the size, at most `largest`, of equal blocks: a multiple of `multiple`, or `total` for a single block."""
  if total <= largest:
    return max(total, 1)
  return pl.cdiv(pl.cdiv(total, pl.cdiv(total, largest)), multiple) * multiple


def forward(operands: Operands, settings: Settings, *, interpret: Any = False) -> Sums:
  """Computes the sums over the vocabulary for each token, float32 `[R, 1]` each.

  Args:
    operands: the arrays.
    settings: static settings.
    interpret: for tests; False compiles for the TPU, and raises elsewhere.
  """
  num_tokens, vocab_size = operands.actions.shape[0], operands.policy.embedding.shape[0]
  if num_tokens == 0:
    return spread_like(operands, Sums.zeros(0))
  blocks = pick_blocks(operands, with_grads=False)
  grid = pl.cdiv(num_tokens, blocks.tokens), pl.cdiv(vocab_size, blocks.vocabulary)
  arrays = _arrays(operands, settings)
  token_at, block_at = (lambda i, j: i), (lambda i, j: j)
  packed = pl.pallas_call(
      functools.partial(_forward_kernel, settings=settings, vocab_size=vocab_size),
      grid=grid,
      in_specs=[_specs(arrays, blocks, token_at, block_at)],
      out_specs=pl.BlockSpec((blocks.tokens, LANES), lambda i, j: (i, 0)),
      out_shape=_shape((num_tokens, LANES), jnp.float32, arrays),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT),
      cost_estimate=_cost(operands, products=(1, 1), exponentials=3, passes=(1, grid[0])),
      interpret=interpret,
      name='weighted_kl_forward',
  )(arrays)
  return _unpack(packed, Sums)


def _forward_kernel(refs, out, *, settings, vocab_size):
  """Adds one block of the vocabulary to the sums of one block of tokens, stored in the lanes of the output."""
  j = pl.program_id(1)
  part = _read(refs)
  is_action, valid = _columns(j, refs, part.actions, vocab_size)
  sums = block_sums(*block_logits(part, settings), is_action, valid)

  @pl.when(j == 0)
  def _():
    out[...] = _pack([sums])

  @pl.when(j > 0)
  def _():
    out[...] = _pack([merge(_unpack(out[...], Sums), sums)])


def backward(operands: Operands, settings: Settings, row: Row, cotangents: Cotangents, *,
             interpret: Any = False) -> Side:
  """Computes the gradients of the policy's hidden states, embedding and bias.

  The gradients of hidden states are summed in VMEM, for as many tokens per call as `HIDDEN_BUDGET` allows; each call
  adds to the gradient of the embedding from the calls before it. Sums are float32 in VMEM.

  With bfloat16 arrays the result is less exact than from `chunked` on a device that multiplies in float32: the
  gradient of the logits is rounded to bfloat16 before its products, and the gradient of the embedding once per call. In
  a test of 256 tokens the root-mean-square error of the embedding's gradient was 1.4 times the error of `chunked` with
  one call, 2.3 times with eight.

  Args:
    operands: the arrays.
    settings: static settings.
    row: statistics of each token over the whole vocabulary.
    cotangents: cotangents of each token.
    interpret: for tests; False compiles for the TPU, and raises elsewhere.

  Returns:
    A `Side` of gradients in the dtypes of the arrays; the bias gradient is float32.
  """
  policy, num_tokens = operands.policy, operands.actions.shape[0]
  if num_tokens == 0:
    return spread_like(operands, jax.tree.map(jnp.zeros_like, policy))
  blocks = pick_blocks(operands, with_grads=True)
  count = pl.cdiv(num_tokens, blocks.tokens)
  # Statistics, cotangents and action of a token share the lanes of one array.
  packed = _pack([row, cotangents, operands.actions[:, None].astype(jnp.float32)])
  arrays = _arrays(operands, settings).replace(actions=packed)
  old, bias = None, 0.0
  for first in range(0, count, blocks.call):
    hidden, embedding, more = _backward_call(
        arrays, operands, settings, blocks, first, min(blocks.call, count - first), old, interpret)
    old = embedding, hidden
    bias = bias + more[0] if policy.bias is not None else None
  return Side(hidden=hidden, embedding=embedding, bias=bias)


def _backward_call(arrays, operands, settings, blocks, first, count, old, interpret):
  """Computes the gradients of `count` blocks of tokens from block `first` on.

  `old` has the gradients of earlier calls: embedding gradients are added to them, hidden-state gradients written into
  the same array.
  """
  policy = operands.policy
  vocab_size, width = policy.embedding.shape
  last = pl.cdiv(vocab_size, blocks.vocabulary) - 1
  # The gradients of hidden states are written in the last round; until then the output block does not change.
  hidden_spec = pl.BlockSpec((blocks.tokens, width), lambda j, i: (first + jnp.where(j == last, i, 0), 0))
  embedding_spec = pl.BlockSpec((blocks.vocabulary, width), lambda j, i: (j, 0))
  bias_spec = pl.BlockSpec((1, blocks.vocabulary), lambda j, i: (0, j))
  old_specs = (pl.BlockSpec((blocks.vocabulary, width), lambda j, i: (j, 0), pipeline_mode=pl.Buffered(1)),
               # Never read, but an array and its alias need equal block shapes: the interpreter pads both to blocks.
               pl.BlockSpec((blocks.tokens, width), lambda j, i: (0, 0), pipeline_mode=pl.Buffered(1)))
  shapes = [_shape(policy.hidden.shape, policy.hidden.dtype, arrays),
            _shape(policy.embedding.shape, policy.embedding.dtype, arrays)]
  out_specs = [hidden_spec, embedding_spec]
  if policy.bias is not None:
    shapes, out_specs = [*shapes, _shape((1, vocab_size), jnp.float32, arrays)], [*out_specs, bias_spec]
  num_arrays = len(jax.tree.leaves(arrays))
  found = pl.pallas_call(
      functools.partial(_backward_kernel, settings=settings, size=(operands.actions.shape[0], vocab_size), first=first),
      grid=(last + 1, count),
      in_specs=[_specs(arrays, blocks, lambda j, i: first + i, lambda j, i: j),
                None if old is None else old_specs],
      out_specs=(*out_specs, None)[:3],
      out_shape=(*shapes, None)[:3],
      scratch_shapes=[pltpu.VMEM((count, blocks.tokens, width), jnp.float32),
                      pltpu.VMEM((blocks.vocabulary, width), jnp.float32)],
      input_output_aliases={} if old is None else {num_arrays: 1, num_arrays + 1: 0},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('arbitrary', 'arbitrary'), vmem_limit_bytes=VMEM_LIMIT),
      cost_estimate=_cost(operands, products=(3, 1), exponentials=1, passes=(last + 1, 1),
                          share=count * blocks.tokens / operands.actions.shape[0]),
      interpret=interpret,
      name='weighted_kl_backward',
  )(arrays, old)
  return found


def _backward_kernel(refs, old, hidden_out, embedding_out, bias_out, hidden_sum, embedding_sum, *, settings, size,
                     first):
  """Adds one tile to the gradients of its tokens and of its block of the vocabulary."""
  j, i = pl.program_id(0), pl.program_id(1)
  num_tokens, vocab_size = size
  part = _read(refs)
  row, cotangents = _unpack(part.actions, Row), _unpack(part.actions, Cotangents, len(Row.__dataclass_fields__))
  place = len(Row.__dataclass_fields__) + len(Cotangents.__dataclass_fields__)
  is_action, valid = _columns(j, refs, part.actions[:, place:place + 1].astype(jnp.int32), vocab_size)
  z, v, _ = block_logits(part, settings._replace(one_temperature=True))
  gradient = through_scaling(logit_gradients(z, v, is_action, row, cotangents), z, part, settings)
  left = num_tokens - (first + i) * gradient.shape[0]
  gradient = gradient if valid is None else jnp.where(valid, gradient, 0.0)
  gradient = _first_rows(gradient, left, num_tokens)
  hidden = _first_rows(part.policy.hidden, left, num_tokens)
  embedding = _first_rows(part.policy.embedding, vocab_size - j * gradient.shape[1], vocab_size)

  @pl.when(i == 0)
  def _():
    embedding_sum[...] = jnp.zeros_like(embedding_sum) if old is None else old[0][...].astype(jnp.float32)
    if bias_out is not None:
      bias_out[...] = jnp.zeros_like(bias_out)

  @pl.when(j == 0)
  def _():
    hidden_sum[i] = jnp.zeros(hidden_sum.shape[1:], jnp.float32)

  if bias_out is not None:
    bias_out[...] += jnp.sum(gradient, 0, keepdims=True)
  gradient = gradient.astype(embedding.dtype)
  embedding_sum[...] += dot(gradient, hidden, (0, 0))
  hidden_sum[i] += dot(gradient, embedding, (1, 0))

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    embedding_out[...] = embedding_sum[...].astype(embedding_out.dtype)

  @pl.when(j == pl.num_programs(0) - 1)
  def _():
    hidden_out[...] = hidden_sum[i].astype(hidden_out.dtype)


def _columns(j, refs, actions, vocab_size):
  """Returns masks bool `[tokens, vocabulary]` of block j: the actions, and the valid columns (None if all are)."""
  block = refs.policy.embedding.shape[0]
  columns = j * block + jax.lax.broadcasted_iota(jnp.int32, (actions.shape[0], block), 1)
  is_action = columns == actions
  if vocab_size % block == 0:
    return is_action, None
  valid = columns < vocab_size
  return is_action & valid, valid


def _first_rows(x, count, total):
  """Zeros all rows of x but the first `count`; returns x itself if the block size divides `total`."""
  if total % x.shape[0] == 0:
    return x
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, x, jnp.zeros_like(x))


def _arrays(operands, settings):
  """Converts operands to the rank-2 arrays that kernels take; `temperature` holds both temperatures."""

  def side(x):
    return x.replace(bias=None if x.bias is None else x.bias.astype(jnp.float32)[None])

  temperatures = jnp.stack([operands.temperature, operands.certainty_temperature])[None]  # rank 2 is needed for vmap
  arrays = Operands(side(operands.policy), side(operands.reference), operands.actions.astype(jnp.int32)[:, None],
                    temperatures, None)
  return spread_like(operands, arrays)


def _specs(arrays, blocks, token_at, block_at):
  """Makes the block specs of the arrays; `token_at` and `block_at` map grid points to token and vocabulary blocks."""

  def of_tokens(x):
    return pl.BlockSpec((blocks.tokens, x.shape[1]), lambda *at: (token_at(*at), 0))

  def side(x):
    return Side(of_tokens(x.hidden),
                pl.BlockSpec((blocks.vocabulary, x.embedding.shape[1]), lambda *at: (block_at(*at), 0)),
                None if x.bias is None else pl.BlockSpec((1, blocks.vocabulary), lambda *at: (0, block_at(*at))))

  return Operands(side(arrays.policy), side(arrays.reference), of_tokens(arrays.actions),
                  pl.BlockSpec(memory_space=pltpu.SMEM), None)


def _read(refs):
  """Reads the operands of one tile."""

  def side(x):
    return Side(x.hidden[...], x.embedding[...], None if x.bias is None else x.bias[0])

  return Operands(side(refs.policy), side(refs.reference), refs.actions[...], refs.temperature[0, 0],
                  refs.temperature[0, 1])


def _pack(columns: Sequence[Any]) -> chex.Array:
  """Packs the `[R, 1]` arrays of PyTrees, in order, into the first lanes of float32 `[R, 128]`."""
  columns = jax.tree.leaves(columns)
  shape = columns[0].shape[0], LANES
  lanes, packed = jax.lax.broadcasted_iota(jnp.int32, shape, 1), jnp.zeros(shape, jnp.float32)
  for k, column in enumerate(columns):
    packed = jnp.where(lanes == k, column, packed)
  return packed


def _unpack(packed, record, first=0):
  """Unpacks a record from the lanes of an array from `first` on."""
  return record(**{name: packed[:, k:k + 1] for k, name in enumerate(record.__dataclass_fields__, first)})


def _shape(shape, dtype, arrays):
  """Returns the `ShapeDtypeStruct` of an output that varies over the same mesh axes as the arrays."""
  kind = jax.typeof(arrays.actions)
  if not varying_axes(arrays.actions):
    return jax.ShapeDtypeStruct(shape, dtype)
  since = {'vma': kind.vma} if hasattr(kind, 'vma') else {'manual_axis_type': kind.manual_axis_type}
  return jax.ShapeDtypeStruct(shape, dtype, **since)


def _cost(operands, products, exponentials, passes, share=1.0):
  """Estimates the cost of a call.

  Args:
    operands: the arrays.
    products: numbers of matrix products with the embedding of policy and reference.
    exponentials: exponentials per logit.
    passes: how often hidden states and embeddings are read.
    share: share of the tokens in this call.
  """
  sides = operands.policy, operands.reference
  num_tokens, vocab_size = operands.actions.shape[0], operands.policy.embedding.shape[0]
  logits = int(share * num_tokens) * vocab_size
  sizes = [sum(x.size * x.dtype.itemsize for x in part)
           for part in ([x.hidden for x in sides], [x.embedding for x in sides])]
  return pl.CostEstimate(
      flops=sum(2 * logits * side.embedding.shape[1] * count for side, count in zip(sides, products)),
      transcendentals=exponentials * logits,
      bytes_accessed=int(passes[0] * share * sizes[0]) + passes[1] * sizes[1])
