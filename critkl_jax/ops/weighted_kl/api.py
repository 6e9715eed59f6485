"""The certainty-weighted KL of each token, from logits or from hidden states and embeddings.

    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=150.0)
    penalty = masked_mean(record.weight * record.kl, mask)

This file checks arguments and picks an implementation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.confidence import certainty_of_statistics, kl_weight
from critkl_jax.ops.weighted_kl import chunked, linear, reference
from critkl_jax.ops.weighted_kl.logits import fused_row
from critkl_jax.ops.weighted_kl.operands import (
    Operands,
    Settings,
    Side,
    raw_logits,
    scaled,
    spread_like,
    varying_axes,
)
from critkl_jax.ops.weighted_kl.statistics import Row, WeightedKL, in_vocabulary, nan_unless

LOGIT_IMPLEMENTATIONS = ('reference', 'fused')
LINEAR_IMPLEMENTATIONS = (*LOGIT_IMPLEMENTATIONS, *linear.FORWARD)
SMALL_VOCABULARY = 1024  # below it whole logits are no burden


class _Weighting(NamedTuple):
  """How the weight follows from what is known of the reference; the numbers may be traced."""

  kind: str
  exponent: chex.Numeric
  intercept: chex.Numeric
  vocab_size: int


def weighted_kl(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array, *, exponent: chex.Numeric,
                intercept: chex.Numeric = 0.0, temperature: chex.Numeric = 1.0, certainty: str = 'negentropy',
                certainty_temperature: chex.Numeric = 1.0, mask: chex.Array | None = None,
                implementation: str | None = None) -> WeightedKL:
  """Returns log-probability, entropy, exact KL, certainty and weight of each token, from logits.

  `KL_t = sum_i pi(i) (log pi(i) - log pi_ref(i))`, `w_t = (1 - c) J_t^beta + c` (Vassoyan et al., arXiv 2502.06533,
  section 5). Gradients flow from `log_prob`, `entropy` and `kl` to `logits` and to nothing else.

  Args:
    logits: float `[..., V]` of the policy; -inf rules a token out.
    ref_logits: float `[..., V]` of the reference.
    actions: int32 `[...]` sampled tokens, 0..V-1; of others `log_prob` and `ref_log_prob` are NaN, and so are the
      gradients through them, but where masked.
    exponent: beta; this and the other numbers may be traced.
    intercept: c, at most 1.
    temperature: of policy and reference, more than 0.
    certainty: `negentropy`, `min_entropy` or `max_prob`, as in `critkl_jax.certainty`.
    certainty_temperature: temperature at which the reference's certainty is taken.
    mask: bool `[...]`; where it is false the logits may hold anything, NaN included, results are 0, and there is no
      gradient. All true if None.
    implementation: `reference` (plain JAX), `fused` (its gradient written by hand, which keeps no `[..., V]` array but
      the arguments), or None for the one that `pick_implementation` names.

  Returns:
    `WeightedKL`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, or the certainty or the implementation is unknown.
  """
  _check('actions', actions.shape, logits.shape[:-1])
  _check('ref_logits', ref_logits.shape, logits.shape)
  vocab_size = logits.shape[-1]
  chosen = _chosen(implementation, LOGIT_IMPLEMENTATIONS, pick_implementation(vocab_size, from_logits=True))
  keep = _flat_mask(mask, actions.shape)
  flat, ref_flat = (_masked(x.reshape(-1, vocab_size), keep) for x in (logits, jax.lax.stop_gradient(ref_logits)))
  ids, known = _known_actions(actions, vocab_size)
  one_temperature, *temperatures = _temperatures(temperature, certainty_temperature)
  row = _row_of_logits(chosen, one_temperature, flat, ref_flat, ids, *temperatures)
  weighting = _Weighting(certainty, exponent, intercept, vocab_size)
  return _shaped(_record(row, known, weighting), keep, actions.shape)


def linear_weighted_kl(hidden: chex.Array, embedding: chex.Array, ref_hidden: chex.Array, ref_embedding: chex.Array,
                       actions: chex.Array, *, exponent: chex.Numeric, intercept: chex.Numeric = 0.0,
                       temperature: chex.Numeric = 1.0, certainty: str = 'negentropy',
                       certainty_temperature: chex.Numeric = 1.0, bias: chex.Array | None = None,
                       ref_bias: chex.Array | None = None, soft_cap: float | None = None,
                       mask: chex.Array | None = None, axis_name: str | None = None,
                       implementation: str | None = None, memory_budget: int = chunked.MEMORY_BUDGET) -> WeightedKL:
  """Returns what `weighted_kl` does for logits `hidden @ embedding.T`, without ever holding them all.

  Gradients flow from `log_prob`, `entropy` and `kl` to `hidden`, `embedding` and `bias` and to nothing else.

  Args:
    hidden: float `[..., D]` last hidden states of the policy.
    embedding: float `[V, D]` its output embedding, of the same type.
    ref_hidden: float `[..., D_ref]` of the reference.
    ref_embedding: float `[V, D_ref]` of the reference.
    actions: int32 `[...]` sampled tokens, 0..V-1; of others `log_prob` and `ref_log_prob` are NaN, and so are the
      gradients through them, but where masked.
    exponent: beta; this and the other numbers, but for the soft cap, may be traced.
    intercept: c, at most 1.
    temperature: of policy and reference, more than 0.
    certainty: `negentropy`, `min_entropy` or `max_prob`.
    certainty_temperature: temperature at which the reference's certainty is taken.
    bias: float `[V]` added to the policy's logits before the soft cap; -inf rules a token out.
    ref_bias: float `[V]` added to the reference's logits.
    soft_cap: logits u become `soft_cap * tanh(u / soft_cap)`, before the temperature; None leaves them.
    mask: bool `[...]`; where it is false hidden states may hold anything, NaN included, results are 0, and there is no
      gradient. All true if None.
    axis_name: inside `shard_map`, the mesh axis over which the vocabulary is spread: embeddings and biases are then
      this device's equal part of it; hidden states are the same on all its devices, and so are the results.
    implementation: `reference` or `fused` (whole logits, as in `weighted_kl`), `chunked` (plain JAX, some of the logits
      at a time), `pallas_tpu`, `pallas_gpu` (Triton, for NVIDIA GPUs), or None for the one that `pick_implementation`
      names. A kernel on another backend than its own does not compile.
    memory_budget: bytes of the logits that `chunked` holds at a time, at most.

  Returns:
    `WeightedKL`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, or the certainty or the implementation is unknown, or one with whole logits is
      asked for a part of the vocabulary.
  """
  plan, operands, weighting, keep, known = _prepare(
      hidden, embedding, ref_hidden, ref_embedding, actions, exponent=exponent, intercept=intercept,
      temperature=temperature, certainty=certainty, certainty_temperature=certainty_temperature, bias=bias,
      ref_bias=ref_bias, soft_cap=soft_cap, mask=mask, axis_name=axis_name, implementation=implementation,
      memory_budget=memory_budget)
  return _shaped(_record(_row(plan, operands), known, weighting), keep, actions.shape)


def linear_weighted_kl_loss(token_loss: Callable[..., chex.Array], hidden: chex.Array, embedding: chex.Array,
                            ref_hidden: chex.Array, ref_embedding: chex.Array, actions: chex.Array, *extra: chex.Array,
                            **options: Any) -> tuple[chex.Array, WeightedKL]:
  """Returns the sum over tokens of a loss of each token, its gradient taken while the logits are at hand.

  The same as `jnp.sum(token_loss(linear_weighted_kl(...), *extra))` over the unmasked tokens. Where the memory budget
  allows `chunked` its token mode (`chunked.pick_held`) no logit is computed twice: 8 N D V operations instead of
  12.

  Args:
    token_loss: `(record, *extra) -> losses`, for any number K of tokens: the fields of the record are float32 `[K]`, so
      are the losses, and that of a token depends on this token alone. It may close over traced values; no gradient
      flows into them.
    hidden: float `[..., D]`; this and the others up to the actions as in `linear_weighted_kl`.
    embedding: float `[V, D]`.
    ref_hidden: float `[..., D_ref]`.
    ref_embedding: float `[V, D_ref]`.
    actions: int32 `[...]`.
    *extra: arrays whose shape begins with that of `actions`, such as advantages; no gradient flows into them.
    **options: the keyword arguments of `linear_weighted_kl`.

  Returns:
    `(loss, record)`, float32 `[]` and a `WeightedKL` that carries no gradient.

  Raises:
    ValueError: as `linear_weighted_kl`, and if an array of `extra` has another shape.
  """
  for array in extra:
    _check('extra', array.shape[:actions.ndim], actions.shape)
  plan, operands, weighting, keep, known = _prepare(hidden, embedding, ref_hidden, ref_embedding, actions, **options)
  extra = [jax.lax.stop_gradient(x).reshape(actions.size, *x.shape[actions.ndim:]) for x in extra]
  extra = (jnp.ones(actions.size, bool) if keep is None else keep, known, *extra)

  def row_loss(row, keep, known, *extra):
    return jnp.where(keep, token_loss(_shaped(_record(row, known, weighting), keep, keep.shape), *extra), 0.0)

  if plan.implementation == 'chunked' and plan.held and plan.settings.axis_name is None:
    some = [jnp.zeros((plan.held.tokens, *x.shape[1:]), x.dtype) for x in extra]
    examples = spread_like(operands, (Row.zeros(plan.held.tokens), *some))
    row_loss, closed_over = jax.closure_convert(row_loss, *examples)
    loss, row = linear.accumulated(plan, row_loss, operands.policy, operands, extra, closed_over)
  else:
    row = _row(plan, operands)
    loss = jnp.sum(row_loss(row, *extra))
  return loss, jax.lax.stop_gradient(_shaped(_record(row, known, weighting), keep, actions.shape))


def pick_implementation(vocab_size: int, *, from_logits: bool, backend: str | None = None) -> str:
  """Returns the implementation that is taken if none is named.

  Args:
    vocab_size: V.
    from_logits: whether for `weighted_kl`, or for the operations on hidden states.
    backend: `cpu`, `tpu` or `gpu`; that of the default device if None.

  Raises:
    ValueError: if the backend is another one.
  """
  if backend not in (None, 'cpu', 'tpu', 'gpu'):
    raise ValueError(f"backend: expected 'cpu', 'tpu', 'gpu' or None, got {backend!r}.")
  if from_logits or vocab_size < SMALL_VOCABULARY:
    return 'fused'
  # On GPUs the kernel has to be named: it has been compiled for them, but not yet timed against the plain program.
  return 'pallas_tpu' if (backend or jax.default_backend()) == 'tpu' else 'chunked'


def _prepare(hidden, embedding, ref_hidden, ref_embedding, actions, *, exponent, intercept=0.0, temperature=1.0,
             certainty='negentropy', certainty_temperature=1.0, bias=None, ref_bias=None, soft_cap=None, mask=None,
             axis_name=None, implementation=None, memory_budget=chunked.MEMORY_BUDGET):
  """Checks and flattens the arguments of an operation on hidden states."""
  vocab_size = embedding.shape[0]
  for name, given, table, offset in (('', hidden, embedding, bias), ('ref_', ref_hidden, ref_embedding, ref_bias)):
    _check(f'{name}hidden', given.shape[:-1], actions.shape)
    _check(f'{name}embedding', table.shape, (vocab_size, given.shape[-1]))
    if offset is not None:
      _check(f'{name}bias', offset.shape, (vocab_size,))
  if soft_cap is not None and not soft_cap > 0:
    raise ValueError(f'soft_cap: expected a positive number or None, got {soft_cap}.')
  usual = pick_implementation(vocab_size, from_logits=False)
  if axis_name is not None:
    usual = 'chunked' if usual in LOGIT_IMPLEMENTATIONS else usual
    if axis_name not in varying_axes(embedding):
      raise ValueError(f'axis_name: expected an embedding spread over {axis_name!r}, in a shard_map that checks it '
                       '(check_vma=True).')
  chosen = _chosen(implementation, LINEAR_IMPLEMENTATIONS, usual)
  if axis_name is not None and chosen in LOGIT_IMPLEMENTATIONS:
    raise ValueError(f'implementation: {chosen!r} needs the whole vocabulary, got an axis_name.')

  keep = _flat_mask(mask, actions.shape)
  states, ref_states = (_masked(x.reshape(-1, x.shape[-1]), keep) for x in (hidden, ref_hidden))
  all_vocab = vocab_size * (1 if axis_name is None else jax.lax.axis_size(axis_name))
  actions, known = _known_actions(actions, all_vocab)
  if axis_name is not None:
    actions = actions - vocab_size * jax.lax.axis_index(axis_name)
  one_temperature, temperature, certainty_temperature = _temperatures(temperature, certainty_temperature)
  ref_side = jax.lax.stop_gradient(Side(ref_states, ref_embedding, ref_bias))
  operands = Operands(Side(states, embedding, bias), ref_side, actions, temperature, certainty_temperature)
  plan = linear.Plan(chosen, Settings(soft_cap, one_temperature, axis_name),
                     chunked.pick_tile(actions.shape[0], vocab_size, memory_budget),
                     chunked.pick_held(actions.shape[0], vocab_size, memory_budget))
  return plan, operands, _Weighting(certainty, exponent, intercept, all_vocab), keep, known


def _row(plan: linear.Plan, operands: Operands) -> Row:
  if plan.implementation not in LOGIT_IMPLEMENTATIONS:
    return linear.row_of(plan, operands.policy, operands)
  one_temperature = plan.settings.one_temperature
  return _row_of_logits(plan.implementation, one_temperature, *raw_logits(operands, plan.settings), operands.actions,
                        operands.temperature, operands.certainty_temperature)


def _row_of_logits(implementation, one_temperature, logits, ref_logits, actions, temperature, certainty_temperature):
  if implementation == 'fused':
    return fused_row(one_temperature, logits, ref_logits, actions, temperature, certainty_temperature)
  return reference.row_of_logits(
      *scaled(logits, ref_logits, temperature, certainty_temperature, one_temperature), actions)


def _record(row: Row, known: chex.Array, weighting: _Weighting) -> WeightedKL:
  """Returns the public record, `[N, 1]` each; `known` `[N]` says whose actions are in the vocabulary."""
  fixed = jax.lax.stop_gradient
  sure = certainty_of_statistics(fixed(row.sure_entropy), fixed(row.sure_log_max), weighting.vocab_size, weighting.kind)
  log_prob, ref_log_prob = (nan_unless(known[:, None], x) for x in (row.log_prob, row.ref_log_prob))
  return WeightedKL(log_prob=log_prob, ref_log_prob=fixed(ref_log_prob), entropy=row.entropy, kl=row.kl,
                    certainty=sure, weight=kl_weight(sure, weighting.exponent, weighting.intercept))


def _shaped(record, keep, shape):
  keep = jnp.ones(shape, bool) if keep is None else keep.reshape(shape)
  return jax.tree.map(lambda x: jnp.where(keep, x.reshape(shape), 0.0), record)


def _flat_mask(mask, shape):
  if mask is None:
    return None
  _check('mask', mask.shape, shape)
  return mask.reshape(-1).astype(bool)


def _known_actions(actions, vocab_size):
  """Returns actions `[N]`, 0 for those that no vocabulary has, so that all implementations see what exists, and where
  they are in the vocabulary."""
  actions = actions.reshape(-1)
  known = in_vocabulary(actions, vocab_size)
  return jnp.where(known, actions, 0), known


def _masked(x, keep):
  return x if keep is None else jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def _temperatures(temperature, certainty_temperature):
  """Returns whether the two are known to be one number, and both as arrays without gradient."""
  known = all(isinstance(x, int | float) for x in (temperature, certainty_temperature))
  arrays = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (temperature, certainty_temperature))
  return (known and temperature == certainty_temperature), *arrays


def _chosen(implementation, known, usual):
  if implementation is None:
    return usual
  if implementation not in known:
    raise ValueError(f'implementation: expected one of {known} or None, got {implementation!r}.')
  return implementation


def _check(name, shape, expected):
  if tuple(shape) != tuple(expected):
    raise ValueError(f'{name}: expected shape {tuple(expected)} to agree with the others, got {tuple(shape)}.')
