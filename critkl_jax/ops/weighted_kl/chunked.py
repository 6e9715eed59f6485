"""The operation in plain JAX, a tile of tokens and vocabulary at a time: any backend, no `[N, V]` array.

A tile is (tokens, vocabulary). Tiles that hold the whole vocabulary make the fewest passes (token mode); tiles that
hold all tokens need the least memory (vocabulary mode). Gradients compute the logits of each tile again, so that a call
costs 12 N D V operations in all; `accumulate`, which is told the loss of a token, takes them in the forward pass, for
8 N D V.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl.operands import (
    Operands,
    Settings,
    Side,
    block_logits,
    dot,
    spread_like,
    through_scaling,
)
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, Sums, block_sums, finish, logit_gradients, merge

MEMORY_BUDGET = 64 * 2**20
LANES = 128  # blocks of the vocabulary are multiples of it
FEWEST_TOKENS = 64  # in token mode


class Tile(NamedTuple):
  """Number of tokens and of vocabulary entries that are held at a time."""

  tokens: int
  vocabulary: int


def pick_tile(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET) -> Tile:
  """Returns the tile that a memory budget allows.

  The whole vocabulary with `FEWEST_TOKENS` or more, where those fit (token mode); else all tokens with as much of the
  vocabulary as fits (vocabulary mode); and where not even `LANES` of it do, as many tokens as fit with those.

  Args:
    num_tokens: N.
    vocab_size: V.
    memory_budget: bytes of one float32 array of logits of a tile; a few of them are held at a time.
  """
  num_tokens, entries = max(num_tokens, 1), max(memory_budget // 4, LANES)
  tokens = entries // vocab_size
  if tokens >= min(FEWEST_TOKENS, num_tokens):
    return Tile(min(num_tokens, tokens), vocab_size)
  block = max(entries // num_tokens // LANES, 1) * LANES
  return Tile(min(num_tokens, entries // LANES), min(block, vocab_size))


def forward(operands: Operands, settings: Settings, tile: Tile) -> Sums:
  """Returns the sums over the vocabulary of each token, float32 `[N, 1]` each."""
  num_tokens = operands.actions.shape[0]

  def of_tokens(i, sums):
    start, _ = _span(i, tile.tokens, num_tokens)
    found = _token_sums(_tokens_of(operands, start, tile.tokens), settings, tile.vocabulary)
    return jax.tree.map(lambda x, new: _set(x, new, start), sums, found)

  return _loop(_count(num_tokens, tile.tokens), of_tokens, spread_like(operands, Sums.zeros(num_tokens)))


def backward(operands: Operands, settings: Settings, tile: Tile, row: Row, cotangents: Cotangents) -> Side:
  """Returns the gradients of the policy's hidden states, embedding and bias.

  Args:
    operands: the arrays.
    settings: what is static.
    tile: tokens and vocabulary held at a time.
    row: of each token, over the whole vocabulary.
    cotangents: of each token.

  Returns:
    A `Side` of gradients; those of the embedding and the bias are float32 where several tiles of tokens are summed.
  """
  num_tokens = operands.actions.shape[0]

  def of_tokens(i, grads):
    start, fresh = _span(i, tile.tokens, num_tokens)
    some_row, some_cotangents = jax.tree.map(lambda x: _get(x, start, tile.tokens), (row, cotangents))
    some_cotangents = jax.tree.map(lambda x: jnp.where(fresh, x, 0.0), some_cotangents)
    return _add_token_grads(grads, start, _tokens_of(operands, start, tile.tokens), settings, tile.vocabulary,
                            some_row, some_cotangents)

  return _loop(_count(num_tokens, tile.tokens), of_tokens, _no_grads(operands, tile.tokens >= num_tokens))


def accumulate(operands: Operands, settings: Settings, num_held: int, row_loss: Callable[..., chex.Array],
               extra: Sequence[chex.Array], with_grads: bool) -> tuple[chex.Array, Row, Side | None]:
  """Returns the summed loss of all tokens and its gradients out of one pass, the whole vocabulary held at a time.

  Args:
    operands: the arrays.
    settings: what is static.
    num_held: number of tokens held at a time.
    row_loss: `(row, *extra) -> losses [K]`, for K of the tokens.
    extra: arrays `[N, ...]`.
    with_grads: whether gradients are taken.

  Returns:
    The loss `[]`, the `Row` of all tokens, and a `Side` of gradients as in `backward`.
  """
  policy, num_tokens = operands.policy, operands.actions.shape[0]

  def of_tokens(i, carry):
    loss, rows, grads = carry
    start, fresh = _span(i, num_held, num_tokens)
    some = _tokens_of(operands, start, num_held)
    some_extra = [_get(x, start, num_held) for x in extra]
    is_action = jnp.arange(policy.embedding.shape[0])[None] == some.actions[:, None]
    z, v, v_sure = block_logits(some, settings)
    row = finish(block_sums(z, v, v_sure, is_action))
    losses, pull = jax.vjp(lambda row: jnp.where(fresh[:, 0], row_loss(row, *some_extra), 0.0), row)
    if with_grads:
      (cotangents,) = pull(jnp.ones_like(losses))
      gradient = logit_gradients(z, v, is_action, row, Cotangents.of(cotangents))
      gradient = through_scaling(gradient, z, some, settings)
      grads = Side(hidden=_add(grads.hidden, dot(gradient, policy.embedding, (1, 0)), start),
                   embedding=_add(grads.embedding, dot(gradient, some.policy.hidden, (0, 0)), 0),
                   bias=None if policy.bias is None else grads.bias + jnp.sum(gradient, 0))
    return loss + jnp.sum(losses), jax.tree.map(lambda x, new: _set(x, new, start), rows, row), grads

  grads = _no_grads(operands, num_held >= num_tokens) if with_grads else None
  blank = *spread_like(operands, (jnp.float32(0), Row.zeros(num_tokens))), grads
  return _loop(_count(num_tokens, num_held), of_tokens, blank)


def _no_grads(operands: Operands, summed_once: bool) -> Side:
  """Returns gradients of 0, in float32 where more than one tile of tokens is summed."""
  policy = operands.policy
  grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if summed_once else jnp.float32), policy)
  return spread_like(operands, grads.replace(hidden=jnp.zeros(policy.hidden.shape, policy.hidden.dtype)))


def _token_sums(operands: Operands, settings: Settings, block: int) -> Sums:
  """Returns the sums over the vocabulary of a few tokens."""
  vocab_size = operands.policy.embedding.shape[0]

  def of_block(j, sums):
    part, is_action, valid = _block_of(operands, j, block)
    return merge(sums, block_sums(*block_logits(part, settings), is_action, valid))

  part, is_action, _ = _block_of(operands, 0, block)
  first = block_sums(*block_logits(part, settings), is_action)
  count = _count(vocab_size, block)
  return first if count == 1 else jax.lax.fori_loop(1, count, of_block, first)


def _add_token_grads(grads: Side, start: chex.Array, operands: Operands, settings: Settings, block: int, row: Row,
                     cotangents: Cotangents) -> Side:
  """Adds the gradients of a few tokens, the first of them number `start`."""
  policy, vocab_size = operands.policy, operands.policy.embedding.shape[0]

  def of_block(j, carry):
    grads, hidden = carry
    part, is_action, valid = _block_of(operands, j, block)
    z, v, _ = block_logits(part, settings._replace(one_temperature=True))
    gradient = through_scaling(logit_gradients(z, v, is_action, row, cotangents), z, part, settings)
    gradient = gradient if valid is None else jnp.where(valid, gradient, 0.0)
    first = _first(j, block, vocab_size)
    return grads.replace(
        embedding=_add(grads.embedding, dot(gradient, policy.hidden, (0, 0)), first),
        bias=None if policy.bias is None else _add(grads.bias, jnp.sum(gradient, 0), first),
    ), hidden + dot(gradient, part.policy.embedding, (1, 0))

  hidden = spread_like(operands, jnp.zeros(policy.hidden.shape, jnp.float32))
  grads, hidden = _loop(_count(vocab_size, block), of_block, (grads, hidden))
  return grads.replace(hidden=_add(grads.hidden, hidden, start))


def _block_of(operands, j, block):
  """Returns the operands of block j of the vocabulary, where the actions are in it, and which columns are new.

  The last block ends with the vocabulary and repeats some columns of the one before.
  """
  vocab_size = operands.policy.embedding.shape[0]
  first = _first(j, block, vocab_size)
  columns = first + jnp.arange(block)[None]
  sides = (jax.tree.map(lambda x: _get(x, first, block), {'embedding': side.embedding, 'bias': side.bias})
           for side in (operands.policy, operands.reference))
  policy, reference = (side.replace(**part) for side, part in zip((operands.policy, operands.reference), sides))
  valid = None if vocab_size % block == 0 else columns >= j * block
  is_action = columns == operands.actions[:, None]
  if valid is not None:
    is_action &= valid
  return operands.replace(policy=policy, reference=reference), is_action, valid


def _tokens_of(operands, start, count):
  """Returns the operands of `count` tokens from `start` on."""
  policy, reference = (side.replace(hidden=_get(side.hidden, start, count))
                       for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference, actions=_get(operands.actions, start, count))


def _span(i, count, total):
  """Returns where span i of `count` out of `total` starts, and bool `[count, 1]`: what of it no earlier span holds."""
  start = _first(i, count, total)
  return start, (start + jnp.arange(count) >= i * count)[:, None]


def _first(i, count, total):
  """Returns where span i starts: at `i * count`, or earlier, so that it ends within `total`."""
  return jnp.minimum(i * count, total - count)


def _count(total, size):
  return -(-total // size) if total else 0


def _loop(count, body, carry):
  if count == 0:
    return carry
  return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def _get(x, start, count):
  return x if x.shape[0] == count else jax.lax.dynamic_slice_in_dim(x, start, count)


def _set(x, new, start):
  return new.astype(x.dtype) if x.shape == new.shape else jax.lax.dynamic_update_slice_in_dim(
      x, new.astype(x.dtype), start, 0)


def _add(x, more, start):
  """Returns x with `more` added to its entries from `start` on, summed in float32."""
  old = _get(x, start, more.shape[0])
  return _set(x, old.astype(jnp.float32) + more, start)
