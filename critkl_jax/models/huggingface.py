"""Reads and writes Hugging Face model directories: config.json and safetensors. Needs no PyTorch.

    pretrained = load_pretrained('Qwen3-0.6B')                  # LanguageModel and parameters
    save_pretrained('tuned', pretrained.model, params)          # for `transformers`, or for `load_pretrained`

Nothing in a directory is executed, and pickled weights (`*.bin`) are not read. LoRA adapters are out of scope: merge
them first.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.architectures import make_model
from critkl_jax.models.gpt2 import GPT2Config
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.models.llama import LlamaConfig
from critkl_jax.models.safetensors_files import DTYPES, PretrainedError, read_json, tensors_in, write_tensors


class Pretrained(NamedTuple):
  """A model and its parameters.

  Attributes:
    model: the model.
    params: its parameters, float32; the critic is fresh.
    architecture: `model_type` of its config.json.
  """

  model: LanguageModel
  params: Any
  architecture: str


def load_pretrained(directory: str | os.PathLike, *, mesh: Mesh | None = None, key: Any = None, **settings: Any
                    ) -> Pretrained:
  """Reads a model directory.

  Each tensor is read from the file by the devices that hold a part of it, so that host memory never holds more than the
  part of one tensor that this host needs.

  Args:
    directory: has config.json, and model.safetensors or its parts with model.safetensors.index.json.
    mesh: the devices over which the parameters are spread; the first device of this host if None.
    key: PRNG key that initializes the critic, consumed; `jax.random.key(0)` if None.
    **settings: fields of the model's config that config.json does not have, such as `dtype`, `remat` or `value_head`.

  Returns:
    A `Pretrained`.

  Raises:
    PretrainedError: if a file is missing or damaged, or the architecture or one of its settings is not supported; the
      message says what was found and what is supported.
  """
  directory = pathlib.Path(directory).expanduser()
  architecture = _architecture(directory)
  model = make_model(read_config(directory, **settings))
  tensors = dict(tensors_in(directory))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  places = _places(shapes, model, mesh)
  critic = _fresh_critic(model, jax.random.key(0) if key is None else key)

  def one(path, shape, place):
    names = sharding.path_names(path)
    if model.is_critic(names):
      return jax.device_put(critic[names], place)
    name, transposed = _CONFIGS[architecture].name_of(names)
    if name not in tensors:
      raise PretrainedError(f'{directory}: has no tensor {name!r}, which a model of type {architecture!r} needs.')
    tensor = tensors[name]
    wanted = shape.shape[::-1] if transposed else shape.shape
    if tensor.shape != wanted:
      raise PretrainedError(f'{directory}: tensor {name!r} has shape {tensor.shape}; config.json asks for {wanted}.')
    array = tensor.read()
    array = array.T if transposed else array
    return jax.make_array_from_callback(shape.shape, place, lambda index: np.asarray(array[index], np.float32))

  return Pretrained(model, jax.tree_util.tree_map_with_path(one, shapes, places), architecture)


def read_config(directory: str | os.PathLike, **settings: Any) -> Any:
  """Returns the config of a model directory, for `make_model`; reads config.json alone.

  Args:
    directory: has config.json.
    **settings: as in `load_pretrained`.

  Raises:
    PretrainedError: as `load_pretrained`.
  """
  directory = pathlib.Path(directory).expanduser()
  architecture = _architecture(directory)
  values = _config_json(directory)
  try:
    return dataclasses.replace(_CONFIGS[architecture].read(values), **settings)
  except KeyError as error:
    raise PretrainedError(f'{directory}: config.json lacks the field {error}.') from error
  except PretrainedError as error:
    raise PretrainedError(f'{directory}: {error}') from error
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise PretrainedError(f'{directory}: config.json describes no model that is supported: {error}') from error


def save_pretrained(directory: str | os.PathLike, model: LanguageModel, params: Any, *, dtype: str = 'float32',
                    architecture: str = '') -> None:
  """Writes a model directory that `transformers` and `load_pretrained` read; the critic is left out.

  Args:
    directory: made if needed; must hold neither config.json nor safetensors.
    model: GPT-2 or a decoder of the Llama family.
    params: its parameters.
    dtype: dtype of the tensors, `float32`, `bfloat16` or `float16`.
    architecture: `model_type` of the config; empty for the one that the config implies.

  Raises:
    PretrainedError: if the directory holds a model, or the model is of another architecture.
  """
  directory = pathlib.Path(directory).expanduser()
  if (directory / 'config.json').exists() or any(directory.glob('*.safetensors*')):
    raise PretrainedError(f'{directory}: holds a model already; give another directory.')
  architecture = architecture or _implied(model.config)
  spec = _CONFIGS[architecture]
  tensors = {}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    names = sharding.path_names(path)
    if not model.is_critic(names):
      name, transposed = spec.name_of(names)
      tensors[name] = (x, transposed)
  directory.mkdir(parents=True, exist_ok=True)
  write_tensors(directory, tensors, np.dtype(ml_dtypes.bfloat16) if dtype == 'bfloat16' else np.dtype(dtype))
  values = spec.write(model.config) | {'model_type': architecture, 'torch_dtype': dtype,
                                       'architectures': [spec.class_name]}
  (directory / 'config.json').write_text(json.dumps(values, indent=2, allow_nan=False) + '\n')


# Architectures.


def _config_json(directory):
  path = directory / 'config.json'
  if not path.is_file():
    raise PretrainedError(f'{directory}: has no config.json; expected a Hugging Face model directory, of one of '
                          f'{tuple(_CONFIGS)}.')
  return read_json(path)


def _architecture(directory):
  """Returns `model_type` of a model directory; raises PretrainedError if it is not supported."""
  values = _config_json(directory)
  architecture = values.get('model_type')
  if architecture not in _CONFIGS:
    what = 'a LoRA adapter or an incomplete model' if architecture is None else f'a model of type {architecture!r}'
    raise PretrainedError(f'{directory}: holds {what}; supported are {tuple(_CONFIGS)}.')
  if values.get('quantization_config'):
    raise PretrainedError(f'{directory}: its weights are quantized; supported are {tuple(DTYPES)}.')
  return architecture


def _implied(config):
  if isinstance(config, GPT2Config):
    return 'gpt2'
  if not isinstance(config, LlamaConfig):
    raise PretrainedError(f'model: {type(config).__name__} has no architecture of Hugging Face; supported are '
                          f'{tuple(_CONFIGS)}.')
  if config.qk_norm:
    return 'qwen3'
  if config.qkv_bias:
    return 'qwen2'
  return 'mistral' if config.window else 'llama'


def _gpt2_config(values) -> GPT2Config:
  width, heads = values['n_embd'], values['n_head']
  for name, expected in (('activation_function', 'gelu_new'), ('scale_attn_weights', True),
                         ('scale_attn_by_inverse_layer_idx', False), ('layer_norm_epsilon', 1e-5),
                         ('add_cross_attention', False), ('n_inner', None), ('tie_word_embeddings', True)):
    _expect(values, name, expected, *([4 * width] if name == 'n_inner' else []))
  return GPT2Config(vocab_size=values['vocab_size'], context_length=values['n_positions'],
                    num_layers=values['n_layer'], num_heads=heads, width=width)


def _gpt2_values(config: GPT2Config) -> dict[str, Any]:
  return {'vocab_size': config.vocab_size, 'n_positions': config.context_length, 'n_layer': config.num_layers,
          'n_head': config.num_heads, 'n_embd': config.width, 'activation_function': 'gelu_new',
          'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True}


def _gpt2_name(path: tuple[str, ...]) -> tuple[str, bool]:
  if path[0] in ('wte', 'wpe'):
    return f'transformer.{path[0]}.weight', False
  parts = ['h', path[0][2:], *path[1:]] if path[0].startswith('h_') else list(path)
  parts[-1] = {'kernel': 'weight', 'scale': 'weight'}.get(parts[-1], parts[-1])
  return '.'.join(['transformer', *parts]), False


def _llama_config(values) -> LlamaConfig:
  architecture, scaling = values['model_type'], _scaling(values)
  _expect(values, 'hidden_act', 'silu')
  _expect(values, 'mlp_bias', False)
  layers = values['num_hidden_layers']
  window = values.get('sliding_window') or 0
  kinds = values.get('layer_types')
  if kinds is not None and len(set(kinds)) > 1:
    raise PretrainedError(f'layer_types: expected the same attention in all layers, got {sorted(set(kinds))}.')
  if architecture in ('qwen2', 'qwen3'):
    window = window if values.get('use_sliding_window', False) else 0
    if window and kinds is None and values.get('max_window_layers', layers) not in (0, layers):
      raise PretrainedError('max_window_layers: expected the same attention in all layers, got '
                            f'{values["max_window_layers"]} of {layers}.')
    window = 0 if kinds is None and values.get('max_window_layers', layers) == layers else window
  if kinds is not None and set(kinds) == {'full_attention'}:
    window = 0
  _expect(values, 'attention_bias', False)
  heads = values['num_attention_heads']
  return LlamaConfig(
      vocab_size=values['vocab_size'], context_length=values['max_position_embeddings'], num_layers=layers,
      num_heads=heads, num_kv_heads=values.get('num_key_value_heads') or heads, width=values['hidden_size'],
      head_width=values.get('head_dim') or values['hidden_size'] // heads, hidden_width=values['intermediate_size'],
      norm_epsilon=values.get('rms_norm_eps', 1e-6), qkv_bias=architecture == 'qwen2', qk_norm=architecture == 'qwen3',
      tied_embedding=values.get('tie_word_embeddings', False), window=window, **scaling)


def _scaling(values) -> dict[str, Any]:
  """Reads base and scaling of the rotary positions, from today's `rope_parameters` or the older two fields."""
  given = values.get('rope_parameters') or values.get('rope_scaling') or {}
  kind = given.get('rope_type', given.get('type', 'default'))
  found = {'rope_base': given.get('rope_theta') or values.get('rope_theta') or 10_000.0}
  if kind == 'default':
    return found
  if kind == 'linear':
    return found | {'rope_scaling': 'linear', 'rope_factor': given['factor']}
  if kind == 'llama3':
    return found | {
        'rope_scaling': 'llama3', 'rope_factor': given['factor'], 'rope_low_frequency_factor': given['low_freq_factor'],
        'rope_high_frequency_factor': given['high_freq_factor'],
        'rope_original_length': given['original_max_position_embeddings']}
  raise PretrainedError(f"rope_scaling: expected 'default', 'linear' or 'llama3', got {kind!r}.")


