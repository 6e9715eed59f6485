"""Arithmetic shared by all implementations: sums over the vocabulary, and the statistics computed from them.

For one token with policy logits z, reference logits v (both divided by the temperature) and d = z - v; with m = max z,
e_i = exp(z_i - m), t_i = d_i - a for an anchor a, s_i = d_i - c for a centre c, and phi(s) = exp(-s) - 1 + s:

    sum_e = sum e        sum_ez = sum e (z - m)        sum_t = sum e t        sum_phi = sum e phi(s)

From these follow, without subtracting large numbers, the difference Delta of the log-partition functions and the KL:

    Delta = logsumexp z - logsumexp v = c - log1p(x),        x = (sum_phi - sum e s) / sum_e
    KL(pi || pi_ref) = sum_phi / sum_e - (x - log1p(x))

so that a KL of 1e-7 between near-equal policies keeps its relative precision in float32. If the policies are so far
apart that x is imprecise, `sum_t / sum_e + a - Delta`, with Delta from the two log-partition functions, is precise
enough. Within a block c is the difference of the two peaks, and e exp(-s) the exponential of the reference's logit. The
anchor is the difference d at the policy's most probable token: a nearly deterministic policy then has a small and
precise sum_t, and its gradients `p (t - mean t)` do not subtract large numbers either.

A token that the reference rules out (v = -inf) counts with `log pi_ref = LOG_PROB_FLOOR`: a large finite penalty with
the right sign. Its terms are summed separately, in `sum_ruled = sum e` and `sum_ruled_z = sum e (z - m)`; its exp(-s)
is 0.

Everything here is plain jnp on `[R, block]` and `[R, 1]`, so that Pallas kernels can call it too.

Letters: R rows (tokens of all episodes on one axis), V vocabulary; `block`, entries of a block of the vocabulary.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from critkl_jax.pytree import PyTreeNode

# Log-probability assigned to a ruled-out token (logit -inf) when two policies are compared. It is finite to keep losses
# and gradients finite; a float32 softmax gives no token a probability this low.
LOG_PROB_FLOOR = -1e4
MINUS_INFINITY = -1e30  # in place of -inf: 0 times it is 0
RULED_OUT = -1e20  # logits below count as -inf
_NEAR = 0.5  # phi(s) uses its series for |s| below this
_MOST_EXPONENT = 40.0  # exponents are clipped to this; the exact value of larger ones does not matter


class TokenStatistics(PyTreeNode):
  """Statistics of each token under policy and reference, float32 `[...]` each, in nats; 0 where masked.

  Gradients flow from `log_prob`, `entropy` and `kl` to the policy; the other fields carry none.

  Attributes:
    log_prob: log pi(a) of the token's action.
    ref_log_prob: log pi_ref(a), at least `LOG_PROB_FLOOR`.
    entropy: entropy of the policy.
    kl: exact KL(pi || pi_ref).
    certainty: certainty J of the reference, between 0 and 1.
    weight: weight of the KL penalty, (1 - c) J^beta + c.
  """

  log_prob: chex.Array
  ref_log_prob: chex.Array
  entropy: chex.Array
  kl: chex.Array
  certainty: chex.Array
  weight: chex.Array


class Sums(PyTreeNode):
  """Sums over a part of the vocabulary, float32 `[R, 1]` each; `merge` combines the sums of two parts.

  Attributes:
    peak: m, the largest policy logit.
    sum_e: defined above, as are `sum_ez`, `sum_t`, `sum_phi`, `sum_ruled`, `sum_ruled_z`.
    anchor: a.
    centre: c.
    ref_peak: the largest reference logit v.
    ref_sum_e: sum exp(v - ref_peak).
    sure_peak: the largest reference logit at the certainty temperature.
    sure_sum_e: sum exp(v - sure_peak) at the certainty temperature.
    sure_sum_ez: sum exp(v - sure_peak) (v - sure_peak) at the certainty temperature.
    action_logit: z of the action, 0 if the action is in another part.
    ref_action_logit: v of the action, 0 if the action is in another part.
  """

  peak: chex.Array
  sum_e: chex.Array
  sum_ez: chex.Array
  anchor: chex.Array
  sum_t: chex.Array
  centre: chex.Array
  sum_phi: chex.Array
  sum_ruled: chex.Array
  sum_ruled_z: chex.Array
  ref_peak: chex.Array
  ref_sum_e: chex.Array
  sure_peak: chex.Array
  sure_sum_e: chex.Array
  sure_sum_ez: chex.Array
  action_logit: chex.Array
  ref_action_logit: chex.Array

  @classmethod
  def zeros(cls, num_tokens: int) -> 'Sums':
    """Makes a record of zeros."""
    return cls(**{name: jnp.zeros((num_tokens, 1), jnp.float32) for name in cls.__dataclass_fields__})


class Row(PyTreeNode):
  """Statistics of each token from the sums over the whole vocabulary, float32 `[R, 1]` each; enough for gradients.

  Attributes:
    peak: the largest policy logit.
    log_sum: `log sum_e`; `peak + log_sum` is the log-partition function of the policy, kept in two parts for precision.
    anchor: a.
    mean_t: mean of `log pi - log pi_ref - (a - Delta)` under the policy: sum p t if no token is ruled out.
    entropy: entropy of the policy.
    kl: KL(pi || pi_ref).
    log_prob: log-probability of the action.
    ref_log_prob: log-probability of the action under the reference, at least `LOG_PROB_FLOOR`.
    sure_entropy: entropy of the reference at the certainty temperature.
    sure_log_max: largest log-probability of the reference at the certainty temperature.
  """

  peak: chex.Array
  log_sum: chex.Array
  anchor: chex.Array
  mean_t: chex.Array
  entropy: chex.Array
  kl: chex.Array
  log_prob: chex.Array
  ref_log_prob: chex.Array
  sure_entropy: chex.Array
  sure_log_max: chex.Array

  @classmethod
  def zeros(cls, num_tokens: int) -> 'Row':
    """Makes a record of zeros."""
    return cls(**{name: jnp.zeros((num_tokens, 1), jnp.float32) for name in cls.__dataclass_fields__})


class Cotangents(PyTreeNode):
  """Gradients of the loss with respect to `log_prob`, `entropy` and `kl` of each token, float32 `[R, 1]`."""

  log_prob: chex.Array
  entropy: chex.Array
  kl: chex.Array

  @classmethod
  def of(cls, row: Row) -> 'Cotangents':
    """Selects the three fields of a `Row` of gradients that carry a gradient."""
    return cls(log_prob=row.log_prob, entropy=row.entropy, kl=row.kl)


def in_vocabulary(actions: chex.Array, vocab_size: int) -> chex.Array:
  """Returns bool `[...]`: whether action ids, integers `[...]` of any dtype, are in 0..V-1."""
  return (actions >= 0) & (actions <= min(vocab_size - 1, jnp.iinfo(actions.dtype).max))


@jax.custom_vjp
def nan_unless(known: chex.Array, values: chex.Array) -> chex.Array:
  """Replaces values `[...]` by NaN where `known` `[...]` is false.

  Their gradient is NaN there too, or 0 if their cotangent is 0. A gather alone would give an action that does not exist
  a gradient of 0, and training would go on in silence.
  """
  return jnp.where(known, values, jnp.nan)


def _nan_unless_forward(known, values):
  return nan_unless(known, values), known


def _nan_unless_backward(known, gradient):
  return None, jnp.where(known | (gradient == 0), gradient, jnp.nan)


nan_unless.defvjp(_nan_unless_forward, _nan_unless_backward)


def finite(logits: chex.Array) -> chex.Array:
  """Replaces -inf in float32 logits by `MINUS_INFINITY`."""
  return jnp.maximum(logits, MINUS_INFINITY)


def block_sums(z: chex.Array, v: chex.Array, v_sure: chex.Array | None, is_action: chex.Array | None,
               valid: chex.Array | None = None, can_rule_out: bool = True) -> Sums:
  """Computes the sums over one block of the vocabulary.

  Args:
    z: float32 `[R, block]` policy logits from `finite`.
    v: float32 `[R, block]` reference logits at the same temperature, from `finite`.
    v_sure: float32 `[R, block]` reference logits at the certainty temperature; None if the temperatures are equal.
    is_action: bool `[R, block]`, true at the action of each row; None leaves the actions' logits at 0.
    valid: bool `[R, block]` or `[1, block]`, false past the end of the vocabulary, where the logits may be anything,
      NaN included; None if the whole block is valid. At least one column is valid.
    can_rule_out: whether reference logits may be -inf; False saves work.
  """

  def inside(x, other):
    return x if valid is None else jnp.where(valid, x, other)

  total, largest = (functools.partial(reduce, axis=-1, keepdims=True) for reduce in (jnp.sum, jnp.max))
  z, v = inside(z, MINUS_INFINITY), inside(v, MINUS_INFINITY)
  peak, ref_peak = largest(z), largest(v)
  above, ref_above = z - peak, v - ref_peak
  e, ref_e = inside(jnp.exp(above), 0.0), inside(jnp.exp(ref_above), 0.0)
  centre = jnp.where(jnp.minimum(peak, ref_peak) > RULED_OUT, peak - ref_peak, 0.0)
  anchor = anchor_of(peak, largest(jnp.where(z == peak, v, MINUS_INFINITY)), centre)
  t = centred_difference(z, v, anchor)
  zeros = jnp.zeros_like(peak)
  sum_ruled = sum_ruled_z = zeros
  if can_rule_out or valid is not None:
    ruled = v <= RULED_OUT
    t = jnp.where(ruled, 0.0, t)
  s = t + (anchor - centre)
  weighted_phi = jnp.where(jnp.abs(s) < _NEAR, e * phi_near(s), ref_e - e + e * s)
  if can_rule_out:
    ruled_e = jnp.where(ruled, e, 0.0)
    sum_ruled, sum_ruled_z = total(ruled_e), total(ruled_e * above)
    weighted_phi = jnp.where(ruled, -e, weighted_phi)
  if v_sure is None:
    sure_peak, sure_sum_e, sure_sum_ez = ref_peak, total(ref_e), total(ref_e * ref_above)
  else:
    v_sure = inside(v_sure, MINUS_INFINITY)
    sure_peak = largest(v_sure)
    sure_e = inside(jnp.exp(v_sure - sure_peak), 0.0)
    sure_sum_e, sure_sum_ez = total(sure_e), total(sure_e * (v_sure - sure_peak))
  at_action = (zeros, zeros) if is_action is None else (total(jnp.where(is_action, x, 0.0)) for x in (z, v))
  action_logit, ref_action_logit = at_action
  return Sums(
      peak=peak, sum_e=total(e), sum_ez=total(e * above), anchor=anchor, sum_t=total(e * t), centre=centre,
      sum_phi=total(weighted_phi), sum_ruled=sum_ruled, sum_ruled_z=sum_ruled_z, ref_peak=ref_peak,
      ref_sum_e=total(ref_e), sure_peak=sure_peak, sure_sum_e=sure_sum_e, sure_sum_ez=sure_sum_ez,
      action_logit=action_logit, ref_action_logit=ref_action_logit)


def anchor_of(peak: chex.Array, ref_at_peak: chex.Array, otherwise: chex.Array) -> chex.Array:
  """Returns the anchor, z - v at the policy's most probable token; `otherwise` where that token is ruled out."""
  return jnp.where(jnp.minimum(peak, ref_at_peak) > RULED_OUT, peak - ref_at_peak, otherwise)


