"""The Triton kernels: results on the CPU, interpreted, against float64; that they lower for CUDA; what they refuse.

The interpreter pads what lies past the ends of arrays with NaN, so that a missing mask shows.
"""

import dataclasses
import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from tiers import slow_except
from truth import TOLERANCE, assert_values, combined, error, exact_problem, linear_truth

from critkl_jax import linear_weighted_kl, pick_implementation
from critkl_jax.ops import weighted_kl
from critkl_jax.ops.weighted_kl import linear, pallas_gpu, statistics

SMALL, RAGGED = (3, 47, 31), (70, 300, 40)


@pytest.fixture
def interpreted(monkeypatch):
  """Makes `pallas_gpu` run in plain JAX."""
  for table, kernel in ((linear.FORWARD, pallas_gpu.forward), (linear.BACKWARD, pallas_gpu.backward)):
    monkeypatch.setitem(table, 'pallas_gpu', lambda plan, kernel=kernel: functools.partial(
        kernel, settings=plan.settings, interpret=True))


def grads_and_record(arrays, cotangents, implementation, bias=None, **options):
  """Returns the gradients of hidden states, embedding and bias, and the record."""
  def loss(hidden, embedding, bias):
    record = linear_weighted_kl(hidden, embedding, *arrays[2:], exponent=9.0, bias=bias, implementation=implementation,
                                **options)
    return combined(record, cotangents), record

  wanted = (0, 1) if bias is None else (0, 1, 2)
  return jax.jit(jax.grad(loss, wanted, has_aux=True))(*arrays[:2], bias)


def assert_same(one, two, tolerance=TOLERANCE):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert error(x, y, 1e-3) <= tolerance


@pytest.mark.parametrize(('size', 'scale', 'kind'), [
    pytest.param(SMALL, 10, 'apart', marks=pytest.mark.slow), (RAGGED, 50, 'apart'), (RAGGED, 1, 'near'),
    ((1, 70, 5), 1, 'other width')])
def test_against_float64(size, scale, kind, interpreted):
  arrays, cotangents = exact_problem(size, scale, kind)
  gradients, record = grads_and_record(arrays, cotangents, 'pallas_gpu')
  values, *expected = linear_truth(arrays, cotangents)
  assert_values(record, values)
  assert_same(gradients, tuple(expected))


OPTIONS = {
    'all at once': {
        'bias': np.where(np.arange(300) % 5 == 1, -np.inf, np.linspace(-1, 1, 300)).astype(np.float32),
        'ref_bias': np.where(np.arange(300) % 7 == 2, -np.inf, np.linspace(2, -2, 300)).astype(np.float32),
        'soft_cap': 3.0, 'temperature': 1.7, 'certainty_temperature': 0.6},
    'whole blocks ruled out': {
        'bias': np.where(np.arange(300) < 130, -np.inf, 0).astype(np.float32),
        'ref_bias': np.where(np.arange(300) > 200, -np.inf, 0).astype(np.float32)},
}


@pytest.mark.parametrize('option', slow_except(('all at once',), OPTIONS))
def test_options_mean_what_they_mean_to_chunked(option, interpreted, monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'MEMORY_BUDGET', 4 * 128 * 70)  # blocks of 128; the last one overlaps the one before
  arrays, cotangents = exact_problem(RAGGED, 1, 'apart')
  allowed = np.flatnonzero(OPTIONS[option]['bias'] > -np.inf)
  arrays = (*arrays[:4], allowed[arrays[4] % len(allowed)])  # a policy never samples a token that it rules out
  found, expected = (grads_and_record(arrays, cotangents, way, **OPTIONS[option]) for way in ('pallas_gpu', 'chunked'))
  assert_same(found, expected, 1e-4)  # ruled-out tokens add up to 1e4 nats, so rounding errors are larger


@pytest.mark.slow
def test_low_precision_is_no_worse_than_plain(interpreted):
  """Errors are at most 1.1 times those of `plain`, plus, in gradients, bfloat16 rounding of the logits' gradient."""
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem(RAGGED, 3, 'apart')
  arrays = (*(jnp.asarray(x, jnp.bfloat16) for x in (hidden, embedding, ref_hidden, ref_embedding)), actions)
  values, *expected = linear_truth([*(np.asarray(x, np.float64) for x in arrays[:4]), actions], cotangents)
  errors = {}
  for way in ('plain', 'pallas_gpu'):
    gradients, record = grads_and_record(arrays, cotangents, way)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}
    errors[way] = [error(record.kl, values['kl']), error(record.entropy, values['entropy']),
                   *(error(x.astype(jnp.float32), y) for x, y in zip(gradients, expected))]
  for plain, fused, rounding in zip(errors['plain'], errors['pallas_gpu'], (1e-6, 1e-6, 2**-10, 2**-10)):
    assert fused <= 1.1 * plain + rounding


def test_no_tokens(interpreted):
  arrays, cotangents = exact_problem((0, 47, 31), 1, 'apart')
  (dhidden, dembedding), record = grads_and_record(arrays, cotangents, 'pallas_gpu')
  assert dhidden.shape == (0, 31)
  assert record.kl.shape == (0,)
  np.testing.assert_array_equal(dembedding, np.zeros((47, 31)))


