"""Models of any size that write as the shipped reference does, to measure with.

What a rollout costs depends on what the policy writes: untrained models write noise that no draft foresees and that
ends anywhere. So the reference is widened instead: its residual stream becomes a part of a wider one, other
features are zero, new heads, hidden units and blocks write nothing. The products are as large as the sizes say.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from critkl_jax import checkpoint
from critkl_jax.config import GPT2Config
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.presets import PRETRAIN_PRESETS


def load(preset: str, **changes: Any) -> tuple[GPT2Config, Any, int]:
  """Returns config, parameters and N of a model of a preset's size that writes as the shipped reference does.

  Args:
    preset: of `PRETRAIN_PRESETS`.
    **changes: fields of the config to replace, `dtype` or `context_length` for example.

  Raises:
    ValueError: as `widen`, if the size is smaller than the shipped reference's.
  """
  shipped = checkpoint.load_checkpoint()
  small, config = shipped.info.model, dataclasses.replace(PRETRAIN_PRESETS[preset].model, **changes)
  same = dataclasses.replace(config, dtype=small.dtype) == small
  return config, shipped.params if same else widen(shipped.params, small, config), shipped.info.known_digits


def widen(params: Any, small: GPT2Config, large: GPT2Config) -> Any:
  """Returns parameters of a larger GPT-2 that says nearly the same (in the manner of Net2Net, arXiv 1511.05641).

  Every write into the residual stream is centred, which layer norm cannot see, and scaled by sqrt(D' / D), so that mean
  and variance over the wider stream are those over the narrow one. The output embedding is the input embedding and is
  centred with it, which moves log-probabilities by some 0.01. The value head starts anew.

  Args:
    params: of the smaller model, with a value head of any kind.
    small: its config.
    large: the config of the result.

  Raises:
    ValueError: unless heads are equally wide, and vocabulary, context and every size are at least as large.
  """
  if small.width // small.num_heads != large.width // large.num_heads or any(
      getattr(small, name) > getattr(large, name) for name in ('width', 'num_layers', 'vocab_size', 'context_length')):
    raise ValueError(f'large: expected heads of equal width and no smaller sizes than {small}, got {large}.')
  scale = (large.width / small.width) ** 0.5
  shapes = jax.eval_shape(lambda: init_params(GPT2(large), jax.random.key(0)))
  blocks = [f'h_{i}' for i in range(small.num_layers)]

  def writes(x):  # an array whose last axis is the residual stream
    return scale * (x - x.mean(-1, keepdims=True))

  def write(x, shape):
    return fit(writes(x), shape)

  def fit(old, shape):  # zeros behind the old entries of each axis
    return jnp.pad(old, [(0, new - size) for size, new in zip(old.shape, shape.shape)])

  def qkv(x, shape):  # queries, keys and values stand side by side
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
  new['ln_f'] = _norm(params['ln_f'], shapes['ln_f'], scale, 1 / scale)  # the output embedding is scaled as well
  new['value_head'] = jax.jit(lambda: init_params(GPT2(large), jax.random.key(0))['value_head'])()
  return new


def _norm(norm, shape, scale, factor=1.0):
  width = norm['scale'].size
  pad = (0, shape['scale'].shape[0] - width)
  return {'scale': jnp.pad(factor * norm['scale'] / scale, pad), 'bias': jnp.pad(factor * norm['bias'], pad)}
