"""The operation in plain JAX, some of the logits at a time: any backend, no `[N, V]` array.

Vocabulary mode (`forward`, `backward`) takes all tokens, or as many as fit, and walks through the vocabulary a block at
a time; the gradient computes the logits of each tile again, 12 N D V operations in all. The walk begins with what the
blocks leave over, so that none of them needs a mask.

Token mode (`accumulate`) is told the loss of a token: it holds the logits of a few tokens for all of the vocabulary,
replaces them with their gradients, and is done with these tokens, for 8 N D V.
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
    add_rows,
    block_logits,
    dot,
    products,
    spread_like,
    through_scaling,
)
from critkl_jax.ops.weighted_kl.statistics import Cotangents, Row, Sums, block_sums, finish, logit_gradients, merge

MEMORY_BUDGET = 64 * 2**20
LANES = 128  # blocks of the vocabulary are multiples of it on accelerators
CACHED_ENTRIES = 2**19  # logits that are worked on at a time on a CPU: more leave its cache
CACHE_LINE = 16  # float32 numbers
MOST_VOCABULARY = 2048  # of a block: gradients of as many rows of the embedding are held beside the logits
# Of token mode: with fewer, reading the embedding takes longer than multiplying with it.
FEWEST_TOKENS, FEWEST_TOKENS_ON_CPU = 256, 32


class Tile(NamedTuple):
  """What vocabulary mode holds at a time: the logits of so many tokens for so many entries of the vocabulary."""

  tokens: int
  vocabulary: int


class Held(NamedTuple):
  """What token mode holds at a time: all logits of so many tokens.

  Attributes:
    tokens: in equal parts, as many as fit.
    rows: tokens that are worked on at a time between the products.
    vocabulary: entries of it whose gradients are taken at a time.
  """

  tokens: int
  rows: int
  vocabulary: int


def pick_tile(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET, backend: str | None = None) -> Tile:
  """Returns the tile of vocabulary mode: all tokens, unless not even `LANES` entries of the vocabulary fit with them
  into the budget or, on a CPU, into its cache.

  Args:
    num_tokens: N.
    vocab_size: V.
    memory_budget: bytes for the float32 logits that are held, of policy and reference; a few more arrays of the kind
      are needed beside them.
    backend: `cpu`, `tpu` or `gpu`; that of the default device if None.
  """
  backend = backend or jax.default_backend()
  entries = _worked_on(max(memory_budget // 8, LANES), backend)
  tokens = _even(num_tokens, max(entries // min(LANES, vocab_size), 1))
  return Tile(tokens, _block(entries // tokens, vocab_size, backend))


def pick_held(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET, backend: str | None = None
              ) -> Held | None:
  """Returns what token mode holds: as many tokens as fit; None if they would be so few that vocabulary mode is faster.
  Arguments as in `pick_tile`."""
  backend = backend or jax.default_backend()
  most = memory_budget // 8 // vocab_size
  if most < min(FEWEST_TOKENS_ON_CPU if backend == 'cpu' else FEWEST_TOKENS, num_tokens):
    return None
  tokens = _even(num_tokens, max(most, 1))
  entries = _worked_on(tokens * vocab_size, backend)
  return Held(tokens, max(entries // vocab_size, 1), _block(entries // tokens, vocab_size, backend))


def _worked_on(entries, backend):
  return min(entries, CACHED_ENTRIES) if backend == 'cpu' else entries


def _even(total, most):
  """Returns the size, at most `most`, of equal parts of a number of tokens; 1 if there are none."""
  return _count(total, _count(total, most)) if total else 1


def _block(most, vocab_size, backend):
  block = min(max(most // LANES, 1) * LANES, MOST_VOCABULARY)
  # Rows a power of two apart contend for the same places in a CPU's cache.
  return min(block - CACHE_LINE if backend == 'cpu' else block, vocab_size)


def forward(operands: Operands, settings: Settings, tile: Tile) -> Sums:
  """Returns the sums over the vocabulary of each token, float32 `[N, 1]` each."""
  num_tokens = operands.actions.shape[0]
  operands = _filled_up(operands, tile.tokens)

  def of_tokens(i, sums):
    some = _tokens_of(operands, i * tile.tokens, tile.tokens)
    found = _token_sums(some, settings, tile.vocabulary)
    return jax.tree.map(lambda x, new: _set(x, new, i * tile.tokens), sums, found)

  blank = spread_like(operands, Sums.zeros(operands.actions.shape[0]))
  sums = _loop(0, _count(num_tokens, tile.tokens), of_tokens, blank)
  return jax.tree.map(lambda x: x[:num_tokens], sums)


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
  operands = _filled_up(operands, tile.tokens)
  row, cotangents = _with_zeros((row, cotangents), tile.tokens)

  def of_tokens(i, grads):
    start = i * tile.tokens
    some_row, some_cotangents = jax.tree.map(lambda x: _get(x, start, tile.tokens), (row, cotangents))
    some = _tokens_of(operands, start, tile.tokens)
    return _add_token_grads(grads, start, some, settings, tile.vocabulary, some_row, some_cotangents)

  grads = _no_grads(operands, tile.tokens >= num_tokens)
  grads = _loop(0, _count(num_tokens, tile.tokens), of_tokens, grads)
  return grads.replace(hidden=grads.hidden[:num_tokens])


def accumulate(operands: Operands, settings: Settings, held: Held, row_loss: Callable[..., chex.Array],
               extra: Sequence[chex.Array], with_grads: bool) -> tuple[chex.Array, Row, Side | None]:
  """Returns the summed loss of all tokens and its gradients out of one pass over the tokens.

  Args:
    operands: the arrays; all of the vocabulary is in them.
    settings: what is static.
    held: what is held at a time.
    row_loss: `(row, *extra) -> losses [K]`, for K of the tokens.
    extra: arrays `[N, ...]`.
    with_grads: whether gradients are taken.

  Returns:
    The loss `[]`, the `Row` of all tokens, and a `Side` of gradients as in `backward`.
  """
  num_tokens = operands.actions.shape[0]
  operands, extra = _filled_up(operands, held.tokens), _with_zeros(extra, held.tokens)

  def of_tokens(i, carry):
    loss, rows, grads = carry
    start = i * held.tokens
    some = _tokens_of(operands, start, held.tokens)
    some_extra = [_get(x, start, held.tokens) for x in extra]
    real = start + jnp.arange(held.tokens, dtype=jnp.int32) < num_tokens
    found = products(some)
    row = finish(_row_sums(some, settings, found, held.rows))
    losses, pull = jax.vjp(lambda row: jnp.where(real, row_loss(row, *some_extra), 0.0), row)
    if with_grads:
      (cotangents,) = pull(jnp.ones_like(losses))
      grads = _add_held_grads(grads, start, some, settings, found, row, Cotangents.of(cotangents), held.vocabulary)
    return loss + jnp.sum(losses), jax.tree.map(lambda x, new: _set(x, new, start), rows, row), grads

  grads = _no_grads(operands, held.tokens >= num_tokens) if with_grads else None
  blank = *spread_like(operands, (jnp.float32(0), Row.zeros(operands.actions.shape[0]))), grads
  loss, rows, grads = _loop(0, _count(num_tokens, held.tokens), of_tokens, blank)
  grads = grads and grads.replace(hidden=grads.hidden[:num_tokens])
  return loss, jax.tree.map(lambda x: x[:num_tokens], rows), grads


def _row_sums(operands, settings, found, size):
  """Returns the sums over the vocabulary of the tokens of `products`, a few rows at a time."""

  def of_part(first, size, sums):

    def get(x):
      return _get(x, first, size)

    more = _block_sums(operands, block_logits(operands, settings, tuple(map(get, found))), 0, get(operands.actions))
    return jax.tree.map(lambda x, new: _set(x, new, first), sums, more)

  num_tokens = operands.actions.shape[0]
  sums, (count, rest) = spread_like(operands, Sums.zeros(num_tokens)), divmod(num_tokens, size)
  sums = of_part(count * size, rest, sums) if rest else sums
  return _loop(0, count, lambda k, sums: of_part(k * size, size, sums), sums)


def _add_held_grads(grads, start, operands, settings, found, row, cotangents, block):
  """Adds the gradients of the tokens of `products`, the first of them number `start`."""
  policy = operands.policy
  z, v, _ = block_logits(operands, settings._replace(one_temperature=True), found)
  is_action = jnp.arange(z.shape[1], dtype=jnp.int32)[None] == operands.actions[:, None]
  gradient = through_scaling(logit_gradients(z, v, is_action, row, cotangents), z, operands, settings)
  count, rest = divmod(z.shape[1], block)

  def add_part(grads, first, size):
    return _add_block(grads, jax.lax.dynamic_slice_in_dim(gradient, first, size, 1), policy.hidden, first)

  grads = add_part(grads, count * block, rest) if rest else grads
  grads = _loop(0, count, lambda j, grads: add_part(grads, j * block, block), grads)
  return grads.replace(hidden=add_rows(grads.hidden, dot(gradient, policy.embedding, (1, 0)), start))


def _token_sums(operands, settings, block):
  """Returns the sums over the vocabulary of a few tokens."""
  count, rest = divmod(operands.policy.embedding.shape[0], block)

  def of_part(first, size):
    logits = block_logits(_part_of(operands, first, size), settings)
    return _block_sums(operands, logits, first, operands.actions)

  def of_block(j, sums):
    return merge(sums, of_part(j * block, block))

  if not rest:
    return _loop(1, count, of_block, of_part(0, block))
  return _loop(0, count, of_block, of_part(count * block, rest))


def _add_token_grads(grads, start, operands, settings, block, row, cotangents):
  """Adds the gradients of a few tokens, the first of them number `start`."""
  policy = operands.policy
  count, rest = divmod(policy.embedding.shape[0], block)

  def add_part(carry, first, size):
    grads, hidden = carry
    part = _part_of(operands, first, size)
    z, v, _ = block_logits(part, settings._replace(one_temperature=True))
    is_action = first + jnp.arange(size, dtype=jnp.int32)[None] == operands.actions[:, None]
    gradient = through_scaling(logit_gradients(z, v, is_action, row, cotangents), z, part, settings)
    return (_add_block(grads, gradient, policy.hidden, first),
            hidden + dot(gradient, part.policy.embedding, (1, 0)))

  carry = grads, spread_like(operands, jnp.zeros(policy.hidden.shape, jnp.float32))
  carry = add_part(carry, count * block, rest) if rest else carry
  grads, hidden = _loop(0, count, lambda j, carry: add_part(carry, j * block, block), carry)
  return grads.replace(hidden=add_rows(grads.hidden, hidden, start))


def _add_block(grads, gradient, hidden, first):
  """Adds the gradients of embedding and bias from entry `first` on, out of those `[N, K]` of their products."""
  return grads.replace(
      embedding=add_rows(grads.embedding, _sum_over_tokens(gradient, hidden), first),
      bias=None if grads.bias is None else add_rows(grads.bias, jnp.sum(gradient, 0), first))


def _sum_over_tokens(gradient, hidden):
  """Returns float32 `[K, D]`, the product of `[N, K]` and `[N, D]` over N.

  XLA's product on a CPU is slow over the first axis of its first factor, which is transposed beforehand; or the other
  one and the result are, where they are smaller.
  """
  if jax.default_backend() != 'cpu':
    return dot(gradient, hidden, (0, 0))
  apart = jax.lax.optimization_barrier  # or the transposition would become part of the product again
  if gradient.shape[0] > hidden.shape[1]:
    return apart(dot(apart(hidden.T), gradient, (1, 0))).T
  return dot(apart(gradient.T), hidden, (1, 0))


def _no_grads(operands: Operands, summed_once: bool) -> Side:
  """Returns gradients of 0, in float32 where more than one tile of tokens is summed."""
  policy = operands.policy
  grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if summed_once else jnp.float32), policy)
  return spread_like(operands, grads.replace(hidden=jnp.zeros(policy.hidden.shape, policy.hidden.dtype)))


def _part_of(operands, first, size):
  """Returns the operands of `size` entries of the vocabulary from `first` on."""
  policy, reference = (
      side.replace(**jax.tree.map(lambda x: _get(x, first, size), {'embedding': side.embedding, 'bias': side.bias}))
      for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference)


def _block_sums(operands, logits, first, actions):
  """Returns the sums over the entries of the vocabulary from `first` on, whose z, v and v_sure are the logits."""
  z, v, v_sure = logits
  sums = block_sums(z, v, v_sure, None, can_rule_out=operands.reference.bias is not None)
  return sums.replace(action_logit=_at_action(z, first, actions), ref_action_logit=_at_action(v, first, actions))


def _at_action(logits, first, actions):
  """Returns the logits `[N, 1]` of the actions among the entries from `first` on, 0 for the others."""
  place = actions[:, None] - first
  inside = (place >= 0) & (place < logits.shape[1])
  return jnp.where(inside, jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), 1), 0.0)


def _tokens_of(operands, start, count):
  """Returns the operands of `count` tokens from `start` on."""
  policy, reference = (side.replace(hidden=_get(side.hidden, start, count))
                       for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference, actions=_get(operands.actions, start, count))


def _filled_up(operands, size):
  """Returns operands with tokens of zeros after the last, so that their number is a multiple of `size`."""
  policy, reference = (side.replace(hidden=_with_zeros(side.hidden, size))
                       for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference, actions=_with_zeros(operands.actions, size))


def _with_zeros(tree, size):
  """Returns arrays with zeros after their last row, so that the number of rows is a multiple of `size`."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)]) if len(x) % size else x,
                      tree)


def _count(total, size):
  return -(-total // size)


def _loop(start, stop, body, carry):
  if stop - start > 1:
    return jax.lax.fori_loop(start, stop, body, carry)
  return body(start, carry) if stop > start else carry


def _get(x, start, count):
  return x if x.shape[0] == count else jax.lax.dynamic_slice_in_dim(x, start, count)


def _set(x, new, start):
  return new.astype(x.dtype) if x.shape == new.shape else jax.lax.dynamic_update_slice_in_dim(
      x, new.astype(x.dtype), start, 0)
