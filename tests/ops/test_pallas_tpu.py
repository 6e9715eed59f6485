"""The TPU kernels on the CPU, in Pallas's TPU interpreter: memory starts as NaN, races are looked for.

Truth is the plain implementation in float32, which test_weighted_kl.py holds to float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from critkl_jax.ops.weighted_kl import chunked, linear, linear_weighted_kl, pallas_tpu
from critkl_jax.ops.weighted_kl.operands import Operands, Settings, Side
from critkl_jax.ops.weighted_kl.pallas_tpu import Blocks
from critkl_jax.ops.weighted_kl.statistics import Cotangents, finish

TOLERANCE = 1e-5
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan', random_seed=1)
OPTIONS = {
    'plain': {},
    'temperatures': {'temperature': 1.3, 'certainty_temperature': 0.7},
    'all': {'soft_cap': 4.0, 'temperature': 1.3, 'certainty_temperature': 0.7, 'biases': True},
}


def problem(size, dtype=np.float32, ref_width=None):
  """Returns hidden states and embeddings of policy and reference, actions, and cotangents `[3, R]`."""
  num_tokens, vocab_size, width = size
  ref_width = ref_width or width
  rng = np.random.default_rng(0)
  shapes = (num_tokens, width), (vocab_size, width), (num_tokens, ref_width), (vocab_size, ref_width)
  arrays = [jnp.asarray(rng.normal(size=s) * f / s[1]**(f > 1 and 0.5), dtype) for s, f in zip(shapes, (3, 1, 3, 1))]
  actions = rng.integers(0, vocab_size, num_tokens)
  actions -= actions % 5 == 1  # a policy never samples a token that it rules out
  return arrays, jnp.asarray(actions, jnp.int32), jnp.asarray(rng.normal(size=(3, num_tokens)), jnp.float32)


def biases(vocab_size):
  """Returns biases of policy and reference that rule tokens out."""
  count, slope = np.arange(vocab_size), np.linspace(-1, 1, vocab_size)
  return [jnp.asarray(np.where(count % a == b, -np.inf, slope), jnp.float32) for a, b in ((5, 1), (7, 2))]


def outcome(size, option, implementation, dtype=np.float32, exact=False, ref_width=None):
  """Computes the record and the gradients with respect to hidden states, embedding and, if any, bias."""
  arrays, actions, cotangents = problem(size, dtype, ref_width)
  arrays = [x.astype(jnp.float32) for x in arrays] if exact else arrays
  options = dict(OPTIONS[option])
  bias, ref_bias = biases(size[1]) if options.pop('biases', False) else (None, None)

  def loss(policy):
    record = linear_weighted_kl(policy[0], policy[1], *arrays[2:], actions, exponent=3.0, bias=policy[2],
                                ref_bias=ref_bias, implementation=implementation, **options)
    return jnp.sum(record.log_prob * cotangents[0] + record.entropy * cotangents[1] + record.kl * cotangents[2]), record

  gradients, record = jax.jit(jax.grad(loss, has_aux=True))((arrays[0], arrays[1], bias))
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (record, gradients))


def error(found, expected):
  """Returns the largest error, relative to the largest entry."""
  assert found.shape == expected.shape
  assert np.all(np.isfinite(found))
  return np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-12)


def assert_close(found, expected):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(x, y) <= TOLERANCE


def cut(monkeypatch, blocks):
  monkeypatch.setattr(pallas_tpu, 'pick_blocks', lambda operands, with_grads: blocks)


@pytest.mark.parametrize(('size', 'option', 'blocks'), [
    pytest.param((3, 47, 31), 'all', None, marks=pytest.mark.slow),
    ((1, 300, 5), 'plain', Blocks(1, 128, 1)),
    ((40, 300, 40), 'all', Blocks(16, 128, 3)),  # ragged in tokens and vocabulary
    pytest.param((48, 256, 40), 'temperatures', Blocks(16, 128, 2), marks=pytest.mark.slow),  # two calls
])
def test_values_and_gradients(monkeypatch, capfd, size, option, blocks):
  if blocks:
    cut(monkeypatch, blocks)
  with pltpu.force_tpu_interpret_mode(STRICT):
    found = outcome(size, option, 'pallas_tpu', ref_width=size[2] + 1)
  assert_close(found, outcome(size, option, 'chunked', ref_width=size[2] + 1))
  assert 'RACE' not in capfd.readouterr().out.upper()


def use_plain_interpreter(monkeypatch):
  """Runs the kernels in Pallas's generic interpreter, because the TPU interpreter pads ragged aliased outputs."""
  for table, function in ((linear.FORWARD, pallas_tpu.forward), (linear.BACKWARD, pallas_tpu.backward)):
    monkeypatch.setitem(table, 'pallas_tpu', lambda plan, function=function: functools.partial(
        function, settings=plan.settings, interpret=True))


