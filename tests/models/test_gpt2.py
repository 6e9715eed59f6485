import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiers import slow_except

from critkl_jax.analysis.detectors import counterfactual
from critkl_jax.models.architectures import reference_config
from critkl_jax.models.gpt2 import GPT2, GPT2Config, forward_flops, gpt2, stacked
from critkl_jax.records import Solution, Tokens
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.presets import PRETRAIN_PRESETS


def tokens_of(model, batch_size=3, length=10, seed=5):
  return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, model.config.vocab_size)


def num_params(config):
  shapes = jax.eval_shape(GPT2(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  return {name: x.shape for name, x in flatten_dict(shapes, sep='/').items()}


def reference_forward(params, tokens, config):
  """Computes GPT-2 in NumPy float64 for one episode, written independently from the published description."""
  p = {name: np.asarray(x, np.float64) for name, x in flatten_dict(params, sep='/').items()}

  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f'{name}/scale'] + p[f'{name}/bias']

  def dense(x, name):
    return x @ p[f'{name}/kernel'] + p[f'{name}/bias']

  x = p['wte/embedding'][tokens] + p['wpe/embedding'][:len(tokens)]
  for i in range(config.num_layers):
    q, k, v = np.split(dense(norm(x, f'h_{i}/ln_1'), f'h_{i}/attn/c_attn'), 3, -1)
    heads = []
    for head in np.split(np.arange(config.width), config.num_heads):
      scores = q[:, head] @ k[:, head].T / np.sqrt(len(head))
      scores[np.triu_indices(len(tokens), 1)] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, head])
    x = x + dense(np.concatenate(heads, -1), f'h_{i}/attn/c_proj')
    h = dense(norm(x, f'h_{i}/ln_2'), f'h_{i}/mlp/c_fc')
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    x = x + dense(gelu, f'h_{i}/mlp/c_proj')
  x = norm(x, 'ln_f')
  return x @ p['wte/embedding'].T, dense(x, 'value_head/c_proj')[:, 0]


def test_is_gpt2(small_model):
  model, params = small_model
  tokens = tokens_of(model)
  output = model.apply({'params': params}, tokens)
  for b in range(3):
    logits, values = reference_forward(params, np.asarray(tokens[b]), model.config)
    np.testing.assert_allclose(output.logits[b], logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.values[b], values, rtol=1e-5, atol=1e-5)


def test_parameter_names_are_those_of_gpt2():
  names = num_params(GPT2Config(num_layers=1))
  assert sorted(name for name in names if not name.startswith('value_head')) == sorted([
      'wte/embedding', 'wpe/embedding', 'ln_f/scale', 'ln_f/bias',
      *(f'h_0/{layer}/{part}' for layer in ('attn/c_attn', 'attn/c_proj', 'mlp/c_fc', 'mlp/c_proj')
        for part in ('kernel', 'bias')),
      *(f'h_0/{layer}/{part}' for layer in ('ln_1', 'ln_2') for part in ('scale', 'bias'))])


def test_sizes_of_the_presets():
  total = lambda name: sum(
      np.prod(shape) for key, shape in num_params(PRETRAIN_PRESETS[name].model).items() if 'value_head' not in key)
  assert total('gpt2') == 124_439_808  # parameters of the released model
  assert abs(total('paper') / 85e6 - 1) < 0.02


def test_initialisation():
  params = GPT2(GPT2Config(num_layers=8, width=256)).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  np.testing.assert_allclose(jnp.std(params['h_3']['attn']['c_attn']['kernel']), 0.02, rtol=0.02)
  for part in ('attn', 'mlp'):
    np.testing.assert_allclose(jnp.std(params['h_3'][part]['c_proj']['kernel']), 0.02 / 16**0.5, rtol=0.02)
  np.testing.assert_allclose(jnp.std(params['wte']['embedding']), 0.02, rtol=0.05)


def test_causality_by_gradient(small_model):
  model, params = small_model
  tokens = tokens_of(model, 1)

  def output_at(scale_T, t):
    embedding = params['wte']['embedding']
    positions = params['wpe']['embedding'][:tokens.shape[1]] * scale_T[:, None]
    moved = {**params, 'wte': {'embedding': embedding}, 'wpe': {
        'embedding': params['wpe']['embedding'].at[:tokens.shape[1]].set(positions)}}
    output = model.apply({'params': moved}, tokens)
    return jnp.sum(output.logits[0, t] * jnp.arange(11.0)) + output.values[0, t]

  for t in (0, 4, 9):
    gradient = np.asarray(jax.grad(output_at)(jnp.ones(tokens.shape[1]), t))
    assert np.all(gradient[:t + 1] != 0)
    assert np.all(gradient[t + 1:] == 0)