def _llama_values(config: LlamaConfig) -> dict[str, Any]:
  rope = {'rope_type': 'default' if config.rope_scaling == 'none' else config.rope_scaling,
          'rope_theta': config.rope_base}
  if config.rope_scaling != 'none':
    rope['factor'] = config.rope_factor
  if config.rope_scaling == 'llama3':
    rope |= {'low_freq_factor': config.rope_low_frequency_factor, 'high_freq_factor': config.rope_high_frequency_factor,
             'original_max_position_embeddings': config.rope_original_length}
  windowed = {'sliding_window': config.window or None, 'use_sliding_window': bool(config.window)}
  if config.window:
    windowed |= {'max_window_layers': 0, 'layer_types': ['sliding_attention'] * config.num_layers}
  return windowed | {
      'vocab_size': config.vocab_size, 'max_position_embeddings': config.context_length,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.kv_heads, 'hidden_size': config.width, 'head_dim': config.each_width,
      'intermediate_size': config.mlp_width, 'rms_norm_eps': config.norm_epsilon, 'hidden_act': 'silu',
      'tie_word_embeddings': config.tied_embedding, 'rope_parameters': rope, 'rope_theta': config.rope_base,
      'attention_bias': False}


def _llama_name(path: tuple[str, ...]) -> tuple[str, bool]:
  if path[0] == 'lm_head':
    return 'lm_head.weight', False
  parts = ['layers', path[0][len('layers_'):], *path[1:]] if path[0].startswith('layers_') else list(path)
  transposed = parts[-1] == 'kernel'
  parts[-1] = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}.get(parts[-1], parts[-1])
  return '.'.join(['model', *parts]), transposed


