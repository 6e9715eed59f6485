"""Actions outside the vocabulary give NaN where the mask is true and nothing elsewhere, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiers import slow_except
from truth import WAYS, combined, exact_problem

from critkl_jax import linear_weighted_kl, linear_weighted_kl_loss, token_kl, weighted_kl
from critkl_jax.ops.weighted_kl import linear, pallas_gpu, pallas_tpu
from critkl_jax.rl.aggregation import masked_mean
from critkl_jax.rl.losses import action_log_probs

SIZE = 6, 300, 5  # not a multiple of blocks of 128 and 64
PADDING = 301  # inside the last block, beyond the vocabulary
UNKNOWN = (300, PADDING, -1, -100, 2**31 - 1)
KERNELS = {'pallas_tpu': pallas_tpu, 'pallas_gpu': pallas_gpu}
BAD = 2  # the token whose action is unknown


@pytest.fixture
def interpreted(monkeypatch):
  """Runs both kernels in Pallas's generic interpreter."""
  for name, kernel in KERNELS.items():
    for table, function in ((linear.FORWARD, kernel.forward), (linear.BACKWARD, kernel.backward)):
      monkeypatch.setitem(table, name, lambda plan, function=function: functools.partial(
          function, settings=plan.settings, interpret=True))


def record_of(way, hidden, embedding, ref_hidden, ref_embedding, actions, **options):
  if way.startswith('logits'):
    return weighted_kl(hidden @ embedding.T, ref_hidden @ ref_embedding.T, actions, exponent=2.0,
                       implementation=way.split(', ')[1], **options)
  own = WAYS.get(way, {'implementation': way})
  return linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=2.0, **own, **options)


@pytest.mark.parametrize('way', slow_except(
    ('logits, fused', 'chunked, small tiles', *KERNELS), ['logits, reference', 'logits, fused', *WAYS, *KERNELS]))
def test_unknown_actions(way, interpreted):
  """All unknown ids in one program: they are traced."""
  arrays, cotangents = exact_problem(SIZE, 1, 'apart')
  hidden, embedding, ref_hidden, ref_embedding, actions = arrays

  @jax.jit
  def run(actions, mask):
    def loss(hidden, embedding):
      record = record_of(way, hidden, embedding, ref_hidden, ref_embedding, actions, mask=mask)
      return combined(record, cotangents), record
    return jax.grad(loss, (0, 1), has_aux=True)(hidden, embedding)

  everything, others = np.ones(6, bool), np.arange(6) != BAD
  wanted, right = run(actions, others), run(actions, everything)
  for unknown in UNKNOWN:
    wrong = np.where(others, actions, unknown).astype(np.int32)
    (dhidden, dembedding), record = run(wrong, everything)
    assert np.isnan([record.log_prob[BAD], record.ref_log_prob[BAD]]).all(), unknown
    for name in ('log_prob', 'ref_log_prob', 'entropy', 'kl', 'certainty', 'weight'):
      same = others if 'log_prob' in name else everything  # entropy and KL do not depend on the action
      np.testing.assert_array_equal(getattr(record, name)[same], getattr(right[1], name)[same])
    assert np.isnan(dhidden[BAD]).all()
    np.testing.assert_array_equal(dhidden[others], right[0][0][others])
    assert np.isnan(dembedding).any()
    jax.tree.map(np.testing.assert_array_equal, run(wrong, others), wanted)  # masked
  assert np.isfinite(wanted[0][1]).all()


@pytest.mark.parametrize('budget', slow_except((2**26,), (2**26, 8 * 128 * 4)))  # token mode, and vocabulary mode
def test_unknown_actions_of_a_loss_in_one_pass(budget):
  hidden, embedding, ref_hidden, ref_embedding, actions = exact_problem(SIZE, 1, 'apart')[0]

  @jax.jit
  def run(actions, mask):
    return jax.value_and_grad(lambda hidden: linear_weighted_kl_loss(
        lambda record: record.kl - record.log_prob, hidden, embedding, ref_hidden, ref_embedding, actions, exponent=1.0,
        mask=mask, implementation='chunked', memory_budget=budget), has_aux=True)(hidden)

  everything, others = np.ones(6, bool), np.arange(6) != BAD
  for unknown in UNKNOWN:
    wrong = np.where(others, actions, unknown).astype(np.int32)
    (loss, record), gradient = run(wrong, everything)
    assert np.isnan([loss, record.log_prob[BAD]]).all()
    assert np.isnan(gradient[BAD]).all()
    assert np.isfinite(gradient[others]).all()
    jax.tree.map(np.testing.assert_array_equal, run(wrong, others), run(actions, others))


