"""Benchmark models of any size whose responses are those of the shipped reference.

The cost of a rollout depends on the responses: those of an untrained model are noise that no draft predicts and that
ends anywhere. So the shipped reference is widened: its residual stream becomes part of a wider one whose other features
are zero, and new heads, hidden units and blocks write nothing. The matrix products have the full size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from critkl_jax.models.gpt2 import GPT2Config, gpt2
from critkl_jax.runtime import checkpoint
from critkl_jax.training.presets import PRETRAIN_PRESETS


def load(preset: str, **changes: Any) -> tuple[GPT2Config, Any, int]:
  """Returns config, parameters and N of the shipped reference, widened to a preset's size.

  Args:
    preset: key of `PRETRAIN_PRESETS`.
    **changes: fields of the config to replace, `dtype` or `context_length` for example.

  Raises:
    ValueError: as `widen`, if the size is smaller than the shipped reference's.
  """
  shipped = checkpoint.load_checkpoint()
  small, config = shipped.info.model, dataclasses.replace(PRETRAIN_PRESETS[preset].model, **changes)
  same = dataclasses.replace(config, dtype=small.dtype) == small
  return config, shipped.params if same else widen(shipped.params, small, config), shipped.info.task.known_digits


def widen(params: Any, small: GPT2Config, large: GPT2Config) -> Any:
  """Returns parameters of a larger GPT-2 with nearly the same outputs (as in Net2Net, arXiv 1511.05641).

  Every write into the residual stream is centred, which layer norm ignores, and scaled by sqrt(D' / D) for new width
  D', so that mean and variance over the wider stream are those over the narrow one. The output embedding is the input
  embedding and is centred too, which changes log-probabilities by about 0.01. The value head is initialised anew.

  Args:
    params: parameters of the smaller model, with any kind of value head.
    small: its config.
    large: the config of the result.

  Raises:
    ValueError: unless heads are equally wide, and vocabulary, context and every size are at least as large.
  """
  if small.width // small.num_heads != large.width // large.num_heads or any(
      getattr(small, name) > getattr(large, name) for name in ('width', 'num_layers', 'vocab_size', 'context_length')):
    raise ValueError(f'large: expected heads of equal width and no smaller sizes than {small}, got {large}.')
  scale = (large.width / small.width) ** 0.5
  shapes = jax.eval_shape(lambda: gpt2(large).init(jax.random.key(0)))
  blocks = [f'h_{i}' for i in range(small.num_layers)]

  def writes(x):  # an array whose last axis is the residual stream
    return scale * (x - x.mean(-1, keepdims=True))

  def write(x, shape):
    return fit(writes(x), shape)

  def fit(old, shape):  # zeros behind the old entries of each axis
    return jnp.pad(old, [(0, new - size) for size, new in zip(old.shape, shape.shape)])

  def qkv(x, shape):  # queries, keys and values are concatenated on the last axis
    parts = jnp.split(x, 3, -1)
    part = jax.ShapeDtypeStruct((*shape.shape[:-1], shape.shape[-1] // 3), shape.dtype)
    return jnp.concatenate([fit(p, part) for p in parts], -1)

  new = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  for name in ('wte', 'wpe'):
    new[name]['embedding'] = fit(writes(params[name]['embedding']), shapes[name]['embedding'])
  for name in blocks:
    block, shape = params[name], shapes[name]
    new[name] = {
        'ln_1': _norm(block['ln_1'], shape['ln_1'], scale), 'ln_2': _norm(block['ln_2'], shape['ln_2'], scale),
        'attn': {'c_attn': jax.tree.map(qkv, block['attn']['c_attn'], shape['attn']['c_attn']),
                 'c_proj': jax.tree.map(write, block['attn']['c_proj'], shape['attn']['c_proj'])},
        'mlp': {'c_fc': jax.tree.map(fit, block['mlp']['c_fc'], shape['mlp']['c_fc']),
                'c_proj': jax.tree.map(write, block['mlp']['c_proj'], shape['mlp']['c_proj'])}}
  new['ln_f'] = _norm(params['ln_f'], shapes['ln_f'], scale, 1 / scale)  # undoes the scale of the output embedding
  new['value_head'] = jax.jit(lambda: gpt2(large).init(jax.random.key(0))['value_head'])()
  return new


def _norm(norm, shape, scale, factor=1.0):
  width = norm['scale'].size
  pad = (0, shape['scale'].shape[0] - width)
  return {'scale': jnp.pad(factor * norm['scale'] / scale, pad), 'bias': jnp.pad(factor * norm['bias'], pad)}