def centred_difference(z: chex.Array, v: chex.Array, centre: chex.Array) -> chex.Array:
  """Computes `(z - v) - centre`, correct to the last digit where the centre is near z - v.

  The rounding error of z - v is itself a float32 number (Knuth, TAOCP 4.2.2, theorem B), and is added back.
  """
  difference = z - v
  part = difference - z
  lost = (z - (difference - part)) - (v + part)
  return (difference - centre) + lost


def phi_near(t: chex.Array) -> chex.Array:
  """Computes `exp(-t) - 1 + t` for |t| < 1/2 by its series, with a relative precision of 1e-6 down to 0."""
  series = jnp.float32(1 / 362880)
  for k in (40320, 5040, 720, 120, 24, 6, 2):
    series = 1.0 / k - t * series
  return t * t * series


def phi(t: chex.Array) -> chex.Array:
  """Computes `exp(-t) - 1 + t`, precise near 0; t is clipped to at least -40 in the exponential."""
  return jnp.where(jnp.abs(t) < _NEAR, phi_near(t), jnp.exp(-jnp.maximum(t, -_MOST_EXPONENT)) - 1.0 + t)


def merge(one: Sums, two: Sums) -> Sums:
  """Combines the sums over two parts of the vocabulary."""
  peak, ref_peak = jnp.maximum(one.peak, two.peak), jnp.maximum(one.ref_peak, two.ref_peak)
  sure_peak = jnp.maximum(one.sure_peak, two.sure_peak)
  anchor = jnp.where(one.peak >= two.peak, one.anchor, two.anchor)
  masses = [(part.sum_e - part.sum_ruled) * jnp.exp(part.peak - peak) for part in (one, two)]
  share = masses[1] / jnp.maximum(masses[0] + masses[1], 1e-30)
  centre = one.centre + share * (two.centre - one.centre)
  one, two = (_moved(part, peak, anchor, centre, ref_peak, sure_peak) for part in (one, two))
  joined = jax.tree.map(jnp.add, one, two)
  return joined.replace(peak=peak, anchor=anchor, centre=centre, ref_peak=ref_peak, sure_peak=sure_peak)


