"""Statistics of the reference that a trainer stores for the certainty-weighted penalty.

    stored = linear_reference_statistics(ref_hidden, ref_embedding, actions, mask=mask)      # once, after the rollout
    loss, metrics = ppo_loss_from_log_probs(log_probs, batch, config, ref_log_probs=stored.log_prob,
                                            certainty=stored.certainty)

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import partitioned
from critkl_jax.ops.weighted_kl.arguments import check_shape, checked_mask, known_actions
from critkl_jax.ops.weighted_kl.chunked import MEMORY_BUDGET, Tile, pick_tile
from critkl_jax.ops.weighted_kl.meshes import (
    check_axis_name,
    compiler_partitions,
    is_spread,
    on_each_device,
    refuse_axis_name,
)
from critkl_jax.ops.weighted_kl.operands import biased_and_capped, dot
from critkl_jax.ops.weighted_kl.plain import at_action
from critkl_jax.ops.weighted_kl.statistics import LOG_PROB_FLOOR, finite, nan_unless
from critkl_jax.pytree import PyTreeNode
from critkl_jax.rl.certainties import certainty_of_statistics


class ReferenceStatistics(PyTreeNode):
  """Statistics of each token under the reference, float32 `[...]` each, without gradient; 0 where masked.

  Attributes:
    log_prob: log pi_ref(a) of the token's action in nats, at least `LOG_PROB_FLOOR`; NaN for an action outside the
      vocabulary.
    entropy: entropy of the reference in nats, at `temperature`.
    certainty: certainty J of the reference, between 0 and 1, at `certainty_temperature`; `kl_weight` computes the
      weight of the penalty from it.
  """

  log_prob: chex.Array
  entropy: chex.Array
  certainty: chex.Array


class _Settings(NamedTuple):
  """Settings of both functions; the temperatures may be traced."""

  temperature: chex.Numeric
  certainty: str
  certainty_temperature: chex.Numeric


class _Peaked(PyTreeNode):
  """Sums over a part of the vocabulary for logits z, float32 `[..., 1]` each, with e = exp(z - max z).

  Attributes:
    peak: max z.
    sum_e: sum e.
    sum_ez: sum e (z - max z).
  """

  peak: chex.Array
  sum_e: chex.Array
  sum_ez: chex.Array


class _Sums(PyTreeNode):
  """Sums over a part of the vocabulary at both temperatures.

  Attributes:
    own: sums at the temperature of the actions.
    sure: sums at the certainty temperature; None if the temperatures are equal.
    action_logit: float32 `[..., 1]` logit of the action; 0 if the action is in another part.
  """

  own: _Peaked
  sure: _Peaked | None
  action_logit: chex.Array


def reference_statistics(logits: chex.Array, actions: chex.Array, *, temperature: chex.Numeric = 1.0,
                         certainty: str = 'negentropy', certainty_temperature: chex.Numeric = 1.0,
                         mask: chex.Array | None = None) -> ReferenceStatistics:
  """Computes log-probability, entropy and certainty of each token under the reference.

  Args:
    logits: float `[..., V]` of the reference; -inf rules a token out.
    actions: int32 `[...]` sampled tokens, 0..V-1; an unmasked id outside the vocabulary makes `log_prob` NaN.
    temperature: the temperature at which the actions were drawn, `LossConfig.temperature`. Both temperatures may be
      traced.
    certainty: `negentropy`, `min_entropy` or `max_prob`, as in `critkl_jax.certainty`.
    certainty_temperature: temperature at which the certainty is measured, `LossConfig.certainty_temperature`.
    mask: bool `[...]`; where it is false, logits and actions may be anything, NaN included, and the results are 0.
      None: all true.

  Returns:
    `ReferenceStatistics`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, or the certainty is unknown.
  """
  check_shape('actions', actions.shape, logits.shape[:-1])
  settings = _Settings(temperature, certainty, certainty_temperature)
  keep = _keep(mask, actions)
  ids, known = known_actions(actions, logits.shape[-1])
  logits = jnp.where(keep[..., None], jax.lax.stop_gradient(logits), 0).astype(jnp.float32)
  return _finished(_part_sums(logits, ids, settings), known, keep, logits.shape[-1], settings)


def linear_reference_statistics(hidden: chex.Array, embedding: chex.Array, actions: chex.Array, *,
                                bias: chex.Array | None = None, soft_cap: float | None = None,
                                temperature: chex.Numeric = 1.0, certainty: str = 'negentropy',
                                certainty_temperature: chex.Numeric = 1.0, mask: chex.Array | None = None,
                                axis_name: str | None = None, memory_budget: int = MEMORY_BUDGET
                                ) -> ReferenceStatistics:
  """Like `reference_statistics`, from hidden states: never holds all logits `hidden @ embedding.T`.

  Args:
    hidden: float `[..., D]` last hidden states of the reference.
    embedding: float `[V, D]` output embedding of the reference, of the same dtype.
    actions: int32 `[...]` as in `reference_statistics`.
    bias: float `[V]` added to the logits before the soft cap; -inf rules a token out.
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`, before the temperature; None: no cap.
    temperature: as in `reference_statistics`.
    certainty: as in `reference_statistics`.
    certainty_temperature: as in `reference_statistics`.
    mask: as in `reference_statistics`, with hidden states in place of logits.
    axis_name: inside `shard_map`, the mesh axis over which the vocabulary is spread, as in `linear_weighted_kl`.
    memory_budget: most bytes of float32 logits that are held at a time, on each device.

  Returns:
    `ReferenceStatistics`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, the certainty is unknown, `soft_cap` is not positive, or `embedding` is not
      spread over `axis_name`; for arrays on Explicit mesh axes, if `axis_name` is given, or if they are not spread as
      `linear_weighted_kl` describes.
  """
  check_shape('actions', actions.shape, hidden.shape[:-1])
  check_shape('embedding', embedding.shape, (embedding.shape[0], hidden.shape[-1]))
  if bias is not None:
    check_shape('bias', bias.shape, embedding.shape[:1])
  if soft_cap is not None and not soft_cap > 0:
    raise ValueError(f'soft_cap: expected a positive number or None, got {soft_cap}.')
  hidden, embedding, bias = jax.lax.stop_gradient((hidden, embedding, bias))
  options = {'soft_cap': soft_cap, 'temperature': temperature, 'certainty': certainty,
             'certainty_temperature': certainty_temperature, 'memory_budget': memory_budget}
  of_tokens, tables = {'actions': actions, 'hidden': hidden, 'mask': mask}, {'embedding': embedding, 'bias': bias}
  if is_spread(*of_tokens.values(), *tables.values()):
    refuse_axis_name(axis_name)
    return on_each_device(
        lambda of_tokens, tables, axes: linear_reference_statistics(**of_tokens, **tables, axis_name=axes, **options),
        of_tokens, tables, actions.ndim)

  if axis_name is not None:
    check_axis_name(axis_name, embedding)
  settings = _Settings(temperature, certainty, certainty_temperature)
  keep, own_vocab = _keep(mask, actions), len(embedding)
  vocab_size = own_vocab * (1 if axis_name is None else jax.lax.axis_size(axis_name))
  ids, known = known_actions(actions.reshape(-1), vocab_size)
  ids = ids - own_vocab * (0 if axis_name is None else jax.lax.axis_index(axis_name))
  states = jnp.where(keep[..., None], hidden, 0).reshape(-1, hidden.shape[-1])

  def logits_of(states, embedding, bias):
    return biased_and_capped(dot(states, embedding, (1, 1)), bias, soft_cap)

  if axis_name is None and compiler_partitions():
    length = actions.shape[-1] if actions.ndim else 1
    steps = partitioned.pick_steps(ids.size, length, vocab_size, 2 * memory_budget)
    sums = partitioned.in_steps(lambda states, ids: _part_sums(logits_of(states, embedding, bias), ids, settings),
                                (states, ids), steps, length)
  else:
    tile = pick_tile(ids.size, own_vocab, 2 * memory_budget)
    sums = _in_tiles(logits_of, states, embedding, bias, ids, tile, settings)
  sums = _of_all_devices(sums, axis_name)
  known, sums = known.reshape(actions.shape), jax.tree.map(lambda x: x.reshape(*actions.shape, 1), sums)
  return _finished(sums, known, keep, vocab_size, settings)


def _in_tiles(logits_of, states, embedding, bias, ids, tile: Tile, settings: _Settings) -> _Sums:
  """Computes the sums over the vocabulary, some tokens and a block of the vocabulary at a time."""
  own_vocab, num_tokens = len(embedding), ids.size
  count, rest = divmod(own_vocab, tile.vocabulary)

  def of_part(states, ids, first, size):
    part = jax.lax.dynamic_slice_in_dim(embedding, first, size)
    own_bias = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, first, size)
    return _part_sums(logits_of(states, part, own_bias), ids - first, settings)

  def of_tokens(tokens):
    states, ids = tokens
    start = of_part(states, ids, 0, rest or tile.vocabulary)
    first = rest or tile.vocabulary
    return jax.lax.fori_loop(
        0, count - (not rest), lambda j, sums: _merged(sums, of_part(
            states, ids, first + j * tile.vocabulary, tile.vocabulary)), start)

  if tile.tokens >= num_tokens:
    return of_tokens((states, ids))
  missing = -num_tokens % tile.tokens
  parts = (jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, tile.tokens, *x.shape[1:])
           for x in (states, ids))
  sums = jax.lax.map(of_tokens, tuple(parts))
  return jax.tree.map(lambda x: x.reshape(-1, 1)[:num_tokens], sums)


def _part_sums(logits, ids, settings: _Settings) -> _Sums:
  """Computes the sums over the entries of a part of the vocabulary; `ids` count from its first entry."""
  at_first = _same_temperature(settings)
  z = finite(logits / settings.temperature)
  inside = (ids >= 0) & (ids < z.shape[-1])
  found = jnp.where(inside[..., None], at_action(z, jnp.where(inside, ids, 0)), 0.0)
  sure = None if at_first else _peaked(finite(logits / settings.certainty_temperature))
  return _Sums(own=_peaked(z), sure=sure, action_logit=found)


def _peaked(z) -> _Peaked:
  peak = jnp.max(z, -1, keepdims=True)
  above = z - peak
  e = jnp.exp(above)
  return _Peaked(peak, jnp.sum(e, -1, keepdims=True), jnp.sum(e * above, -1, keepdims=True))


def _merged(one: _Sums, two: _Sums) -> _Sums:
  sure = None if one.sure is None else _joined(one.sure, two.sure)
  return _Sums(_joined(one.own, two.own), sure, one.action_logit + two.action_logit)


def _joined(one: _Peaked, two: _Peaked) -> _Peaked:
  peak = jnp.maximum(one.peak, two.peak)
  return jax.tree.map(jnp.add, _moved(one, peak), _moved(two, peak)).replace(peak=peak)


def _moved(x: _Peaked, peak) -> _Peaked:
  """Rescales sums to a peak that is at least their own."""
  down = x.peak - peak
  scale = jnp.exp(down)
  return _Peaked(peak, scale * x.sum_e, scale * (x.sum_ez + down * x.sum_e))


def _of_all_devices(sums: _Sums, axis_name) -> _Sums:
  """Adds the sums over the parts of the vocabulary of all devices of a mesh axis."""
  if axis_name is None:
    return sums

  def joined(x):
    peak = jax.lax.pmax(x.peak, axis_name)
    moved = _moved(x, peak)
    return _Peaked(peak, *jax.lax.psum((moved.sum_e, moved.sum_ez), axis_name))

  return _Sums(joined(sums.own), None if sums.sure is None else joined(sums.sure),
               jax.lax.psum(sums.action_logit, axis_name))


def _finished(sums: _Sums, known, keep, vocab_size, settings: _Settings) -> ReferenceStatistics:
  """Makes the public record of shape `[...]` from sums `[..., 1]`."""
  own, sure = sums.own, sums.own if sums.sure is None else sums.sure
  log_sum, sure_log_sum = jnp.log(own.sum_e), jnp.log(sure.sum_e)
  log_prob = nan_unless(known[..., None], jnp.maximum(sums.action_logit - own.peak - log_sum, LOG_PROB_FLOOR))
  certainty = certainty_of_statistics(sure_log_sum - sure.sum_ez / sure.sum_e, -sure_log_sum, vocab_size,
                                      settings.certainty)
  found = ReferenceStatistics(log_prob=log_prob, entropy=log_sum - own.sum_ez / own.sum_e, certainty=certainty)
  return jax.tree.map(lambda x: jnp.where(keep, jax.lax.stop_gradient(x)[..., 0], 0.0), found)


def _same_temperature(settings):
  one, two = settings.temperature, settings.certainty_temperature
  return isinstance(one, int | float) and isinstance(two, int | float) and one == two


def _keep(mask, actions):
  return jnp.ones_like(actions, bool) if mask is None else checked_mask(mask, actions.shape)
