"""Decoders of the Llama family against an independent float64 computation, and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from letters import TOKENIZER, letter_task
from tiers import slow_except

from critkl_jax import config as config_lib
from critkl_jax import sharding
from critkl_jax.models.architectures import config_of, make_model
from critkl_jax.models.language_model import logits_of
from critkl_jax.models.llama import SIZES, Llama, LlamaConfig, forward_flops, llama
from critkl_jax.models.rotary import inverse_frequencies
from critkl_jax.sampling.generation import model_generate
from critkl_jax.sampling.scoring import score
from critkl_jax.tasks.task import stop_after
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning
from critkl_jax.training.train_step import make_train_step

BASE = LlamaConfig(vocab_size=23, context_length=64, num_layers=2, num_heads=4, num_kv_heads=2, width=16)
VARIANTS = {
    'llama': BASE,
    'untied, wide heads': dataclasses.replace(BASE, tied_embedding=False, head_width=6, hidden_width=20),
    'llama3 scaling': dataclasses.replace(BASE, rope_scaling='llama3', rope_factor=4.0, rope_original_length=12),
    'linear scaling': dataclasses.replace(BASE, rope_scaling='linear', rope_factor=3.0, rope_base=100.0),
    'biases': dataclasses.replace(BASE, qkv_bias=True, num_kv_heads=1),
    'norms of queries and keys': dataclasses.replace(BASE, qk_norm=True, num_kv_heads=4),
    'window': dataclasses.replace(BASE, window=5)}
FAST = ('llama', 'llama3 scaling', 'window')


@functools.cache
def model_of(name):
  """Returns a model and parameters without zeros and ones."""
  model = llama(VARIANTS[name])
  leaves, structure = jax.tree.flatten(model.init(jax.random.key(0)))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return model, jax.tree.unflatten(structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def tokens_of(batch_size=3, length=30, seed=5):
  return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, 23)


def logits(model, params, *arguments):
  output = model.apply(params, *arguments)
  return logits_of(output.hidden, model.output_head(params)), output


def reference_forward(params, tokens, config):
  """Computes the decoder in NumPy float64 for one episode, a token and a head at a time."""
  p = {name: np.asarray(x, np.float64) for name, x in flatten_dict(params, sep='/').items()}
  size, group = config.each_width, config.num_heads // config.kv_heads
  frequencies = np.asarray(inverse_frequencies(
      size, config.rope_base, config.rope_scaling, config.rope_factor, config.rope_low_frequency_factor,
      config.rope_high_frequency_factor, config.rope_original_length), np.float64)

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * p[f'{name}/scale']

  def turned(x):
    angle = np.arange(len(x))[:, None] * frequencies
    pairs = x[:, :size // 2] + 1j * x[:, size // 2:]
    pairs = pairs * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], -1)

  def heads(x, name, number):
    out = x @ p[f'{name}/kernel'] + p.get(f'{name}/bias', 0.0)
    return [out[:, i * size:(i + 1) * size] for i in range(number)]

  x = p['embed_tokens/embedding'][tokens]
  for i in range(config.num_layers):
    at, h = f'layers_{i}', norm(x, f'layers_{i}/input_layernorm')
    q, k, v = (heads(h, f'{at}/self_attn/{name}_proj', n) for name, n in (
        ('q', config.num_heads), ('k', config.kv_heads), ('v', config.kv_heads)))
    if config.qk_norm:
      q, k = ([norm(y, f'{at}/self_attn/{name}_norm') for y in z] for name, z in (('q', q), ('k', k)))
    found = []
    for j, own in enumerate(map(turned, q)):
      scores = own @ turned(k[j // group]).T / np.sqrt(size)
      distance = np.arange(len(x))[:, None] - np.arange(len(x))[None]
      scores[(distance < 0) | ((distance >= config.window) if config.window else False)] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      found.append(weights / weights.sum(-1, keepdims=True) @ v[j // group])
    x = x + np.concatenate(found, -1) @ p[f'{at}/self_attn/o_proj/kernel']
    h = norm(x, f'{at}/post_attention_layernorm')
    gate = h @ p[f'{at}/mlp/gate_proj/kernel']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ p[f'{at}/mlp/up_proj/kernel'])) @ p[f'{at}/mlp/down_proj/kernel']
  head = p['embed_tokens/embedding' if config.tied_embedding else 'lm_head/embedding']
  return norm(x, 'norm') @ head.T


@pytest.mark.parametrize('name', VARIANTS)
def test_is_the_published_decoder(name):
  model, params = model_of(name)
  found, _ = logits(model, params, tokens_of())
  for b, tokens in enumerate(np.asarray(tokens_of())):
    expected = reference_forward(params, tokens, model.config)
    np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_scaled_frequencies():
  usual = inverse_frequencies(128, 500_000.0)
  scaled = inverse_frequencies(128, 500_000.0, 'llama3', 8.0, 1.0, 4.0, 8192)
  turns = 8192 * usual / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns > 4], usual[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], usual[turns < 1] / 8, rtol=1e-6)
  between = (turns > 1) & (turns < 4)
  assert np.all((scaled[between] < usual[between]) & (scaled[between] > usual[between] / 8))


@pytest.mark.parametrize('name', slow_except(FAST, VARIANTS))
def test_windows_of_a_cache_and_left_padding_agree_with_the_full_pass(name):
  model, params = model_of(name)
  tokens = tokens_of()
  mask = jnp.arange(30)[None] >= jnp.array([0, 4, 11])[:, None]
  whole, _ = logits(model, params, tokens, mask)
  cache, parts = model.init_cache(3, 32, False), []
  for start, end in ((0, 12), (12, 13), (13, 21), (21, 30)):
    part, output = logits(model, params, tokens[:, start:end], mask[:, start:end], cache)
    cache = output.cache
    parts.append(part)
  np.testing.assert_allclose(jnp.concatenate(parts, 1)[mask], whole[mask], rtol=1e-4, atol=1e-4)
  alone, _ = logits(model, params, tokens[2:, 11:])
  np.testing.assert_allclose(whole[2, 11:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('remat', slow_except((True,), (False, True)))
def test_blocks_as_a_loop_change_no_output_and_no_gradient(remat):
  model, params = model_of('llama')
  loop = llama(dataclasses.replace(BASE, scan_layers=True, remat=remat))

  def loss(model, params):
    found, output = logits(model, params, tokens_of())
    return jnp.sum(jnp.sin(found)) + jnp.sum(output.values)

  one, two = (jax.grad(functools.partial(loss, m))(params) for m in (model, loop))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), one, two)


@pytest.mark.parametrize('scan', slow_except((False,), (False, True)))
def test_speculative_rollouts_are_those_token_by_token(scan):
  model, params = model_of('window')
  model = make_model(dataclasses.replace(model.config, scan_layers=scan))
  mask = jnp.arange(8)[None] >= jnp.array([0, 3, 5])[:, None]
  rollouts = [model_generate(model, params, tokens_of(length=8), mask, jax.random.key(3), max_new_tokens=24,
                             stop=stop_after([[7]]), method=method, temperature=0.6)
              for method in ('cached', 'speculative')]
  np.testing.assert_array_equal(rollouts[0].actions, rollouts[1].actions)
  found = jax.nn.log_softmax(score(model, params, rollouts[0])[0] / 0.6)
  log_probs = jnp.take_along_axis(found, rollouts[0].actions[..., None], -1)[..., 0]
  np.testing.assert_allclose(rollouts[0].log_probs, jnp.where(rollouts[0].mask, log_probs, 0), atol=1e-4)


@pytest.mark.usefixtures('standard_promotion')
def test_bfloat16_activations_float32_everything_else():
  model, params = model_of('norms of queries and keys')
  half = make_model(dataclasses.replace(model.config, dtype='bfloat16'))
  found, output = logits(half, params, tokens_of())
  assert (output.hidden.dtype, output.values.dtype, found.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(0)))} == {jnp.dtype('float32')}
  whole, _ = logits(model, params, tokens_of())
  assert float(jnp.mean(jnp.abs(found - whole)) / jnp.mean(jnp.abs(whole))) < 0.05


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize(('mesh', 'kv_heads'), slow_except((('data:4,model:2', 1),), (
    ('data:4,model:2', 1), ('data:4,model:2', 2), ('data:2,model:4', 2), ('data:8', 2))))
def test_a_mesh_trains_as_one_device_does(mesh, kv_heads):
  """Key heads that the mesh axis does not divide are computed on every device of the axis."""
  model = llama(dataclasses.replace(BASE, vocab_size=TOKENIZER.vocab_size, num_kv_heads=kv_heads))
  config = FinetuneConfig(episodes=16, minibatches=2, learning_rate=1e-3, num_iterations=1)
  reference = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(0)))

  def trained(mesh):
    state = init_finetuning(model, config, reference, mesh)
    key, numbers = finetuning_keys(config)[1], Hyperparameters.of(config)
    if mesh is not None:
      key, numbers = sharding.replicate((key, numbers), mesh)
    return make_train_step(model, letter_task(), config, mesh)(state, key, numbers)

  (one, metrics), (two, others) = (jax.device_get(trained(m)) for m in (None, sharding.make_mesh(mesh)))
  assert metrics['grad_norm'] > 1e-3
  for name in metrics:
    assert metrics[name] == pytest.approx(others[name], rel=1e-3, abs=1e-4), name
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), one.params, two.params)


def test_its_config_is_saved_and_read():
  for config in VARIANTS.values():
    assert config_of('llama', dataclasses.asdict(config)) == config
    assert make_model(config) is llama(config)


@pytest.mark.parametrize(('values', 'words'), [
    ({'num_kv_heads': 3}, 'num_kv_heads: expected a divisor of num_heads=4'),
    ({'head_width': 5}, 'head_width: rotary positions need heads of even width'),
    ({'width': 18}, 'num_heads: expected a divisor of width=18'), ({'rope_scaling': 'yarn'}, 'rope_scaling'),
    ({'rope_high_frequency_factor': 1.0}, 'rope_high_frequency_factor'), ({'attention': 'cudnn'}, 'bfloat16')])
def test_what_cannot_be_is_refused_by_name(values, words):
  with pytest.raises(ValueError, match=words):
    config_lib.replace(BASE, **values)


def test_flops_are_those_of_the_products():
  config = dataclasses.replace(BASE, head_width=6, hidden_width=20)
  per_token = 2 * (2 * (16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 20) + 16 * 23)
  attention = sum(2 * 2 * 2 * n * 24 for n in range(1, 8))  # two products, L = 2, n keys
  assert forward_flops(config, [7]) == 7 * per_token + attention


def test_too_long_texts_are_refused():
  with pytest.raises(ValueError, match='65 positions do not fit into a context of 64'):
    Llama(BASE).init(jax.random.key(0), jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize(('name', 'published'), [('qwen3_0_6b', 596_049_920), ('llama3_8b', 8_030_261_248)])
def test_published_sizes_have_the_published_number_of_parameters(name, published):
  model = llama(SIZES[name])
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(shapes)
             if not model.is_critic(sharding.path_names(path))) == published