def _moved(sums, peak, anchor, centre, ref_peak, sure_peak):
  """Rescales sums to new peaks, a new anchor and a new centre."""
  down = sums.peak - peak
  scale = jnp.exp(down)
  step = centre - sums.centre
  allowed = sums.sum_e - sums.sum_ruled
  sum_s = _about(sums, sums.centre)
  # A small step uses the series of phi; after a large step phi is far from 0, and its definition is precise.
  # A part that the policy rules out has no policy terms, but its reference terms count.
  little = (jnp.abs(step) < _NEAR) & (sums.peak > RULED_OUT)
  growth = phi_near(jnp.where(little, -step, 0.0))  # exp(step) - 1 - step
  of_allowed = sums.sum_phi + sums.sum_ruled  # a ruled-out token adds -e to sum_phi for any centre
  of_allowed += (growth + step) * (of_allowed - sum_s) + growth * allowed
  sum_of_exp = jnp.exp(jnp.minimum(sums.ref_peak + centre - peak, _MOST_EXPONENT)) * sums.ref_sum_e
  sum_phi = jnp.where(little, scale * of_allowed, sum_of_exp + scale * (_about(sums, centre) - allowed))
  sum_phi -= scale * sums.sum_ruled
  ref_scale, sure_down = jnp.exp(sums.ref_peak - ref_peak), sums.sure_peak - sure_peak
  sure_scale = jnp.exp(sure_down)
  return sums.replace(
      sum_e=scale * sums.sum_e, sum_ez=scale * (sums.sum_ez + down * sums.sum_e), sum_t=scale * _about(sums, anchor),
      sum_phi=sum_phi, sum_ruled=scale * sums.sum_ruled,
      sum_ruled_z=scale * (sums.sum_ruled_z + down * sums.sum_ruled), ref_sum_e=ref_scale * sums.ref_sum_e,
      sure_sum_e=sure_scale * sums.sure_sum_e,
      sure_sum_ez=sure_scale * (sums.sure_sum_ez + sure_down * sums.sure_sum_e))