def _expect(values, name, expected, *others):
  if values.get(name, expected) not in (expected, *others):
    raise PretrainedError(f'{name}: expected {expected!r}, got {values[name]!r}.')


class _Architecture(NamedTuple):
  """How a kind of model is read and written.

  Attributes:
    read: fields of config.json -> config.
    write: config -> fields.
    name_of: path of a parameter -> (name of the tensor, whether it is transposed).
    class_name: class of `transformers`.
  """

  read: Callable[[dict[str, Any]], Any]
  write: Callable[[Any], dict[str, Any]]
  name_of: Callable[[tuple[str, ...]], tuple[str, bool]]
  class_name: str


_CONFIGS = {'gpt2': _Architecture(_gpt2_config, _gpt2_values, _gpt2_name, 'GPT2LMHeadModel')} | {
    name: _Architecture(_llama_config, _llama_values, _llama_name, f'{class_name}ForCausalLM')
    for name, class_name in (('llama', 'Llama'), ('mistral', 'Mistral'), ('qwen2', 'Qwen2'), ('qwen3', 'Qwen3'))}


def _places(shapes, model, mesh):
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, shapes)
  return sharding.shardings(shapes, mesh, model.partition)


def _fresh_critic(model, key):
  """Initializes the critic's parameters, by path; jitted, so that the others are never computed."""

  def init(key):
    leaves = jax.tree_util.tree_leaves_with_path(model.init(key))
    return {names: x for names, x in ((sharding.path_names(path), x) for path, x in leaves) if model.is_critic(names)}

  return jax.jit(init)(key)
