"""The operation in plain JAX, a tile of tokens and vocabulary at a time: any backend, no `[N, V]` array.

Vocabulary mode (`forward`, `backward`) takes all tokens, or as many as fit, and walks through the vocabulary; the
gradient computes the logits of each tile again, 12 N D V operations in all. Token mode (`accumulate`) is told the loss
of a token: it keeps the logits of a few tokens for all of the vocabulary, takes their gradients at once, and is done
with them, for 8 N D V.
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
MOST_VOCABULARY = 512  # of a block: larger ones leave the cache
FEWEST_TOKENS = 32  # of token mode: with fewer, reading the embedding takes longer than multiplying with it


class Tile(NamedTuple):
  """Numbers of tokens and of vocabulary entries whose logits are held at a time."""

  tokens: int
  vocabulary: int


def pick_tile(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET) -> Tile:
  """Returns the tile of vocabulary mode: all tokens, unless not even `LANES` entries of the vocabulary fit with them.

  Args:
    num_tokens: N.
    vocab_size: V.
    memory_budget: bytes for the float32 logits of a tile, policy and reference; a few more arrays of the kind are
      needed beside them.
  """
  entries = max(memory_budget // 8, LANES)
  tokens = max(1, min(num_tokens, entries // min(LANES, vocab_size)))
  block = max(entries // tokens // LANES, 1) * LANES
  return Tile(tokens, min(block, MOST_VOCABULARY, vocab_size))


def pick_tokens(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET) -> int:
  """Returns how many tokens token mode holds at a time; 0 if they would be so few that vocabulary mode is faster."""
  tokens = memory_budget // 8 // vocab_size
  return min(num_tokens, tokens) if tokens >= min(FEWEST_TOKENS, num_tokens) else 0


def forward(operands: Operands, settings: Settings, tile: Tile) -> Sums:
  """Returns the sums over the vocabulary of each token, float32 `[N, 1]` each."""
  num_tokens = operands.actions.shape[0]

  def of_tokens(i, sums):
    start, _ = _span(i, tile.tokens, num_tokens)
    found, _ = _token_sums(_tokens_of(operands, start, tile.tokens), settings, tile.vocabulary, keep=False)
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
                            some_row, some_cotangents, kept=None)

  return _loop(_count(num_tokens, tile.tokens), of_tokens, _no_grads(operands, tile.tokens >= num_tokens))


def accumulate(operands: Operands, settings: Settings, num_held: int, row_loss: Callable[..., chex.Array],
               extra: Sequence[chex.Array], with_grads: bool) -> tuple[chex.Array, Row, Side | None]:
  """Returns the summed loss of all tokens and its gradients out of one pass over the tokens.

  Args:
    operands: the arrays; all of the vocabulary is in them.
    settings: what is static.
    num_held: number of tokens held at a time.
    row_loss: `(row, *extra) -> losses [K]`, for K of the tokens.
    extra: arrays `[N, ...]`.
    with_grads: whether gradients are taken.

  Returns:
    The loss `[]`, the `Row` of all tokens, and a `Side` of gradients as in `backward`.
  """
  num_tokens = operands.actions.shape[0]
  block = min(MOST_VOCABULARY, operands.policy.embedding.shape[0])

  def of_tokens(i, carry):
    loss, rows, grads = carry
    start, fresh = _span(i, num_held, num_tokens)
    some = _tokens_of(operands, start, num_held)
    some_extra = [_get(x, start, num_held) for x in extra]
    sums, kept = _token_sums(some, settings, block, keep=with_grads)
    row = finish(sums)
    losses, pull = jax.vjp(lambda row: jnp.where(fresh[:, 0], row_loss(row, *some_extra), 0.0), row)
    if with_grads:
      (cotangents,) = pull(jnp.ones_like(losses))
      grads = _add_token_grads(grads, start, some, settings, block, row, Cotangents.of(cotangents), kept)
    return loss + jnp.sum(losses), jax.tree.map(lambda x, new: _set(x, new, start), rows, row), grads

  grads = _no_grads(operands, num_held >= num_tokens) if with_grads else None
  blank = *spread_like(operands, (jnp.float32(0), Row.zeros(num_tokens))), grads
  return _loop(_count(num_tokens, num_held), of_tokens, blank)


def _token_sums(operands, settings, block, keep):
  """Returns the sums over the vocabulary of a few tokens, and if asked their logits `[blocks, tokens, block]`."""
  vocab_size, num_tokens = operands.policy.embedding.shape[0], operands.actions.shape[0]
  count = _count(vocab_size, block)

  def of_block(j, kept):
    part, columns, valid = _block_of(operands, j, block)
    z, v, v_sure = block_logits(part, settings)
    sums = block_sums(z, v, v_sure, None, valid, can_rule_out=operands.reference.bias is not None)
    at_action = (_at_action(x, columns, operands.actions, valid) for x in (z, v))
    sums = sums.replace(**dict(zip(('action_logit', 'ref_action_logit'), at_action)))
    return sums, jax.tree.map(lambda x, new: x.at[j].set(new), kept, (z, v) if keep else ())

  def of_next_block(j, carry):
    sums, kept = carry
    more, kept = of_block(j, kept)
    return merge(sums, more), kept

  blank = jnp.zeros((count, num_tokens, block))
  carry = of_block(0, spread_like(operands, (blank, blank)) if keep else ())
  return carry if count == 1 else jax.lax.fori_loop(1, count, of_next_block, carry)


def _add_token_grads(grads, start, operands, settings, block, row, cotangents, kept):
  """Adds the gradients of a few tokens, the first of them number `start`; `kept` logits are not computed again."""
  policy, vocab_size = operands.policy, operands.policy.embedding.shape[0]

  def of_block(j, carry):
    grads, hidden = carry
    part, columns, valid = _block_of(operands, j, block)
    if kept:
      z, v = (x[j] for x in kept)
    else:
      z, v, _ = block_logits(part, settings._replace(one_temperature=True))
    gradient = logit_gradients(z, v, columns == operands.actions[:, None], row, cotangents)
    gradient = through_scaling(gradient, z, part, settings)
    gradient = gradient if valid is None else jnp.where(valid, gradient, 0.0)
    first = _first(j, block, vocab_size)
    return grads.replace(
        embedding=_add(grads.embedding, dot(gradient, policy.hidden, (0, 0)), first),
        bias=None if policy.bias is None else _add(grads.bias, jnp.sum(gradient, 0), first),
    ), hidden + dot(gradient, part.policy.embedding, (1, 0))

  hidden = spread_like(operands, jnp.zeros(policy.hidden.shape, jnp.float32))
  grads, hidden = _loop(_count(vocab_size, block), of_block, (grads, hidden))
  return grads.replace(hidden=_add(grads.hidden, hidden, start))


def _no_grads(operands: Operands, summed_once: bool) -> Side:
  """Returns gradients of 0, in float32 where more than one tile of tokens is summed."""
  policy = operands.policy
  grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if summed_once else jnp.float32), policy)
  return spread_like(operands, grads.replace(hidden=jnp.zeros(policy.hidden.shape, policy.hidden.dtype)))


def _block_of(operands, j, block):
  """Returns the operands of block j of the vocabulary, its columns `[1, K]`, and which of them are new.

  The last block ends with the vocabulary and repeats some columns of the one before.
  """
  vocab_size = operands.policy.embedding.shape[0]
  first = _first(j, block, vocab_size)
  columns = first + jnp.arange(block)[None]
  valid = None if vocab_size % block == 0 else columns >= j * block
  policy, reference = (
      side.replace(**jax.tree.map(lambda x: _get(x, first, block), {'embedding': side.embedding, 'bias': side.bias}))
      for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference), columns, valid


def _at_action(logits, columns, actions, valid):
  """Returns the logits `[N, 1]` of the actions that are among the columns, 0 for the others."""
  place = actions[:, None] - columns[:, :1]
  inside = (place >= 0) & (place < logits.shape[1])
  place = jnp.clip(place, 0, logits.shape[1] - 1)
  if valid is not None:
    inside &= jnp.take_along_axis(valid, place.T, 1).T
  return jnp.where(inside, jnp.take_along_axis(logits, place, 1), 0.0)


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