def _about(sums, point):
  """Computes the sum of e (d - point) over tokens that the reference does not rule out."""
  return sums.sum_t + (sums.anchor - point) * (sums.sum_e - sums.sum_ruled)


def finish(sums: Sums) -> Row:
  """Computes the statistics of each token from the sums over the whole vocabulary."""
  log_sum, ref_log_sum = jnp.log(sums.sum_e), jnp.log(sums.ref_sum_e)
  ruled = sums.sum_ruled / sums.sum_e
  ruled_kl = sums.sum_ruled_z / sums.sum_e - ruled * (log_sum + LOG_PROB_FLOOR)

  x = (sums.sum_phi - _about(sums, sums.centre)) / sums.sum_e
  near = jnp.abs(x) < 0.5
  x = jnp.where(near, x, 0.0)
  shift = jnp.where(near, -jnp.log1p(x), (sums.peak - sums.ref_peak - sums.centre) + (log_sum - ref_log_sum))
  anchor_ratio = (sums.anchor - sums.centre) - shift  # a - Delta: log pi - log pi_ref at the anchor
  mean_t = sums.sum_t / sums.sum_e - ruled * anchor_ratio + ruled_kl
  near_kl = sums.sum_phi / sums.sum_e - phi(-jnp.log1p(x)) - ruled * jnp.log1p(x) + ruled_kl
  far_kl = sums.sum_t / sums.sum_e + (1.0 - ruled) * anchor_ratio + ruled_kl
  kl = jnp.maximum(jnp.where(near, near_kl, far_kl), 0.0)

  return Row(
      peak=sums.peak, log_sum=log_sum, anchor=sums.anchor, mean_t=mean_t, kl=kl,
      entropy=log_sum - sums.sum_ez / sums.sum_e, log_prob=sums.action_logit - sums.peak - log_sum,
      ref_log_prob=jnp.maximum(sums.ref_action_logit - sums.ref_peak - ref_log_sum, LOG_PROB_FLOOR),
      sure_entropy=jnp.log(sums.sure_sum_e) - sums.sure_sum_ez / sums.sure_sum_e,
      sure_log_max=-jnp.log(sums.sure_sum_e))