def test_several_calls_of_ragged_blocks(monkeypatch):
  use_plain_interpreter(monkeypatch)
  cut(monkeypatch, Blocks(16, 128, 1))
  assert_close(outcome((40, 300, 40), 'temperatures', 'pallas_tpu'), outcome((40, 300, 40), 'temperatures', 'chunked'))


@pytest.mark.slow
def test_low_precision_rounds_the_gradient_of_the_logits_and_no_more(monkeypatch):
  """Compares with `chunked` with equally rounded products; plain bfloat16 does not round them on the CPU."""
  size = 40, 300, 40
  use_plain_interpreter(monkeypatch)
  cut(monkeypatch, Blocks(16, 128, 3))
  exact = outcome(size, 'temperatures', 'chunked', jnp.bfloat16, exact=True)
  found = outcome(size, 'temperatures', 'pallas_tpu', jnp.bfloat16)
  dot = chunked.dot
  monkeypatch.setattr(chunked, 'dot', lambda a, b, axes: dot(a.astype(b.dtype), b, axes))
  alike = outcome(size, 'temperatures', 'chunked', jnp.bfloat16)
  assert_close(found[0], exact[0])
  for one, two, expected in zip(*map(jax.tree.leaves, (found[1], alike[1], exact[1])), strict=True):
    assert error(one, expected) <= 1.01 * error(two, expected)


@pytest.mark.slow
def test_a_low_precision_embedding_is_rounded_once_a_call(monkeypatch):
  operands, cotangents = direct_operands(np.arange(40), jnp.bfloat16)
  row = finish(chunked.forward(operands, Settings(), chunked.Tile(40, 300)))
  one, three = (embedding_gradient(monkeypatch, operands, row, cotangents, Blocks(16, 128, n)) for n in (3, 1))
  partial = []
  for end in (16, 32, 40):
    some = jax.tree.map(lambda x, end=end: jnp.where(np.arange(40)[:, None] < end, x, 0), cotangents)
    partial.append(embedding_gradient(monkeypatch, operands, row, some, Blocks(16, 128, 3)))
  half_ulp = 2.0**-9 * (1 + 2.0**-7)  # of bfloat16; the unrounded value is itself known to 2^-9
  assert 0 < np.abs(one - three).max() <= half_ulp * (sum(np.abs(x).max() for x in partial) + np.abs(one).max())


def embedding_gradient(monkeypatch, operands, row, cotangents, blocks):
  cut(monkeypatch, blocks)
  return np.asarray(pallas_tpu.backward(operands, Settings(), row, cotangents, interpret=True).embedding, np.float64)


def test_no_tokens():
  record, (dhidden, dembedding, _) = outcome((0, 47, 31), 'plain', 'pallas_tpu')
  assert record.kl.shape == (0,)
  assert dhidden.shape == (0, 31)
  np.testing.assert_array_equal(dembedding, np.zeros((47, 31)))


def direct_operands(actions, dtype=np.float32):
  arrays, _, cotangents = problem((len(actions), 300, 31), dtype)
  bias, ref_bias = biases(300)
  operands = Operands(Side(*arrays[:2], bias), Side(*arrays[2:], ref_bias), jnp.asarray(actions, jnp.int32),
                      jnp.float32(1.3), jnp.float32(0.7))
  return operands, Cotangents(*(x[:, None] for x in cotangents))


@pytest.mark.slow
def test_actions_in_other_parts_of_the_vocabulary(monkeypatch):
  cut(monkeypatch, Blocks(16, 128, 2))
  operands, cotangents = direct_operands([-300, -1, 0, 5, 299, 300, 310, 383, 384, 900])
  tile = chunked.Tile(10, 300)
  row = finish(chunked.forward(operands, Settings(), tile))
  found = finish(pallas_tpu.forward(operands, Settings(), interpret=True))
  assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, row))
  found = pallas_tpu.backward(operands, Settings(), row, cotangents, interpret=True)
  expected = chunked.backward(operands, Settings(), tile, row, cotangents)
  assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))


