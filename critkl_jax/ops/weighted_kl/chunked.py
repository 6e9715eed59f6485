"""The operation in plain JAX, a tile of the logits at a time: for any backend, without any `[R, V]` array.

Vocabulary mode (`forward`, `backward`) takes all tokens, or as many as fit, and loops over blocks of the vocabulary;
the gradient computes the logits of each tile again, 12 R D V operations in all. The loop starts with the remainder of
the vocabulary, so that no block needs a mask.

Token mode (`accumulate`) is given the per-token loss: for a few tokens at a time it holds the logits of the whole
vocabulary and replaces them with their gradients, 8 R D V operations in all.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width; `block`, entries of a block of the
vocabulary.
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
LANES = 128  # on accelerators, blocks of the vocabulary are multiples of this
CACHED_ENTRIES = 2**19  # logits processed at a time on a CPU: more do not fit its cache
CACHE_LINE = 16  # float32 numbers
MOST_VOCABULARY = 2048  # entries of a block: the gradients of as many embedding rows are held with the logits
# Fewest tokens of token mode: with fewer, reading the embedding takes longer than multiplying with it.
FEWEST_TOKENS, FEWEST_TOKENS_ON_CPU = 256, 32


class Tile(NamedTuple):
  """Shape of the logits that vocabulary mode holds at a time: number of tokens, entries of the vocabulary."""

  tokens: int
  vocabulary: int


class Held(NamedTuple):
  """Sizes of token mode, which holds all logits of `tokens` tokens at a time.

  Attributes:
    tokens: tokens held at a time; all tokens are divided into equal parts.
    rows: tokens processed at a time between the matrix products.
    vocabulary: vocabulary entries whose gradients are computed at a time.
  """

  tokens: int
  rows: int
  vocabulary: int


def pick_tile(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET, backend: str | None = None) -> Tile:
  """Chooses the tile of vocabulary mode.

  It has all tokens, or fewer if the logits of all tokens for `LANES` vocabulary entries exceed the budget or, on a CPU,
  its cache.

  Args:
    num_tokens: R.
    vocab_size: V.
    memory_budget: bytes for the float32 logits of policy and reference; a few more arrays of their size are needed.
    backend: `cpu`, `tpu` or `gpu`; None: the default backend.
  """
  backend = backend or jax.default_backend()
  entries = _worked_on(max(memory_budget // 8, LANES), backend)
  tokens = _even(num_tokens, max(entries // min(LANES, vocab_size), 1))
  return Tile(tokens, _block(entries // tokens, vocab_size, backend))


def pick_held(num_tokens: int, vocab_size: int, memory_budget: int = MEMORY_BUDGET, backend: str | None = None
              ) -> Held | None:
  """Chooses the sizes of token mode: as many tokens as fit, or None if vocabulary mode is faster for so few.

  Arguments as in `pick_tile`.
  """
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
  """Returns the size, at most `most`, of equal parts of `total` tokens; 1 for no tokens."""
  return _count(total, _count(total, most)) if total else 1


def _block(most, vocab_size, backend):
  block = min(max(most // LANES, 1) * LANES, MOST_VOCABULARY)
  # Rows at a distance of a power of two map to the same lines of a CPU's cache.
  return min(block - CACHE_LINE if backend == 'cpu' else block, vocab_size)


def forward(operands: Operands, settings: Settings, tile: Tile) -> Sums:
  """Computes the sums over the vocabulary for each token, float32 `[R, 1]` each."""
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
  """Computes the gradients of the policy's hidden states, embedding and bias.

  Args:
    operands: the arrays.
    settings: static settings.
    tile: tokens and vocabulary held at a time.
    row: statistics of each token over the whole vocabulary.
    cotangents: cotangents of each token.

  Returns:
    A `Side` of gradients; embedding and bias gradients are float32 if several tiles of tokens are summed.
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
  """Computes the summed loss of all tokens and its gradients in one pass over the tokens.

  Args:
    operands: the arrays, with the whole vocabulary.
    settings: static settings.
    held: sizes of token mode.
    row_loss: `(row, *extra) -> losses [held.tokens]`, for the tokens held at a time.
    extra: arrays `[R, ...]`.
    with_grads: whether to compute gradients.

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
  """Computes the sums over the vocabulary from the products `found`, `size` rows at a time."""

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
  """Adds the gradients of the held tokens, from token `start` on, computed from the products `found`."""
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
  """Computes the sums over the vocabulary for the tokens of one tile."""
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
  """Adds the gradients of the tokens of one tile, from token `start` on."""
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
  """Adds the gradients of embedding and bias from entry `first` on, given the gradient `[R, block]` of the logits."""
  return grads.replace(
      embedding=add_rows(grads.embedding, _sum_over_tokens(gradient, hidden), first),
      bias=None if grads.bias is None else add_rows(grads.bias, jnp.sum(gradient, 0), first))


def _sum_over_tokens(gradient, hidden):
  """Contracts `[R, block]` and `[R, D]` over R to float32 `[block, D]`.

  XLA on a CPU contracts the first axis of the first factor slowly, so that factor is transposed beforehand, or instead
  the second factor and the result if these are smaller.
  """
  if jax.default_backend() != 'cpu':
    return dot(gradient, hidden, (0, 0))
  apart = jax.lax.optimization_barrier  # keeps XLA from merging the transposition into the product
  if gradient.shape[0] > hidden.shape[1]:
    return apart(dot(apart(hidden.T), gradient, (1, 0))).T
  return dot(apart(gradient.T), hidden, (1, 0))


def _no_grads(operands: Operands, summed_once: bool) -> Side:
  """Makes zero gradients, in float32 if more than one tile of tokens is summed."""
  policy = operands.policy
  grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if summed_once else jnp.float32), policy)
  return spread_like(operands, grads.replace(hidden=jnp.zeros(policy.hidden.shape, policy.hidden.dtype)))


def _part_of(operands, first, size):
  """Slices the operands to `size` vocabulary entries from `first` on."""
  policy, reference = (
      side.replace(**jax.tree.map(lambda x: _get(x, first, size), {'embedding': side.embedding, 'bias': side.bias}))
      for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference)


def _block_sums(operands, logits, first, actions):
  """Computes the sums over the vocabulary entries from `first` on, given their logits z, v and v_sure."""
  z, v, v_sure = logits
  sums = block_sums(z, v, v_sure, None, can_rule_out=operands.reference.bias is not None)
  return sums.replace(action_logit=_at_action(z, first, actions), ref_action_logit=_at_action(v, first, actions))


def _at_action(logits, first, actions):
  """Gathers the logits `[R, 1]` of actions among the entries from `first` on; 0 for actions elsewhere."""
  place = actions[:, None] - first
  inside = (place >= 0) & (place < logits.shape[1])
  return jnp.where(inside, jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), 1), 0.0)


def _tokens_of(operands, start, count):
  """Slices the operands to `count` tokens from `start` on."""
  policy, reference = (side.replace(hidden=_get(side.hidden, start, count))
                       for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference, actions=_get(operands.actions, start, count))


def _filled_up(operands, size):
  """Pads operands with tokens of zeros, so that the number of tokens is a multiple of `size`."""
  policy, reference = (side.replace(hidden=_with_zeros(side.hidden, size))
                       for side in (operands.policy, operands.reference))
  return operands.replace(policy=policy, reference=reference, actions=_with_zeros(operands.actions, size))


def _with_zeros(tree, size):
  """Pads arrays with rows of zeros, so that the number of rows is a multiple of `size`."""
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
  new = new.astype(x.dtype)
  return new if x.shape == new.shape else jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
