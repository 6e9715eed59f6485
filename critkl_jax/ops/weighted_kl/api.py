"""The certainty-weighted KL of each token, from logits or from hidden states and embeddings.

    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=150.0)
    penalty = masked_mean(record.weight * record.kl, mask)

This module checks arguments and picks an implementation.

Letters: R rows (tokens of all episodes on one axis), V vocabulary, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from critkl_jax.ops.weighted_kl import chunked, linear, partitioned, plain
from critkl_jax.ops.weighted_kl.arguments import check_shape, checked_mask, known_actions
from critkl_jax.ops.weighted_kl.logits import fused_row
from critkl_jax.ops.weighted_kl.meshes import (
    check_axis_name,
    compiler_partitions,
    is_spread,
    on_each_device,
    refuse_axis_name,
)
from critkl_jax.ops.weighted_kl.operands import Operands, Settings, Side, raw_logits, scaled, spread_like
from critkl_jax.ops.weighted_kl.statistics import Row, TokenStatistics, nan_unless
from critkl_jax.rl.certainties import certainty_of_statistics, kl_weight

LOGIT_IMPLEMENTATIONS = ('plain', 'fused')
LINEAR_IMPLEMENTATIONS = (*LOGIT_IMPLEMENTATIONS, 'partitioned', *linear.FORWARD)
SMALL_VOCABULARY = 1024  # below it, whole logits are cheap to hold


class _Weighting(NamedTuple):
  """Settings of certainty and weight; the numbers may be traced."""

  kind: str
  exponent: chex.Numeric
  intercept: chex.Numeric
  vocab_size: int


def weighted_kl(logits: chex.Array, ref_logits: chex.Array, actions: chex.Array, *, exponent: chex.Numeric,
                intercept: chex.Numeric = 0.0, temperature: chex.Numeric = 1.0, certainty: str = 'negentropy',
                certainty_temperature: chex.Numeric = 1.0, mask: chex.Array | None = None,
                implementation: str | None = None) -> TokenStatistics:
  """Computes log-probability, entropy, exact KL, certainty and weight of each token from logits.

  `KL_t = sum_i pi(i) (log pi(i) - log pi_ref(i))`, `w_t = (1 - c) J_t^beta + c` (Vassoyan et al., arXiv 2502.06533,
  section 5). Gradients flow from `log_prob`, `entropy` and `kl` to `logits` and to nothing else.

  Args:
    logits: float `[..., V]` of the policy; -inf rules a token out.
    ref_logits: float `[..., V]` of the reference.
    actions: int32 `[...]` sampled tokens, 0..V-1; an unmasked id outside the vocabulary makes `log_prob`,
      `ref_log_prob` and the gradients through them NaN.
    exponent: beta; this and the other numbers may be traced.
    intercept: c, at most 1.
    temperature: temperature of policy and reference, greater than 0.
    certainty: `negentropy`, `min_entropy` or `max_prob`, as in `critkl_jax.certainty`.
    certainty_temperature: temperature at which the reference's certainty is measured.
    mask: bool `[...]`; where it is false the logits may be anything, NaN included; results and gradients are 0. None:
      all true.
    implementation: `plain` (plain JAX), `fused` (hand-written gradient, which keeps no `[..., V]` array except the
      arguments), or None for the choice of `pick_implementation`.

  Returns:
    `TokenStatistics`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, or the certainty or the implementation is unknown.
  """
  check_shape('actions', actions.shape, logits.shape[:-1])
  check_shape('ref_logits', ref_logits.shape, logits.shape)
  vocab_size = logits.shape[-1]
  chosen = _chosen(implementation, LOGIT_IMPLEMENTATIONS, pick_implementation(vocab_size, from_logits=True))
  keep = checked_mask(mask, actions.shape)
  logits, ref_logits = (_masked(x, keep) for x in (logits, jax.lax.stop_gradient(ref_logits)))
  ids, known = known_actions(actions, vocab_size)
  one_temperature, *temperatures = _temperatures(temperature, certainty_temperature)
  row = _row_of_logits(chosen, one_temperature, logits, ref_logits, ids, *temperatures)
  weighting = _Weighting(certainty, exponent, intercept, vocab_size)
  return _shaped(_record(row, known, weighting), keep, actions.shape)


def linear_weighted_kl(hidden: chex.Array, embedding: chex.Array, ref_hidden: chex.Array, ref_embedding: chex.Array,
                       actions: chex.Array, *, exponent: chex.Numeric, intercept: chex.Numeric = 0.0,
                       temperature: chex.Numeric = 1.0, certainty: str = 'negentropy',
                       certainty_temperature: chex.Numeric = 1.0, bias: chex.Array | None = None,
                       ref_bias: chex.Array | None = None, soft_cap: float | None = None,
                       mask: chex.Array | None = None, axis_name: str | None = None,
                       implementation: str | None = None, memory_budget: int = chunked.MEMORY_BUDGET
                       ) -> TokenStatistics:
  """Like `weighted_kl`, from hidden states: never holds all logits `hidden @ embedding.T`.

  Gradients flow from `log_prob`, `entropy` and `kl` to `hidden`, `embedding` and `bias` and to nothing else.

  Arrays may be spread over mesh axes of type Explicit: `hidden`, `ref_hidden`, `actions` and `mask` in the same way
  over the axes of the tokens, embeddings and biases in the same way over V, and no array over D.

  Args:
    hidden: float `[..., D]` last hidden states of the policy.
    embedding: float `[V, D]` output embedding of the policy, of the same dtype.
    ref_hidden: float `[..., D_ref]` last hidden states of the reference.
    ref_embedding: float `[V, D_ref]` output embedding of the reference.
    actions: int32 `[...]` sampled tokens, 0..V-1; an unmasked id outside the vocabulary makes `log_prob`,
      `ref_log_prob` and the gradients through them NaN.
    exponent: beta; this and the other numbers, except `soft_cap` and `memory_budget`, may be traced.
    intercept: c, at most 1.
    temperature: temperature of policy and reference, greater than 0.
    certainty: `negentropy`, `min_entropy` or `max_prob`.
    certainty_temperature: temperature at which the reference's certainty is measured.
    bias: float `[V]` added to the policy's logits before the soft cap; -inf rules a token out.
    ref_bias: float `[V]` added to the reference's logits.
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`, before the temperature; None: no cap.
    mask: bool `[...]`; where it is false hidden states may be anything, NaN included; results and gradients are 0.
      None: all true.
    axis_name: inside `shard_map`, the mesh axis over which the vocabulary is spread. Embeddings and biases are then
      this device's equal part of the vocabulary; hidden states and results are equal on all devices of the axis.
    implementation: `plain` or `fused` (whole logits, as in `weighted_kl`), `chunked` (plain JAX, a tile of the logits
      at a time), `partitioned` (plain JAX, for arrays that the compiler partitions), `pallas_tpu`, `pallas_gpu`
      (Triton, for NVIDIA GPUs). A kernel compiles on its own backend only. None: the choice of `pick_implementation`,
      with two exceptions. With an `axis_name`, `chunked` stands in for `fused`. Where the compiler may have to
      partition the program, `partitioned` stands in for `chunked` and the kernels.
    memory_budget: most bytes of logits that `chunked` and `partitioned` hold at a time, on each device.

  Returns:
    `TokenStatistics`, float32 `[...]` each.

  Raises:
    ValueError: if shapes do not agree, the certainty or the implementation is unknown, `soft_cap` is not positive, or
      `embedding` is not spread over `axis_name`; if `plain`, `fused` or `partitioned` is named where V is spread over
      `axis_name` or Explicit axes; if `chunked` or a kernel is named where a mesh in the context has several devices on
      Auto axes; or, for arrays on Explicit axes, if `axis_name` is given or they are not spread as described above.
  """
  options = {'exponent': exponent, 'intercept': intercept, 'temperature': temperature, 'certainty': certainty,
             'certainty_temperature': certainty_temperature, 'soft_cap': soft_cap, 'implementation': implementation,
             'memory_budget': memory_budget}
  of_tokens = {'actions': actions, 'hidden': hidden, 'ref_hidden': ref_hidden, 'mask': mask}
  tables = {'embedding': embedding, 'ref_embedding': ref_embedding, 'bias': bias, 'ref_bias': ref_bias}
  if is_spread(*of_tokens.values(), *tables.values()):
    refuse_axis_name(axis_name)
    return on_each_device(
        lambda of_tokens, tables, axes: linear_weighted_kl(**of_tokens, **tables, axis_name=axes, **options),
        of_tokens, tables, actions.ndim)
  plan, operands, weighting, keep, known = _prepare(**of_tokens, **tables, axis_name=axis_name, **options)
  return _shaped(_record(_row(plan, operands), known, weighting), keep, actions.shape)


def linear_weighted_kl_loss(token_loss: Callable[..., chex.Array], hidden: chex.Array, embedding: chex.Array,
                            ref_hidden: chex.Array, ref_embedding: chex.Array, actions: chex.Array, *extra: chex.Array,
                            **options: Any) -> tuple[chex.Array, TokenStatistics]:
  """Sums a per-token loss, and computes its gradient in the forward pass where memory allows.

  Equal to `jnp.sum(token_loss(linear_weighted_kl(...), *extra))` over the unmasked tokens. The forward pass computes
  the gradient if the implementation is `chunked`, there is no `axis_name`, and the memory budget admits token mode
  (`chunked.pick_held`). Then no logit is computed twice: 8 R D V operations instead of 12 R D V.

  Args:
    token_loss: `(record, *extra) -> losses`, for any number of tokens: record fields and losses are float32
      `[num_tokens]`, and the loss of a token depends on this token alone. It may close over traced values; no gradient
      flows into them.
    hidden: float `[..., D]`; arguments up to `actions` as in `linear_weighted_kl`.
    embedding: float `[V, D]`.
    ref_hidden: float `[..., D_ref]`.
    ref_embedding: float `[V, D_ref]`.
    actions: int32 `[...]`.
    *extra: arrays whose shape begins with that of `actions`, such as advantages; no gradient flows into them.
    **options: the keyword arguments of `linear_weighted_kl`.

  Returns:
    `(loss, record)`, float32 `[]` and a `TokenStatistics` that carries no gradient.

  Raises:
    ValueError: as `linear_weighted_kl`, and if an array of `extra` has another shape.
  """
  for array in extra:
    check_shape('extra', array.shape[:actions.ndim], actions.shape)
  of_tokens = {'actions': actions, 'hidden': hidden, 'ref_hidden': ref_hidden, 'mask': options.get('mask')}
  tables = {'embedding': embedding, 'ref_embedding': ref_embedding, 'bias': options.get('bias'),
            'ref_bias': options.get('ref_bias')}
  if is_spread(*of_tokens.values(), *tables.values(), *extra):
    refuse_axis_name(options.get('axis_name'))
    others = {name: value for name, value in options.items() if name not in ('axis_name', 'mask', 'bias', 'ref_bias')}
    names = [f'extra {i}' for i in range(len(extra))]

    def of_each(of_tokens, tables, axes):
      some = [of_tokens.pop(name) for name in names]
      arrays = of_tokens | tables
      required = [arrays.pop(name) for name in ('hidden', 'embedding', 'ref_hidden', 'ref_embedding', 'actions')]
      return linear_weighted_kl_loss(token_loss, *required, *some, axis_name=axes, **arrays, **others)

    return on_each_device(of_each, of_tokens | dict(zip(names, extra)), tables, actions.ndim, summed=True)
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
    row_loss, closed_over = jax.closure_convert(row_loss, row, *extra)
    loss = jnp.sum(row_loss(row, *extra, *jax.lax.stop_gradient(closed_over)))
  return loss, jax.lax.stop_gradient(_shaped(_record(row, known, weighting), keep, actions.shape))


def pick_implementation(vocab_size: int, *, from_logits: bool, backend: str | None = None) -> str:
  """Returns the default implementation on one device.

  Args:
    vocab_size: V.
    from_logits: True for `weighted_kl`, False for the operations on hidden states.
    backend: `cpu`, `tpu` or `gpu`; None: the default backend.

  Raises:
    ValueError: if the backend is unknown.
  """
  if backend not in (None, 'cpu', 'tpu', 'gpu'):
    raise ValueError(f"backend: expected 'cpu', 'tpu', 'gpu' or None, got {backend!r}.")
  if from_logits or vocab_size < SMALL_VOCABULARY:
    return 'fused'
  # The GPU kernel is used only if named: it has been compiled for GPUs, but not yet timed against `chunked`.
  return 'pallas_tpu' if (backend or jax.default_backend()) == 'tpu' else 'chunked'


def _prepare(hidden, embedding, ref_hidden, ref_embedding, actions, *, exponent, intercept=0.0, temperature=1.0,
             certainty='negentropy', certainty_temperature=1.0, bias=None, ref_bias=None, soft_cap=None, mask=None,
             axis_name=None, implementation=None, memory_budget=chunked.MEMORY_BUDGET):
  """Checks and flattens the arguments of an operation on hidden states."""
  vocab_size = embedding.shape[0]
  for name, given, table, offset in (('', hidden, embedding, bias), ('ref_', ref_hidden, ref_embedding, ref_bias)):
    check_shape(f'{name}hidden', given.shape[:-1], actions.shape)
    check_shape(f'{name}embedding', table.shape, (vocab_size, given.shape[-1]))
    if offset is not None:
      check_shape(f'{name}bias', offset.shape, (vocab_size,))
  if soft_cap is not None and not soft_cap > 0:
    raise ValueError(f'soft_cap: expected a positive number or None, got {soft_cap}.')
  usual = pick_implementation(vocab_size, from_logits=False)
  if axis_name is None:
    usual = 'partitioned' if usual not in LOGIT_IMPLEMENTATIONS and compiler_partitions() else usual
  else:
    usual = 'chunked' if usual in LOGIT_IMPLEMENTATIONS else usual
    check_axis_name(axis_name, embedding)
  chosen = _chosen(implementation, LINEAR_IMPLEMENTATIONS, usual)
  if axis_name is not None and chosen in (*LOGIT_IMPLEMENTATIONS, 'partitioned'):
    raise ValueError(f'implementation: {chosen!r} needs the whole vocabulary, got an axis_name.')
  if chosen in linear.FORWARD and axis_name is None and not jax.sharding.get_abstract_mesh().empty and (
      compiler_partitions()):
    raise ValueError(f'implementation: {chosen!r} computes on one device, and over axes of type Auto the compiler '
                     "would gather its arrays; leave it out for 'partitioned', take axes of type Explicit, or "
                     'call it inside shard_map.')

  keep = checked_mask(mask, actions.shape)
  keep = None if keep is None else keep.reshape(-1)
  states, ref_states = (_masked(x.reshape(-1, x.shape[-1]), keep) for x in (hidden, ref_hidden))
  all_vocab = vocab_size * (1 if axis_name is None else jax.lax.axis_size(axis_name))
  length, actions = actions.shape[-1] if actions.ndim else 1, actions.reshape(-1)
  actions, known = known_actions(actions, all_vocab)
  if axis_name is not None:
    actions = actions - vocab_size * jax.lax.axis_index(axis_name)
  one_temperature, temperature, certainty_temperature = _temperatures(temperature, certainty_temperature)
  ref_side = jax.lax.stop_gradient(Side(ref_states, ref_embedding, ref_bias))
  operands = Operands(Side(states, embedding, bias), ref_side, actions, temperature, certainty_temperature)
  plan = linear.KernelPlan(chosen, Settings(soft_cap, one_temperature, axis_name),
                           chunked.pick_tile(actions.shape[0], vocab_size, memory_budget),
                           chunked.pick_held(actions.shape[0], vocab_size, memory_budget), length,
                           partitioned.pick_steps(actions.shape[0], length, vocab_size, memory_budget))
  return plan, operands, _Weighting(certainty, exponent, intercept, all_vocab), keep, known


def _row(plan: linear.KernelPlan, operands: Operands) -> Row:
  if plan.implementation == 'partitioned':
    return partitioned.row_of(operands, plan.settings, plan.steps, plan.length)
  if plan.implementation in linear.FORWARD:
    return linear.row_of(plan, operands.policy, operands)
  one_temperature = plan.settings.one_temperature
  return _row_of_logits(plan.implementation, one_temperature, *raw_logits(operands, plan.settings), operands.actions,
                        operands.temperature, operands.certainty_temperature)


def _row_of_logits(implementation, one_temperature, logits, ref_logits, actions, temperature, certainty_temperature):
  if implementation == 'fused':
    return fused_row(one_temperature, logits, ref_logits, actions, temperature, certainty_temperature)
  return plain.row_of_logits(
      *scaled(logits, ref_logits, temperature, certainty_temperature, one_temperature), actions)


def _record(row: Row, known: chex.Array, weighting: _Weighting) -> TokenStatistics:
  """Makes the public record, `[..., 1]` each; `known` `[...]` is true where the action is in the vocabulary."""
  fixed = jax.lax.stop_gradient
  sure = certainty_of_statistics(fixed(row.sure_entropy), fixed(row.sure_log_max), weighting.vocab_size, weighting.kind)
  log_prob, ref_log_prob = (nan_unless(known[..., None], x) for x in (row.log_prob, row.ref_log_prob))
  return TokenStatistics(log_prob=log_prob, ref_log_prob=fixed(ref_log_prob), entropy=row.entropy, kl=row.kl,
                         certainty=sure, weight=kl_weight(sure, weighting.exponent, weighting.intercept))


def _shaped(record, keep, shape):
  keep = jnp.ones(shape, bool) if keep is None else keep.reshape(shape)
  return jax.tree.map(lambda x: jnp.where(keep, x.reshape(shape), 0.0), record)


def _masked(x, keep):
  return x if keep is None else jnp.where(keep[..., None], x, 0)


def _temperatures(temperature, certainty_temperature):
  """Returns whether both are Python numbers and equal, and both as arrays without gradient."""
  known = all(isinstance(x, int | float) for x in (temperature, certainty_temperature))
  arrays = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (temperature, certainty_temperature))
  return (known and temperature == certainty_temperature), *arrays


def _chosen(implementation, known, usual):
  if implementation is None:
    return usual
  implementation = {'reference': 'plain'}.get(implementation, implementation)  # old name of `plain`
  if implementation not in known:
    raise ValueError(f'implementation: expected one of {known} or None, got {implementation!r}.')
  return implementation