@pytest.mark.parametrize('prompt_length', [1, 6])
def test_prefill_and_decode_agree_with_the_full_pass(small_model, prompt_length):
  model, params = small_model
  tokens = tokens_of(model)
  full = model.apply({'params': params}, tokens)
  out = model.apply({'params': params}, tokens[:, :prompt_length], cache=gpt2(model.config).init_cache(3, 14))
  outputs = [out]
  decode = jax.jit(lambda token, cache: model.apply({'params': params}, token, cache=cache))
  for t in range(prompt_length, 10):
    outputs.append(decode(tokens[:, t:t + 1], outputs[-1].cache))
  for field in ('logits', 'values', 'hidden'):
    joined = jnp.concatenate([getattr(o, field) for o in outputs], 1)
    np.testing.assert_allclose(joined, getattr(full, field), rtol=1e-5, atol=1e-5)
  assert outputs[-1].cache.index == 10


@pytest.mark.parametrize('cached', [False, True])
def test_left_padding_changes_nothing(small_model, cached):
  model, params = small_model
  tokens = tokens_of(model)
  junk = tokens_of(model, 3, 4, seed=9)
  mask = jnp.concatenate([jnp.zeros((3, 4), bool), jnp.ones((3, 10), bool)], 1)
  cache = gpt2(model.config).init_cache(3, 20) if cached else None
  padded = model.apply({'params': params}, jnp.concatenate([junk, tokens], 1), mask, cache)
  full = model.apply({'params': params}, tokens)
  np.testing.assert_allclose(padded.logits[:, 4:], full.logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(padded.values[:, 4:], full.values, rtol=1e-5, atol=1e-5)
  assert np.all(np.isfinite(padded.logits))


def test_position_offset_moves_the_positions(small_model):
  model, params = small_model
  tokens = tokens_of(model)
  shifted = dict(params, wpe={'embedding': jnp.roll(params['wpe']['embedding'], -7, axis=0)})
  here = model.apply({'params': params}, tokens, position_offset=jnp.array([7, 0, 7]))
  there = model.apply({'params': shifted}, tokens)
  plain = model.apply({'params': params}, tokens)
  for b, expected in enumerate((there, plain, there)):
    np.testing.assert_allclose(here.logits[b], expected.logits[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('head', slow_except(('linear',), ('linear', 'mlp')))
@pytest.mark.parametrize('detached', slow_except((False,), (False, True)))
def test_value_gradient_reaches_the_trunk_unless_detached(head, detached):
  config = GPT2Config(vocab_size=11, context_length=16, num_layers=1, width=8, value_head=head,
                      value_head_detached=detached)
  model = GPT2(config)
  tokens = tokens_of(model)
  params = model.init(jax.random.key(0), tokens)['params']
  params['value_head']['c_proj']['kernel'] += 1.0
  grads = jax.grad(lambda p: jnp.sum(model.apply({'params': p}, tokens).values))(params)
  assert jnp.any(grads['value_head']['c_proj']['kernel'] != 0)
  trunk = [jnp.any(g != 0) for name, g in flatten_dict(grads, sep='/').items() if name.startswith('h_')]
  assert any(trunk) != detached


@pytest.mark.slow
def test_remat_changes_no_gradient(small_model):
  model, params = small_model
  tokens = tokens_of(model)
  again = GPT2(dataclasses.replace(model.config, remat=True))
  one, two = (jax.grad(lambda p, m=m: jnp.sum(jnp.sin(m.apply({'params': p}, tokens).logits)))(params)
              for m in (model, again))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, two)


def looped(model, **values):
  return GPT2(dataclasses.replace(model.config, scan_layers=True, **values))


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.slow
def test_blocks_as_a_loop_change_no_output_and_no_gradient(small_model, remat):
  model, params = small_model
  tokens = tokens_of(model)
  mask = jnp.arange(10)[None] >= jnp.array([[0], [3], [9]])
  again = looped(model, remat=remat)
  assert model.config.num_layers > 1

  def outputs(m, p):
    output = m.apply({'params': p}, tokens, mask)
    return jnp.sum(jnp.sin(output.logits)) + jnp.sum(output.values), output

  one, two = (jax.grad(functools.partial(outputs, m), has_aux=True)(params) for m in (model, again))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, two)
  _, together = outputs(again, stacked(again.config, params))
  np.testing.assert_allclose(together.logits, one[1].logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('in_step', [True, False])
@pytest.mark.slow
def test_blocks_as_a_loop_decode_the_same(small_model, in_step):
  model, params = small_model
  tokens, again = tokens_of(model), looped(model)
  full = model.apply({'params': params}, tokens)
  cache = gpt2(again.config).init_cache(3, 14, in_step)
  outputs, params = [], stacked(again.config, params)
  for start, end in ((0, 6), (6, 7), (7, 10)):
    outputs.append(again.apply({'params': params}, tokens[:, start:end], cache=cache))
    cache = outputs[-1].cache
  np.testing.assert_allclose(jnp.concatenate([o.logits for o in outputs], 1), full.logits, rtol=1e-5, atol=1e-5)
  assert jnp.all(cache.index == 10)


def test_blocks_as_a_loop_have_the_parameters_of_blocks(small_model):
  model, _ = small_model
  assert num_params(looped(model).config) == num_params(model.config)


@pytest.mark.usefixtures('standard_promotion')
def test_bfloat16_activations_float32_everything_else(small_model):
  model, params = small_model
  tokens = tokens_of(model)
  half = GPT2(dataclasses.replace(model.config, dtype='bfloat16'))
  output = half.apply({'params': params}, tokens)
  fresh = half.init(jax.random.key(0), tokens)['params']
  assert output.hidden.dtype == jnp.bfloat16
  assert output.logits.dtype == output.values.dtype == jnp.float32
  full = model.apply({'params': params}, tokens)
  error = jnp.abs(output.logits - full.logits)
  assert 1e-5 < jnp.max(error) < 0.05 * jnp.max(jnp.abs(full.logits))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(fresh))
  assert gpt2(half.config).init_cache(2, 4).keys[0].dtype == jnp.bfloat16


@pytest.mark.parametrize('numerics', [
    {'dtype': 'bfloat16', 'attention': 'cudnn', 'remat': True}, {'scan_layers': True, 'attention': 'xla'}, {}])
def test_references_are_read_with_the_numerics_that_training_reads_them_with(numerics):
  """Analysis runs a reference with every config field that training changes, except the critic."""
  reference = GPT2Config(width=64, attention='auto', value_head_detached=False)
  for head in ('linear', 'mlp'):
    policy = FinetuneConfig(**numerics, advantage='gae', value_head=head).model_of(reference)
    found = reference_config(policy, reference)
    assert dataclasses.replace(found, value_head=head, value_head_detached=True) == policy
    assert (found.value_head, found.value_head_detached) == ('linear', False)


def test_too_long_texts_are_refused(small_model):
  model, params = small_model
  with pytest.raises(ValueError, match='33 positions do not fit into a context of 32'):
    model.apply({'params': params}, jnp.zeros((1, 33), jnp.int32))


def test_a_cache_may_be_longer_than_the_context(small_model):
  """The last window of a response may end beyond its last token."""
  model, params = small_model
  tokens = jnp.zeros((1, 8), jnp.int32)
  cache = gpt2(model.config).init_cache(1, 40).replace(index=jnp.int32(28), mask=jnp.arange(40)[None] < 28)
  output = model.apply({'params': params}, tokens, cache=cache)
  assert jnp.all(jnp.isfinite(output.logits))


def test_flops_are_those_of_the_products():
  config = GPT2Config(vocab_size=11, num_layers=2, num_heads=2, width=16)
  # One token: qkv 3, projection 1, MLP 8 times D^2, and embedding; it attends only to itself: q k, and weights times v.
  one = 2 * (2 * 12 * 16**2 + 11 * 16) + 2 * 2 * 2 * 16
  assert forward_flops(config, [1]) == one
  assert forward_flops(config, [1, 1]) == 2 * one
  assert forward_flops(config, [2]) == 2 * one + 2 * 2 * 2 * 16


@pytest.mark.parametrize('unknown', [11, -1, -100, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_nothing_as_padding_and_nan_else(small_model, unknown):
  model, params = small_model
  tokens, mask = np.array(tokens_of(model)), np.arange(10)[None] < np.array([10, 6, 8])[:, None]

  def read(tokens):
    return model.apply({'params': params}, tokens, mask)

  padded, wrong = np.where(mask, tokens, unknown), tokens.copy()
  wrong[1, 3] = unknown
  np.testing.assert_array_equal(read(padded).logits[mask], read(tokens).logits[mask])
  found = np.isnan(read(wrong).logits)
  assert found[1, 3:].all()
  assert not found[[0, 2]].any()


def test_functions_that_take_a_language_model_take_the_module_too(small_model):
  """The numbers are those with its record."""
  module, params = small_model
  rollout = as_rollout(Tokens(jnp.array([[1, 2]]), jnp.ones((1, 2), bool)),
                       Solution(jnp.array([[3, 4, 5]]), jnp.ones((1, 3), bool)))
  wanted = score(gpt2(module.config), params, rollout)
  jax.tree.map(np.testing.assert_array_equal, score(module, params, rollout), wanted)
  with pytest.raises(ValueError, match=r'num_alternatives: .*11'):
    counterfactual(module, params, None, jax.random.key(0), num_alternatives=11)
  with pytest.raises(TypeError, match='expected a LanguageModel'):
    score(lambda params, tokens: tokens, params, rollout)