@pytest.mark.slow
def test_ids_in_the_padding_of_a_large_vocabulary():
  hidden, embedding, ref_hidden, ref_embedding, actions = exact_problem((3, 50257, 4), 1, 'apart')[0]
  actions = np.array([50256, 50257, 50303], np.int32)
  for options in ({}, {'memory_budget': 8 * 128}):
    found = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=1.0,
                               implementation='chunked', **options).log_prob
    np.testing.assert_array_equal(np.isnan(found), [False, True, True])


def test_unknown_actions_with_the_vocabulary_over_devices():
  hidden, embedding, ref_hidden, ref_embedding, actions = exact_problem((6, 4 * 75, 5), 1, 'apart')[0]
  mesh, parts, whole = jax.make_mesh((4,), ('model',), (AxisType.Auto,)), PartitionSpec('model'), PartitionSpec()

  def loss(hidden, embedding, ref_embedding, actions, mask):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=2.0, mask=mask,
                                axis_name='model', implementation='chunked')
    return jnp.sum(record.log_prob + record.kl), record.log_prob

  run = jax.jit(jax.shard_map(
      jax.value_and_grad(loss, has_aux=True), mesh=mesh, in_specs=(whole, parts, parts, whole, whole),
      out_specs=((whole, whole), whole)))
  everything, others = np.ones(6, bool), np.arange(6) != BAD
  wanted = run(hidden, embedding, ref_embedding, actions, others)
  for unknown in (*UNKNOWN, -75, 4 * 75):  # -75: the first id of a device, counted from the next one
    wrong = np.where(others, actions, unknown).astype(np.int32)
    (_, log_prob), gradient = run(hidden, embedding, ref_embedding, wrong, everything)
    np.testing.assert_array_equal(np.isnan(log_prob), ~others)
    np.testing.assert_array_equal(np.isnan(gradient).any(1), ~others)
    jax.tree.map(np.testing.assert_array_equal, run(hidden, embedding, ref_embedding, wrong, others), wanted)


@pytest.mark.parametrize('estimator', slow_except(('k2',), ['exact', 'k1', 'k2', 'k3']))
@pytest.mark.parametrize('unknown', slow_except((7, -1), (7, -1, -100, 2**31 - 1)))
def test_token_kl_and_a_mask_that_comes_after(estimator, unknown):
  rng = np.random.default_rng(0)
  logits, ref_logits = rng.normal(size=(2, 4, 7)).astype(np.float32)
  actions, mask = np.array([1, 2, unknown, 3], np.int32), np.arange(4) != 2
  found = token_kl(logits, ref_logits, actions, estimator)
  np.testing.assert_array_equal(np.isnan(found), (~mask) & (estimator != 'exact'))
  gradient = jax.grad(lambda z: masked_mean(token_kl(z, ref_logits, actions, estimator), mask))
  wanted = jax.grad(lambda z: jnp.mean(token_kl(z, ref_logits[mask], actions[mask], estimator)))
  np.testing.assert_allclose(gradient(logits)[mask], wanted(logits[mask]), rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(gradient(logits)[~mask], 0)
  if estimator != 'exact':
    assert np.isnan(jax.grad(lambda z: jnp.sum(token_kl(z, ref_logits, actions, estimator)))(logits)[~mask]).all()


@pytest.mark.parametrize('dtype', [np.int32, np.uint8, np.int8])
def test_log_probabilities_of_unknown_actions(dtype):
  logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
  unknown = np.iinfo(dtype).max
  actions, mask = np.array([1, 2, unknown, 6], dtype), np.arange(4) != 2
  np.testing.assert_array_equal(np.isnan(action_log_probs(logits, actions)), ~mask)
  np.testing.assert_array_equal(
      action_log_probs(np.where(mask[:, None], logits, np.nan), actions, mask)[mask],
      jax.nn.log_softmax(logits)[[0, 1, 3], [1, 2, 6]])

  def loss(logits, mask=None, after=None):  # importance ratio: NaN * 0 is NaN, so it is masked first
    ratio = jnp.exp(action_log_probs(logits, actions, mask))
    return jnp.sum(ratio if after is None else jnp.where(after, ratio, 0.0))

  assert np.isnan(jax.grad(loss)(logits)[~mask]).all()
  assert np.isfinite(jax.grad(loss)(logits)[mask]).all()
  masked = jax.grad(lambda z: loss(z, mask, mask))(logits)
  np.testing.assert_array_equal(masked[~mask], 0)
  plain = jax.grad(lambda z: jnp.sum(jnp.where(mask, action_log_probs(z, actions), 0.0)))(logits)
  np.testing.assert_array_equal(plain[~mask], 0)


@pytest.mark.slow
def test_wide_types_of_small_ids():
  logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
  found = weighted_kl(logits, logits, np.array([255, 0], np.uint8), exponent=1.0).log_prob
  np.testing.assert_allclose(found, jax.nn.log_softmax(logits)[[0, 1], [255, 0]], rtol=1e-6)
