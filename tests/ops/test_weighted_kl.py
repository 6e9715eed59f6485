"""The fused weighted KL against float64 NumPy: values, gradients, masks, ragged sizes, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from tiers import slow_except
from truth import TOLERANCE, WAYS, assert_values, combined, error, exact_problem, grads_and_record, linear_truth

from critkl_jax import linear_weighted_kl, linear_weighted_kl_loss, weighted_kl
from critkl_jax.ops.weighted_kl import LOG_PROB_FLOOR, pick_implementation
from critkl_jax.ops.weighted_kl.chunked import CACHED_ENTRIES, Held, Tile, pick_held, pick_tile

SIZES = ((3, 47, 31), (252, 507, 123), (1, 300, 5))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('scale', 'kind'), [
    (1, 'apart'), (10, 'apart'), (50, 'apart'), (1, 'near'), (10, 'near'), (3, 'other width')])
def test_linear_against_float64(way, size, scale, kind):
  arrays, cotangents = exact_problem(size, scale, kind)
  (dhidden, dembedding), record = grads_and_record(*arrays, cotangents, **WAYS[way])
  values, expected_hidden, expected_embedding = linear_truth(arrays, cotangents)
  assert_values(record, values)
  assert error(dhidden, expected_hidden) <= TOLERANCE
  assert error(dembedding, expected_embedding) <= TOLERANCE


@pytest.mark.parametrize('way', ['chunked', 'chunked, small tiles'])
def test_a_large_vocabulary(way):
  arrays, cotangents = exact_problem((5, 50257, 16), 10, 'apart')
  (dhidden, dembedding), record = grads_and_record(*arrays, cotangents, **WAYS[way])
  values, expected_hidden, expected_embedding = linear_truth(arrays, cotangents)
  assert_values(record, values)
  assert error(dhidden, expected_hidden) <= TOLERANCE
  assert error(dembedding, expected_embedding) <= TOLERANCE


@pytest.mark.parametrize('way', WAYS)
def test_no_tokens(way):
  arrays, cotangents = exact_problem((0, 47, 31), 1, 'apart')
  (dhidden, dembedding), record = grads_and_record(*arrays, cotangents, **WAYS[way])
  assert dhidden.shape == (0, 31)
  assert record.kl.shape == (0,)
  np.testing.assert_array_equal(dembedding, np.zeros((47, 31)))


@pytest.mark.parametrize('way', slow_except(('chunked, small tiles',), WAYS))
def test_low_precision_is_no_worse_than_plain(way):
  """The criterion of ml-cross-entropy: errors against float64 are at most 1.1 times those of plain bfloat16."""
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem((252, 507, 123), 3, 'apart')
  arrays = (*(jnp.asarray(x, jnp.bfloat16) for x in (hidden, embedding, ref_hidden, ref_embedding)), actions)
  expected = linear_truth([*(np.asarray(x, np.float64) for x in arrays[:4]), actions], cotangents)
  errors = {}
  for name in ('plain', way):
    (dhidden, dembedding), record = grads_and_record(*arrays, cotangents, **WAYS[name])
    assert dhidden.dtype == dembedding.dtype == jnp.bfloat16
    assert record.kl.dtype == jnp.float32
    errors[name] = [error(record.kl, expected[0]['kl']), error(record.entropy, expected[0]['entropy']),
                    *(error(x.astype(jnp.float32), y) for x, y in zip((dhidden, dembedding), expected[1:]))]
  for plain, fused in zip(errors['plain'], errors[way]):
    assert fused <= 1.1 * plain + 1e-6


OPTIONS = {
    'temperatures': {'temperature': 1.7, 'certainty_temperature': 0.6},
    'soft cap': {'soft_cap': 2.0, 'temperature': 0.8, 'certainty_temperature': 0.8},
    'bias': {'bias': np.linspace(-1, 1, 300, dtype=np.float32), 'ref_bias': np.linspace(2, -2, 300, dtype=np.float32)},
    'ruled out': {'bias': np.where(np.arange(300) % 5 == 1, -np.inf, 0).astype(np.float32),
                  'ref_bias': np.where(np.arange(300) % 7 == 2, -np.inf, 0).astype(np.float32), 'soft_cap': 3.0},
}

OPTIONS |= {
    f'policy rules out {first} to {last}': {
        'bias': np.where((np.arange(300) >= first) & (np.arange(300) < last), -np.inf, 0).astype(np.float32)}
    for first, last in ((0, 130), (112, 224), (200, 300))}


@pytest.mark.parametrize('budget', slow_except((8 * 128 * 60,), (2**20, 8 * 128 * 100, 8 * 128 * 60)))
@pytest.mark.parametrize('option', slow_except(
    ('temperatures', 'soft cap', 'bias', 'ruled out', 'policy rules out 112 to 224'), OPTIONS))
def test_options_mean_the_same_everywhere(option, budget):
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem((100, 300, 31), 1, 'apart')
  options = OPTIONS[option]
  allowed = np.flatnonzero(options.get('bias', np.zeros(300)) > -np.inf)  # a policy never samples ruled-out tokens
  actions = allowed[actions % len(allowed)]

  def logits(side, bias):
    x = side[0] @ side[1].T
    x = x if bias is None else x + bias[None]
    if 'soft_cap' not in options:
      return x
    capped = options['soft_cap'] * jnp.tanh(jnp.where(x > -jnp.inf, x, 0) / options['soft_cap'])
    return jnp.where(x > -jnp.inf, capped, -jnp.inf)

  def plain(hidden, embedding):
    z = logits((hidden, embedding), options.get('bias'))
    v = logits((ref_hidden, ref_embedding), options.get('ref_bias'))
    return combined(weighted_kl(
        z, v, actions, exponent=9.0, implementation='plain',
        **{k: x for k, x in options.items() if 'temperature' in k}), cotangents)

  def fused(hidden, embedding):
    return combined(linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=9.0,
                                       implementation='chunked', memory_budget=budget, **options), cotangents)

  for one, two in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(hidden, embedding)) for f in (plain, fused))):
    assert error(one, two, 1e-12 if one.ndim else 10.0) <= TOLERANCE  # the loss sums 100 losses of both signs


@pytest.mark.parametrize('way', WAYS)
def test_a_reference_that_rules_everything_out(way):
  arrays, _ = exact_problem((4, 300, 5), 1, 'apart')
  record = linear_weighted_kl(*arrays, exponent=1.0, ref_bias=np.full(300, -np.inf, np.float32), **WAYS[way])
  np.testing.assert_allclose(record.kl, -LOG_PROB_FLOOR - record.entropy, rtol=1e-6)


@pytest.mark.slow
def test_tokens_that_fill_up_a_tile_leave_gradients_finite():
  arrays, cotangents = exact_problem((7, 300, 5), 1, 'apart')
  bias = 100.0 * (np.arange(300) == 3).astype(np.float32)

  def gradients(**options):
    return jax.grad(lambda *x: combined(linear_weighted_kl(
        *x[:2], *arrays[2:], exponent=1.0, bias=x[2], implementation='chunked', **options), cotangents), (0, 1, 2))(
            *arrays[:2], bias)

  for one, two in zip(gradients(memory_budget=8 * 128 * 3), gradients()):
    assert error(one, two) <= TOLERANCE


def test_tiles_follow_the_budget():
  on_gpu = functools.partial(pick_tile, backend='gpu')
  assert on_gpu(2048, 50257, 64 * 2**20) == Tile(2048, 2048)
  assert on_gpu(2048, 50257, 4 * 2**20) == Tile(2048, 256)
  assert on_gpu(10**6, 50257, 4 * 2**20) == Tile(4082, 128)
  assert on_gpu(5, 40, 2**20) == Tile(5, 40)
  assert on_gpu(0, 40, 2**20) == Tile(1, 40)
  assert on_gpu(252, 507, 8 * 128 * 252) == Tile(252, 128)
  assert on_gpu(252, 507, 8 * 128 * 100) == Tile(84, 128)
  assert pick_held(2048, 50257, 2**28, 'gpu') == Held(512, 512, 2048)
  assert pick_held(2048, 50257, 2**26, 'gpu') is None
  assert pick_held(2048, 50257, 8 * 2**20) is None
  assert pick_held(5, 40, 2**20) == Held(5, 5, 40)
  assert pick_held(0, 40, 2**20) == Held(1, 1, 40)


def test_tiles_on_a_cpu_stay_in_its_cache():
  for tile in (pick_tile(2048, 50257), pick_tile(10**6, 50257)):
    assert tile.tokens * tile.vocabulary <= CACHED_ENTRIES
    assert tile.vocabulary % 128 == 112
  for num_tokens, held, tokens, rows in ((2048, 166, 158, 10), (2048, 128, 128, 10), (7, 166, 7, 7)):
    assert pick_held(num_tokens, 50257, 8 * held * 50257)[:2] == (tokens, rows)


# Masks.


@pytest.mark.parametrize('way', slow_except(
    ('chunked', 'chunked, small tiles', 'logits, fused'), [*WAYS, 'logits, reference', 'logits, fused']))
def test_masked_rows_may_hold_anything_and_cost_nothing(way):
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem((6, 47, 31), 1, 'apart')
  mask = np.array([True, False, True, True, False, True])

  def record_of(hidden, ref_hidden, actions, mask):
    if way.startswith('logits'):
      return weighted_kl(hidden @ embedding.T, ref_hidden @ ref_embedding.T, actions, exponent=2.0, mask=mask,
                         implementation=way.split(', ')[1])
    return linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=2.0, mask=mask,
                              **WAYS[way])

  def loss(hidden, ref_hidden, actions, mask, cotangents):
    record = record_of(hidden, ref_hidden, actions, mask)
    return combined(record, cotangents), record

  spoiled, ref_spoiled = (np.where(mask[:, None], x, np.nan) for x in (hidden, ref_hidden))
  wild = np.where(mask, actions, 10**6)
  gradient, record = jax.grad(loss, has_aux=True)(spoiled, ref_spoiled, wild, mask, cotangents)
  few, few_record = jax.grad(loss, has_aux=True)(
      hidden[mask], ref_hidden[mask], actions[mask], None, cotangents[:, mask])
  np.testing.assert_array_equal(gradient[~mask], 0)
  np.testing.assert_allclose(gradient[mask], few, rtol=1e-5, atol=1e-6)
  for one, two in zip(jax.tree.leaves(record), jax.tree.leaves(few_record)):
    np.testing.assert_array_equal(one[~mask], 0)
    np.testing.assert_allclose(one[mask], two, rtol=1e-5, atol=1e-6)


# Gradients.


@pytest.mark.parametrize('way', slow_except(('chunked', 'chunked, small blocks'), WAYS))
def test_check_grads(way):
  arrays, cotangents = exact_problem((5, 300, 7), 1, 'apart')
  options = WAYS[way] | ({'memory_budget': 8 * 128 * 3} if 'tiles' in way else {})

  def loss(hidden, embedding, bias):
    return combined(linear_weighted_kl(hidden, embedding, *arrays[2:], exponent=2.0, bias=bias, temperature=1.3,
                                       soft_cap=5.0, **options), cotangents)

  check_grads(loss, (*arrays[:2], np.linspace(-1, 1, 300, dtype=np.float32)), order=1, modes=['rev'], rtol=2e-2,
              atol=2e-2)


@pytest.mark.parametrize('way', WAYS)
def test_nothing_flows_to_reference_certainty_and_weight(way):
  arrays, _ = exact_problem((5, 47, 7), 1, 'apart')
  hidden, embedding, ref_hidden, ref_embedding, actions = arrays

  def fixed(hidden, embedding):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=2.0, **WAYS[way])
    return jnp.sum(record.certainty + record.weight + record.ref_log_prob)

  def all_fields(ref_hidden, ref_embedding, temperature, exponent):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=exponent,
                                temperature=temperature, **WAYS[way])
    return sum(map(jnp.sum, jax.tree.leaves(record)))

  gradients = (*jax.grad(fixed, (0, 1))(hidden, embedding),
               *jax.grad(all_fields, (0, 1, 2, 3))(ref_hidden, ref_embedding, 1.3, 2.0))
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# Per-token losses in one pass.


@pytest.mark.parametrize('way', slow_except(('chunked, small tiles',), WAYS))
@pytest.mark.parametrize('masked', slow_except((True,), (False, True)))
def test_the_summed_loss_is_the_sum_of_the_losses(way, masked):
  (hidden, embedding, ref_hidden, ref_embedding, actions), _ = exact_problem((252, 507, 123), 1, 'apart')
  rng = np.random.default_rng(3)
  advantages, old = rng.normal(size=(252,)), rng.normal(size=(252,)) - 6
  mask = rng.random(252) < 0.7 if masked else None
  hidden = np.where(mask[:, None], hidden, np.nan) if masked else hidden
  shaped = lambda x: None if x is None else jnp.asarray(x).reshape(4, 63, *x.shape[1:])

  def outer(coefficient, one_pass):
    def token_loss(record, advantages, old):
      ratio = jnp.exp(jnp.clip(record.log_prob - old, -1, 1))
      return -ratio * advantages + coefficient * record.weight * record.kl - 0.3 * record.entropy

    def loss(hidden, embedding):
      arrays = shaped(hidden), embedding, shaped(ref_hidden), ref_embedding, shaped(actions)
      options = {'exponent': 0.5, 'mask': shaped(mask), 'temperature': 1.2, **WAYS[way]}
      if one_pass:
        total, record = linear_weighted_kl_loss(token_loss, *arrays, shaped(advantages), shaped(old), **options)
        return 3 * total, record
      record = linear_weighted_kl(*arrays, **options)
      losses = token_loss(record, shaped(advantages), shaped(old))
      return 3 * jnp.sum(losses if mask is None else jnp.where(shaped(mask), losses, 0)), record

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, embedding)

  assert (pick_held(252, 507, WAYS[way].get('memory_budget', 2**26)) is None) == ('tiles' in way)
  one, two = (jax.jit(outer, static_argnums=1)(jnp.float32(0.7), one_pass) for one_pass in (True, False))
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
    assert error(x, y) <= TOLERANCE
  both = jax.vmap(functools.partial(outer, one_pass=True))(jnp.array([0.7, 0.0]))
  assert error(both[1][0][0], one[1][0]) <= TOLERANCE
  assert error(both[1][0][1], one[1][0]) > 1e-3


@pytest.mark.slow
def test_one_pass_in_low_precision():
  arrays, _ = exact_problem((252, 507, 123), 1, 'apart')
  arrays = (*(jnp.asarray(x, jnp.bfloat16) for x in arrays[:4]), arrays[4])

  def gradients(implementation, **options):
    return jax.grad(lambda *x: 3 * linear_weighted_kl_loss(
        lambda record: record.kl - record.log_prob, *x, *arrays[2:], exponent=1.0, implementation=implementation,
        **options)[0], (0, 1))(*arrays[:2])

  for budget in (2**26, 8 * 507 * 100):
    assert pick_held(252, 507, budget) is not None
    for one, two in zip(gradients('chunked', memory_budget=budget), gradients('plain')):
      assert one.dtype == jnp.bfloat16
      assert error(one.astype(jnp.float32), two.astype(jnp.float32)) <= 2**-7


def test_extra_arrays_must_fit():
  arrays, _ = exact_problem((5, 47, 7), 1, 'apart')
  with pytest.raises(ValueError, match='extra'):
    linear_weighted_kl_loss(lambda record, x: x, *arrays, np.zeros(4), exponent=1.0)


# Transformations.


@pytest.mark.parametrize('way', WAYS)
def test_numbers_may_be_traced_and_members_vmapped(way):
  arrays, _ = exact_problem((5, 300, 7), 1, 'apart')

  def value_and_grad(exponent, temperature, hidden):
    def loss(hidden):
      record = linear_weighted_kl(hidden, *arrays[1:], exponent=exponent, intercept=exponent / 10,
                                  temperature=temperature, certainty_temperature=temperature, **WAYS[way])
      return jnp.sum(record.weight * record.kl), record
    return jax.value_and_grad(loss, has_aux=True)(hidden)

  exponents, temperatures = jnp.array([0.0, 2.0, 5.0]), jnp.array([1.0, 0.7, 2.0])
  hiddens = jnp.stack([arrays[0], 2 * arrays[0], -arrays[0]])
  together = jax.jit(jax.vmap(value_and_grad))(exponents, temperatures, hiddens)
  for i in range(3):
    single = value_and_grad(float(exponents[i]), float(temperatures[i]), hiddens[i])
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(single)):
      assert error(x[i], y) <= TOLERANCE


@pytest.mark.parametrize('way', slow_except(('chunked',), ['chunked', 'chunked, small tiles']))
def test_a_vocabulary_over_four_devices(way):
  (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents = exact_problem((252, 4 * 129, 31), 3, 'apart')
  mesh, parts, whole = jax.make_mesh((4,), ('model',), (AxisType.Auto,)), PartitionSpec('model'), PartitionSpec()

  def loss(hidden, embedding, ref_embedding):
    record = linear_weighted_kl(hidden, embedding, ref_hidden, ref_embedding, actions, exponent=9.0, axis_name='model',
                                **WAYS[way])
    return combined(record, cotangents), record

  spread = jax.jit(jax.shard_map(
      jax.value_and_grad(loss, (0, 1), has_aux=True), mesh=mesh, in_specs=(whole, parts, parts),
      out_specs=((whole, whole), (whole, parts))))
  (_, record), (dhidden, dembedding) = spread(hidden, embedding, ref_embedding)
  outside = jax.jit(jax.grad(lambda *x: jax.shard_map(
      lambda *y: loss(*y)[0], mesh=mesh, in_specs=(whole, parts, parts), out_specs=whole)(*x), (0, 1)))
  values, expected_hidden, expected_embedding = linear_truth(
      (hidden, embedding, ref_hidden, ref_embedding, actions), cotangents)
  assert_values(record, values)
  for found in ((dhidden, dembedding), outside(hidden, embedding, ref_embedding)):
    assert error(found[0], expected_hidden) <= TOLERANCE
    assert error(found[1], expected_embedding) <= TOLERANCE


# Errors, and the default implementation.


def test_bad_arguments_are_named():
  hidden, embedding, ref_hidden, ref_embedding, actions = exact_problem((5, 47, 7), 1, 'apart')[0]
  call = functools.partial(linear_weighted_kl, exponent=1.0)
  with pytest.raises(ValueError, match=r'^hidden: .*\(5,\).*\(4,\)'):
    call(hidden[:4], embedding, ref_hidden, ref_embedding, actions)
  with pytest.raises(ValueError, match=r'^ref_embedding: .*47'):
    call(hidden, embedding, ref_hidden, ref_embedding[:40], actions)
  with pytest.raises(ValueError, match=r'^bias: '):
    call(hidden, embedding, ref_hidden, ref_embedding, actions, bias=np.zeros(3))
  with pytest.raises(ValueError, match=r'^mask: '):
    call(hidden, embedding, ref_hidden, ref_embedding, actions, mask=np.ones(3, bool))
  with pytest.raises(ValueError, match=r"^implementation: .*'fastest'"):
    call(hidden, embedding, ref_hidden, ref_embedding, actions, implementation='fastest')
  with pytest.raises(ValueError, match=r"^certainty: .*'mood'"):
    call(hidden, embedding, ref_hidden, ref_embedding, actions, certainty='mood')
  with pytest.raises(ValueError, match=r'^soft_cap: .*-1'):
    call(hidden, embedding, ref_hidden, ref_embedding, actions, soft_cap=-1.0)
  with pytest.raises(ValueError, match=r'^ref_logits: '):
    weighted_kl(hidden, hidden[:, :3], actions, exponent=1.0)


def test_the_choice_can_be_asked_for():
  assert pick_implementation(40, from_logits=True) == 'fused'
  assert pick_implementation(40, from_logits=False) == 'fused'
  for backend, name in {'cpu': 'chunked', 'gpu': 'chunked', 'tpu': 'pallas_tpu'}.items():
    assert pick_implementation(50257, from_logits=False, backend=backend) == name
  with pytest.raises(ValueError, match=r"^backend: .*'cuda'"):
    pick_implementation(50257, from_logits=False, backend='cuda')


def test_chunked_never_holds_all_logits():
  num_tokens, vocab_size, width = 500, 5000, 16
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in
            ((num_tokens, width), (vocab_size, width), (num_tokens, width), (vocab_size, width))]
  actions = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)

  def compiled(**options):
    loss = lambda *x: jnp.sum(linear_weighted_kl(*x, exponent=2.0, **options).kl)
    return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, actions).compile()

  plain = compiled(implementation='plain')
  assert f'f32[{num_tokens},{vocab_size}]' in plain.as_text()
  for budget in (8 * 128 * num_tokens, 8 * 128 * 64):
    program = compiled(implementation='chunked', memory_budget=budget)
    assert f'[{num_tokens},{vocab_size}]' not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes / 4


@pytest.mark.parametrize('implementation', ['plain', 'fused', 'chunked', 'partitioned'])
def test_no_gradient_flows_into_values_that_the_loss_closes_over(implementation):
  keys = jax.random.split(jax.random.key(0), 5)
  hidden, ref_hidden = (jax.random.normal(key, (40, 4)) for key in keys[:2])
  embedding, ref_embedding = (jax.random.normal(key, (2000, 4)) for key in keys[2:4])
  actions = jax.random.randint(keys[4], (40,), 0, 2000)

  def loss(coefficient, hidden):
    return linear_weighted_kl_loss(lambda record: coefficient * record.kl, hidden, embedding, ref_hidden, ref_embedding,
                                   actions, exponent=1.0, implementation=implementation)[0]

  of_coefficient, of_hidden = jax.jit(jax.grad(loss, (0, 1)))(2.0, hidden)
  assert of_coefficient == 0
  assert np.any(of_hidden)