def logit_gradients(z: chex.Array, v: chex.Array, is_action: chex.Array, row: Row, g: Cotangents) -> chex.Array:
  """Computes the gradient of the loss with respect to the policy's logits z, from the cotangents g.

  `g.log_prob (1[i = a] - p_i) - g.entropy p_i (log p_i + entropy) + g.kl p_i (log p_i - log q_i - KL)`

  Args:
    z: float32 `[R, block]` policy logits of any block of the vocabulary, from `finite`.
    v: float32 `[R, block]` reference logits at the same temperature, from `finite`.
    is_action: bool `[R, block]`, true at the action of each row.
    row: statistics over the whole vocabulary.
    g: the cotangents.

  Returns:
    float32 `[R, block]`.
  """
  above = z - row.peak
  # log pi - log pi_ref - KL, for tokens that the reference rules out and for others
  excess = jnp.where(v <= RULED_OUT, above - row.log_sum - LOG_PROB_FLOOR - row.kl,
                     centred_difference(z, v, row.anchor) - row.mean_t)
  inner = g.kl * excess - g.entropy * (above - (row.log_sum - row.entropy)) - g.log_prob
  p = jnp.exp(jnp.minimum(above - row.log_sum, 0.0))  # finite also for rows of zeros that pad a tile
  return p * inner + jnp.where(is_action, g.log_prob, 0.0)