@pytest.mark.slow
def test_members_may_be_vmapped(interpreted):
  arrays, _ = exact_problem((5, 100, 7), 1, 'apart')

  def value_and_grad(implementation, temperature, hidden):
    return jax.value_and_grad(lambda hidden: jnp.sum(linear_weighted_kl(
        hidden, *arrays[1:], exponent=2.0, temperature=temperature, implementation=implementation).kl))(hidden)

  members = jnp.array([1.0, 0.7]), jnp.stack([arrays[0], -arrays[0]])
  assert_same(*(jax.jit(jax.vmap(functools.partial(value_and_grad, way)))(*members)
                for way in ('pallas_gpu', 'chunked')))


@pytest.mark.parametrize('mistake', ['past the vocabulary is counted', 'past the ends is loaded'])
def test_a_missing_mask_shows(mistake, interpreted, monkeypatch):
  if mistake == 'past the ends is loaded':
    monkeypatch.setattr(pallas_gpu, '_inside', lambda shape, starts, sizes: None)
  else:
    monkeypatch.setattr(pallas_gpu, 'block_sums', lambda *arrays: statistics.block_sums(*arrays[:4]))
  arrays, cotangents = exact_problem(SMALL, 1, 'apart')
  _, record = grads_and_record(arrays, cotangents, 'pallas_gpu')
  entropy = linear_truth(arrays, cotangents)[0]['entropy']
  assert not np.max(np.abs(record.entropy - entropy)) < 1e-2  # NaN counts as wrong too


# The program lowered for a GPU.


H100 = AbstractDevice(*('NVIDIA H100 80GB HBM3', 132, 'gpu')[:len(dataclasses.fields(AbstractDevice))])


def lowered(loss, *arrays, axis_sizes=(), axis_names=()):
  """Lowers value and gradients of a loss for an H100 or a mesh of H100s."""
  mesh = AbstractMesh(axis_sizes, axis_names, (AxisType.Auto,) * len(axis_sizes), abstract_device=H100)
  unchecked = [jax.export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')]
  shapes = [jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)) for x in arrays]
  program = jax.export.export(
      jax.jit(jax.value_and_grad(loss, (0, 1))), platforms=['cuda'], disabled_checks=unchecked)
  with jax.sharding.use_abstract_mesh(mesh):  # since jax 0.12 kernels are lowered for a specific GPU
    return program(*shapes).mlir_module()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_both_kernels_are_in_the_program_and_all_logits_are_not(dtype):
  num_tokens, vocab_size, width = 9000, 50257, 24
  states, table = jnp.zeros((num_tokens, width), dtype), jnp.zeros((vocab_size, width), dtype)

  def loss(hidden, embedding, ref_hidden, ref_embedding, actions, bias, temperature):
    return jnp.sum(linear_weighted_kl(
        hidden, embedding, ref_hidden, ref_embedding, actions, exponent=2.0, bias=bias, ref_bias=bias, soft_cap=3.0,
        temperature=temperature, implementation='pallas_gpu').kl)

  text = lowered(loss, states, table, states, table, np.zeros(num_tokens, np.int32), np.zeros(vocab_size, np.float32),
                 np.float32(1))
  assert text.count('__gpu$xla.gpu.triton') == 2
  assert 'weighted_kl_forward' in text
  assert 'weighted_kl_backward' in text
  assert f'{num_tokens}x{vocab_size}' not in text


def test_a_vocabulary_over_four_devices_lowers():
  arrays, _ = exact_problem((70, 4 * 75, 31), 1, 'apart')
  parts, whole = PartitionSpec('model'), PartitionSpec()

  def loss(hidden, embedding, ref_hidden, ref_embedding, actions):
    return jnp.sum(linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=9.0,
                                      axis_name='model', implementation='pallas_gpu').kl)

  def spread(*arrays):
    return jax.shard_map(loss, in_specs=(whole, parts, whole, parts, whole), out_specs=whole)(*arrays)

  assert lowered(spread, *arrays, axis_sizes=(4,), axis_names=('model',)).count('__gpu$xla.gpu.triton') >= 2


def test_a_cpu_is_refused():
  arrays, cotangents = exact_problem(SMALL, 1, 'apart')
  with pytest.raises(ValueError, match='interpret mode'):
    grads_and_record(arrays, cotangents, 'pallas_gpu')


def test_without_triton_the_kernel_says_so_and_the_pick_needs_none(monkeypatch):
  monkeypatch.delattr(weighted_kl, 'pallas_gpu', raising=False)
  monkeypatch.delitem(sys.modules, pallas_gpu.__name__)
  monkeypatch.setitem(sys.modules, 'jax.experimental.pallas.triton', None)  # importing it raises ImportError
  monkeypatch.delattr('jax.experimental.pallas.triton')
  arrays, cotangents = exact_problem(SMALL, 1, 'apart')
  with pytest.raises(ValueError, match=f"'pallas_gpu' needs .* jax {jax.__version__} does not have; take 'chunked'"):
    grads_and_record(arrays, cotangents, 'pallas_gpu')
  assert pick_implementation(50257, from_logits=False, backend='gpu') == 'chunked'


def test_no_warning_of_triton_stops_a_program():
  """Not even where warnings are errors; jax 0.12 warns when it lowers."""
  arrays, _ = exact_problem(SMALL, 1, 'apart')

  def loss(hidden, embedding, *others):
    return jnp.sum(linear_weighted_kl(hidden, embedding, *others, exponent=9.0, implementation='pallas_gpu').kl)

  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert 'weighted_kl_forward' in lowered(loss, *arrays)
    with pytest.raises(DeprecationWarning, match='another'):  # other warnings are not silenced
      warnings.warn('another', DeprecationWarning, stacklevel=1)
