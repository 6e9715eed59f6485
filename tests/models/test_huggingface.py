"""Hugging Face model directories: written, read again, refused; and, where installed, read by transformers."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from critkl_jax import sharding
from critkl_jax.models import safetensors_files
from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.models.huggingface import PretrainedError, load_pretrained, save_pretrained
from critkl_jax.models.language_model import logits_of
from critkl_jax.models.llama import LlamaConfig, llama

LLAMA = LlamaConfig(vocab_size=31, context_length=64, num_layers=2, num_heads=4, num_kv_heads=2, width=16, head_width=4,
                    hidden_width=40, tied_embedding=False)
MODELS = {
    'gpt2': gpt2(GPT2Config(vocab_size=31, context_length=64, num_layers=2, num_heads=2, width=16)),
    'llama': llama(dataclasses.replace(LLAMA, rope_scaling='llama3', rope_factor=4.0, rope_original_length=12)),
    'mistral': llama(dataclasses.replace(LLAMA, window=5)),
    'qwen2': llama(dataclasses.replace(LLAMA, qkv_bias=True, tied_embedding=True)),
    'qwen3': llama(dataclasses.replace(LLAMA, qk_norm=True, head_width=8, rope_scaling='linear', rope_factor=2.0))}


def params_of(model):
  leaves, structure = jax.tree.flatten(model.init(jax.random.key(0)))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def without_critic(model, params):
  return [x for path, x in jax.tree_util.tree_leaves_with_path(params)
          if not model.is_critic(sharding.path_names(path))]


@pytest.fixture
def saved(tmp_path):
  model = MODELS['llama']
  save_pretrained(tmp_path / 'model', model, params_of(model))
  return tmp_path / 'model'


@pytest.mark.parametrize('name', MODELS)
def test_what_is_written_is_read_bit_for_bit(name, tmp_path, monkeypatch):
  model, params = MODELS[name], params_of(MODELS[name])
  monkeypatch.setattr(safetensors_files, 'SHARD_BYTES', 4000)  # several files
  save_pretrained(tmp_path / 'model', model, params)
  assert len(list((tmp_path / 'model').glob('model-*-of-*.safetensors'))) > 2
  found = load_pretrained(tmp_path / 'model')
  assert found.model is model
  assert found.architecture == name
  jax.tree.map(np.testing.assert_array_equal, without_critic(model, found.params), without_critic(model, params))
  assert not np.any(found.params['value_head']['c_proj']['kernel'])  # fresh


def test_half_precision_is_widened(tmp_path):
  model, params = MODELS['qwen3'], params_of(MODELS['qwen3'])
  save_pretrained(tmp_path / 'model', model, params, dtype='bfloat16')
  found = load_pretrained(tmp_path / 'model', dtype='bfloat16', value_head='mlp')
  assert (found.model.dtype, found.model.config.value_head) == ('bfloat16', 'mlp')
  for one, two in zip(without_critic(model, found.params), without_critic(model, params)):
    assert one.dtype == jnp.float32
    np.testing.assert_array_equal(one, np.asarray(two).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_tensors_are_placed_straight_onto_a_mesh(saved):
  mesh, model = sharding.make_mesh('data:2,model:2', jax.devices()[:4]), MODELS['llama']
  found = load_pretrained(saved, mesh=mesh)
  places = sharding.shardings(found.params, mesh, model.partition)
  jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(str(x.sharding)),
               found.params, places)
  jax.tree.map(np.testing.assert_array_equal, without_critic(model, found.params),
               without_critic(model, params_of(model)))


def change(folder, **values):
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(('values', 'words'), [
    ({'model_type': 'gemma3'}, "holds a model of type 'gemma3'; supported are .*'llama'"),
    ({'model_type': None}, 'a LoRA adapter or an incomplete model; supported are'),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}}, "rope_scaling: .*got 'yarn'"),
    ({'hidden_act': 'gelu'}, "hidden_act: expected 'silu', got 'gelu'"),
    ({'attention_bias': True}, 'attention_bias: expected False, got True'),
    ({'quantization_config': {'bits': 4}}, 'its weights are quantized'),
    ({'num_hidden_layers': 3}, r"has no tensor 'model.layers.2.* which a model of type 'llama' needs"),
    ({'intermediate_size': 48}, r"tensor 'model.layers.0.mlp.\w+.weight' has shape .*asks for"),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types: expected the same attention in all')])
def test_other_models_are_refused_in_a_sentence(saved, values, words):
  change(saved, **values)
  with pytest.raises(PretrainedError, match=words) as caught:
    load_pretrained(saved)
  assert '\n' not in str(caught.value)


def test_damaged_and_missing_files_are_named(saved, tmp_path):
  weights = saved / 'model.safetensors'
  whole = weights.read_bytes()
  for damaged, words in ((whole[:-8], 'cut off'), (whole[:5], 'no whole safetensors file'), (b'', 'no whole'),
                         (b'\xff' * 8 + whole[8:], 'header is longer than the file'),
                         (whole[:8] + b'{' * 500, 'no whole')):
    weights.write_bytes(damaged)
    with pytest.raises(PretrainedError, match=words):
      load_pretrained(saved)
  weights.unlink()
  with pytest.raises(PretrainedError, match=r'has no model.safetensors\.'):
    load_pretrained(saved)
  (saved / 'pytorch_model.bin').touch()
  with pytest.raises(PretrainedError, match=r'pickled weights \(pytorch_model.bin\) are not read'):
    load_pretrained(saved)
  (saved / 'config.json').write_text('[')
  with pytest.raises(PretrainedError, match=r'config\.json: is no JSON'):
    load_pretrained(saved)
  with pytest.raises(PretrainedError, match=r'has no config\.json; expected a Hugging Face model directory'):
    load_pretrained(tmp_path)


def test_a_model_is_not_written_over_another(saved):
  with pytest.raises(PretrainedError, match='holds a model already'):
    save_pretrained(saved, MODELS['gpt2'], params_of(MODELS['gpt2']))
  (saved / 'config.json').unlink()  # weights alone are kept too
  whole = (saved / 'model.safetensors').read_bytes()
  with pytest.raises(PretrainedError, match='holds a model already'):
    save_pretrained(saved, MODELS['gpt2'], params_of(MODELS['gpt2']))
  assert (saved / 'model.safetensors').read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_transformers_reads_what_is_written_and_computes_the_same(name, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model, params = MODELS[name], params_of(MODELS[name])
  save_pretrained(tmp_path / 'model', model, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model', attn_implementation='eager').eval()
  tokens = np.random.default_rng(0).integers(0, 31, (3, 40))
  mask = np.arange(40)[None] >= np.array([0, 5, 17])[:, None]
  with torch.no_grad():
    expected = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)),
                      position_ids=torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))).logits.numpy()
  output = model.apply(params, jnp.asarray(tokens), jnp.asarray(mask))
  found = np.asarray(logits_of(output.hidden, model.output_head(params)))
  np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-4 * np.abs(expected[mask]).max())
  theirs.save_pretrained(tmp_path / 'theirs')
  jax.tree.map(np.testing.assert_array_equal, without_critic(model, load_pretrained(tmp_path / 'theirs').params),
               without_critic(model, params))
  assert pathlib.Path(tmp_path / 'theirs' / 'model.safetensors').is_file()