@pytest.mark.slow
def test_members_and_temperatures_are_vmapped(monkeypatch):
  (hidden, *others), actions, _ = problem((20, 300, 31))

  def loss(temperature, hidden, implementation):
    record = linear_weighted_kl(hidden, *others, actions, exponent=3.0, temperature=temperature,
                                certainty_temperature=temperature, implementation=implementation)
    return jnp.sum(record.log_prob + record.weight * record.kl)

  def both(implementation):
    return jax.vmap(jax.value_and_grad(functools.partial(loss, implementation=implementation), 1))

  members = jnp.array([1.0, 0.7]), jnp.stack([hidden, -hidden])
  assert 'tpu_custom_call' in lowered(both('pallas_tpu'), *members)
  use_plain_interpreter(monkeypatch)
  cut(monkeypatch, Blocks(16, 128, 2))
  found, expected = (jax.tree.map(np.asarray, jax.jit(both(name))(*members)) for name in ('pallas_tpu', 'chunked'))
  assert_close(found, expected)


# Mutations that the tests above must detect.


@pytest.mark.parametrize('broken', ['vocabulary tail', 'rows of factors'])
@pytest.mark.slow
def test_without_its_masks_it_is_wrong(monkeypatch, broken):
  use_plain_interpreter(monkeypatch)
  cut(monkeypatch, Blocks(16, 128, 3))  # without a soft cap, which would turn NaN into -inf
  if broken == 'vocabulary tail':
    columns = pallas_tpu._columns
    monkeypatch.setattr(pallas_tpu, '_columns', lambda *args: (columns(*args)[0], None))
  else:
    monkeypatch.setattr(pallas_tpu, '_first_rows', lambda x, count, total: x)
  with pytest.raises(AssertionError):
    assert_close(outcome((40, 300, 40), 'plain', 'pallas_tpu'), outcome((40, 300, 40), 'plain', 'chunked'))


# The lowered program.


def gradients_of(**options):
  def loss(hidden, embedding, ref_hidden, ref_embedding, actions):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=3.0,
                                implementation='pallas_tpu', **options)
    return jnp.sum(record.log_prob + record.weight * record.kl + record.entropy)
  return jax.grad(loss, (0, 1))


def shapes(num_tokens, vocab_size, width, dtype):
  rows, table = (jax.ShapeDtypeStruct((count, width), dtype) for count in (num_tokens, vocab_size))
  return rows, table, rows, table, jax.ShapeDtypeStruct((num_tokens,), jnp.int32)


def lowered(f, *args):
  return jax.export.export(jax.jit(f), platforms=['tpu'])(*args).mlir_module()


@pytest.mark.parametrize(('size', 'dtype', 'calls'), [
    ((8192, 151936, 2048), jnp.bfloat16, 2), ((3, 47, 31), jnp.float32, 1), ((1, 300, 5), jnp.float32, 1)])
def test_it_lowers_to_kernels(size, dtype, calls):
  text = lowered(gradients_of(), *shapes(*size, dtype))
  assert text.count('stablehlo.custom_call @tpu_custom_call') == 1 + calls
  assert f'{size[0]}x{size[1]}x' not in text


def test_it_lowers_with_the_vocabulary_over_four_devices():
  mesh, parts, whole = jax.make_mesh((4,), ('model',), (AxisType.Auto,)), PartitionSpec('model'), PartitionSpec()
  spread = jax.shard_map(gradients_of(axis_name='model'), mesh=mesh, in_specs=(whole, parts, whole, parts, whole),
                         out_specs=(whole, parts))
  assert 'tpu_custom_call' in lowered(spread, *shapes(252, 4 * 129, 31, jnp.float32))


def test_elsewhere_it_raises():
  arrays, actions, _ = problem((3, 47, 31))
  with pytest.raises(ValueError, match='interpret'):
    linear_weighted_kl(*arrays, actions, exponent=3.0, implementation='pallas_tpu')


def test_blocks_fit_or_the_width_is_refused():
  def operands(width):
    hidden, embedding, *_ = shapes(8192, 151936, width, jnp.float32)
    side = Side(hidden, embedding, None)
    return Operands(side, side, jax.ShapeDtypeStruct((8192,), jnp.int32), None, None)

  for width in (64, 2048, 4096):
    for with_grads in (False, True):
      blocks = pallas_tpu.pick_blocks(operands(width), with_grads)
      assert blocks.vocabulary % 128 == 0
      assert blocks.tokens % 16 == 0
      assert 4 * width * blocks.tokens * blocks.call <= max(pallas_tpu.HIDDEN_BUDGET, 4 * width * blocks.tokens)
  with pytest.raises(ValueError, match='width 65536'):
    pallas_tpu.pick_blocks(operands(65536), True)
