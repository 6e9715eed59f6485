"""GPT-2 with a value head, as a Linen module from tokens to logits and values.

Radford et al. (2019), "Language models are unsupervised multitask learners": learned positions, pre-layer-norm,
tanh-GELU, tied embedding; parameters have the names of the released model.

Letters: B episodes, T new tokens, S slots of the cache, D model width, H heads, E width of a head, V vocabulary,
L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax import sharding
from critkl_jax.config import at_least, between, convert_fields, one_of
from critkl_jax.models import kv_cache
from critkl_jax.models.attention import attend, causal_attention, check_implementation
from critkl_jax.models.blocks import known_or_padding, loop_over_blocks, stack_blocks
from critkl_jax.models.kv_cache import KVCache
from critkl_jax.models.language_model import LanguageModel, ModelOutput, OutputHead, logits_of
from critkl_jax.models.value_head import ValueHead

MOST_POSITIONS = 2**24  # longest context: float32 represents larger integers inexactly
MOST_LAYERS = 10_000  # tracing more would take too long
# Last names of a parameter's path -> the axis of the parameter that a pass spreads over `model`.
_MODEL_AXIS = {('mlp', 'c_fc', 'kernel'): 1, ('mlp', 'c_fc', 'bias'): 0, ('mlp', 'c_proj', 'kernel'): 0,
               ('attn', 'c_proj', 'kernel'): 0}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """Sizes and numerics of the model.

  Attributes:
    vocab_size: V, the number of token ids.
    context_length: The number of positions.
    num_layers: L, the number of blocks.
    num_heads: H, the number of attention heads, a divisor of the width.
    width: D, the width of the residual stream.
    value_head: The critic: `linear`, or `mlp` with two hidden layers of 128 as in the paper's released code.
    value_head_detached: Whether the gradient of the critic stops before the trunk.
    dtype: Type of activations, `float32` or `bfloat16`; parameters, logits and values are always float32.
    attention: Implementation of attention over whole texts: `auto` computes it in blocks of queries; `xla` and `cudnn`
      call `jax.nn.dot_product_attention`. `cudnn` needs an NVIDIA GPU and bfloat16.
    remat: Whether the backward pass recomputes the blocks, to save memory.
    scan_layers: Whether `lax.scan` runs the blocks, for deep models: the program compiles as fast as with one block,
      and on several devices a pass gathers the parameters of one block at a time.
  """

  vocab_size: int = 41
  context_length: int = 768
  num_layers: int = 4
  num_heads: int = 2
  width: int = 128
  value_head: str = 'linear'
  value_head_detached: bool = True
  dtype: str = 'float32'
  attention: str = 'auto'
  remat: bool = False
  scan_layers: bool = False

  def __post_init__(self):
    convert_fields(self)
    at_least(self, 1, 'vocab_size', 'num_heads', 'width')
    between(self, 1, MOST_POSITIONS, 'context_length')
    between(self, 1, MOST_LAYERS, 'num_layers')
    one_of(self, 'value_head', 'linear', 'mlp')
    one_of(self, 'dtype', 'float32', 'bfloat16')
    one_of(self, 'attention', 'auto', 'xla', 'cudnn')
    if self.width % self.num_heads:
      raise ValueError(f'num_heads: expected a divisor of width={self.width}, got {self.num_heads}.')
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise ValueError(f"attention: 'cudnn' needs dtype='bfloat16', got {self.dtype!r}.")


@struct.dataclass
class GPT2Output:
  """Outputs of the model at each token.

  Attributes:
    logits: float32 `[B, T, V]` of the next token; None without `with_logits`.
    values: float32 `[B, T]` value estimates.
    hidden: `[B, T, D]` final hidden states, after the last layer norm, in the dtype of the activations.
    cache: the cache with the new tokens in it, or None if none was given.
  """

  logits: chex.Array | None
  values: chex.Array
  hidden: chex.Array
  cache: KVCache | None


@functools.cache
def gpt2(config: GPT2Config = GPT2Config()) -> LanguageModel:
  """Makes GPT-2 as a `LanguageModel`; equal configs return the same record."""
  module = GPT2(config)

  def init(key):
    return module.init(key, jnp.zeros((1, 1), jnp.int32))['params']

  def apply(params, tokens, mask=None, cache=None, position_offset=0):
    output = module.apply({'params': params}, tokens, mask, cache, position_offset, with_logits=False)
    return ModelOutput(hidden=output.hidden, values=output.values, cache=output.cache)

  def init_cache(batch_size, length, in_step=True):
    return kv_cache.empty_cache(batch_size, length, config.num_layers, config.num_heads,
                                config.width // config.num_heads, config.dtype, in_step, config.scan_layers)

  return LanguageModel(
      config=config, name='gpt2', init=init, apply=apply, init_cache=init_cache, rewind=kv_cache.rewind,
      grow=kv_cache.grow, output_head=lambda params: OutputHead(params['wte']['embedding']), partition=partition,
      is_critic=lambda path: 'value_head' in path, is_matrix=lambda path: _in_block(path) and path[-1] == 'kernel',
      gathers_itself=_in_block if config.scan_layers else lambda path: False, layer_of=_layer_of,
      prepare=functools.partial(stacked, config), forward_flops=functools.partial(forward_flops, config))


def forward_flops(config: GPT2Config, lengths: Sequence[int]) -> float:
  """Counts the FLOP of a forward pass over texts of these lengths, logits included.

  Counts matrix products and causal attention; not padding, masked scores, softmax or norms.
  """
  dense = 12 * config.num_layers * config.width**2 + config.width * config.vocab_size
  total, squares = float(sum(lengths)), float(sum(float(n) * (n + 1) for n in lengths))
  return 2 * dense * total + 2 * squares * config.width * config.num_layers


def partition(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Looks up the axis of a parameter that a pass spreads over `model`, by the end of its path: GPT-2's `Partition`.

  All other axes are None. `c_attn` is not spread: its columns hold queries, keys and values side by side, and
  `HeadProjection` splits them by head. The axis of layers (`scan_layers`) is `whole`: it is never spread.
  """
  layers = ('whole',) if path[:1] == ('h',) else ()
  at = _MODEL_AXIS.get(path[-3:])
  return layers + tuple('model' if axis == at else None for axis in range(len(shape) - len(layers)))


def _layer_of(path):
  """Returns position and name of a parameter's layer; within a block the name includes its part, as in `h_0/mlp`."""
  if path[0].startswith('h_'):
    return 1 + int(path[0][2:]), '/'.join(path[:2])
  return {'wte': 0, 'wpe': 0}.get(path[0], 1 + MOST_LAYERS), path[0]


def _in_block(path):
  """Returns whether a parameter belongs to a block: `h_0`, `h_1`, ..., or `h` with a leading axis of layers."""
  return path[:1] == ('h',) or ''.join(path[:1]).startswith('h_')


def stacked(config: GPT2Config, params: Any) -> Any:
  """Stacks the parameters of all blocks under `h`, with a leading axis L, if `scan_layers` is set.

  The model accepts both forms; stacking before a decoding loop avoids stacking in every step.
  """
  return stack_blocks(params, 'h', config.num_layers) if config.scan_layers else params


class HeadProjection(nn.Module):
  """Projects hidden states `[B, T, D]` to queries, keys and values `[B, T, H, E]`.

  The kernel is that of a dense layer, `[D, 3 D]`. It is split by head before the product, so that each device can
  compute the product for its own heads.
  """

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD):
    config = self.config
    kernel = self.param('kernel', nn.initializers.normal(0.02), (config.width, 3 * config.width), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (3 * config.width,), jnp.float32)
    x_BxTxD, kernel, bias = nn.dtypes.promote_dtype(x_BxTxD, kernel, bias, dtype=jnp.dtype(config.dtype))
    heads = (3, config.num_heads, config.width // config.num_heads)
    kernel_Dx3xHxE = sharding.constrain(kernel.reshape(config.width, *heads), None, None, 'model')
    out_BxTx3xHxE = jnp.einsum('btd,dche->btche', x_BxTxD, kernel_Dx3xHxE) + bias.reshape(1, 1, *heads)
    return tuple(sharding.constrain(out_BxTx3xHxE[:, :, i], 'data', None, 'model') for i in range(3))


class Attention(nn.Module):
  """Causal self-attention over cached and new tokens, with the mask from `kv_cache.place`.

  `cached` holds the keys and values of this layer, or of all layers if `layer`, this layer's number, is given.
  """

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD, mask, cached, index, layer=None):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    q_BxTxHxE, k_BxTxHxE, v_BxTxHxE = HeadProjection(config, name='c_attn')(x_BxTxD)
    if cached is not None:
      cached = (kv_cache.write(cached[0], jnp.transpose(k_BxTxHxE, (0, 2, 3, 1)), index, axis=-1, layer=layer),
                kv_cache.write(cached[1], jnp.swapaxes(v_BxTxHxE, 1, 2), index, axis=-2, layer=layer))
      own = cached if layer is None else [jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False) for x in cached]
      out_BxTxHxE = jnp.swapaxes(attend(jnp.swapaxes(q_BxTxHxE, 1, 2), *own, mask), 1, 2)
    elif config.attention == 'auto':
      out_BxTxHxE = causal_attention(q_BxTxHxE, k_BxTxHxE, v_BxTxHxE, mask)
    else:
      itself = jnp.eye(mask.shape[1], dtype=bool)  # padding sees itself, so that every query sees a key
      sees = mask[:, None, None] | itself[None, None]
      check_implementation(config.attention)
      out_BxTxHxE = jax.nn.dot_product_attention(
          q_BxTxHxE, k_BxTxHxE, v_BxTxHxE, mask=sees, is_causal=True, implementation=config.attention)
    projection = nn.Dense(config.width, dtype=dtype, kernel_init=_residual_init(config), name='c_proj')
    return sharding.episodes(projection(out_BxTxHxE.reshape(x_BxTxD.shape))), cached


class MLP(nn.Module):
  """The feed-forward network of a block."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD):
    dtype = jnp.dtype(self.config.dtype)
    x = nn.Dense(4 * self.config.width, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name='c_fc')(x_BxTxD)
    x = nn.gelu(sharding.constrain(x, 'data', None, 'model'), approximate=True)
    projection = nn.Dense(self.config.width, dtype=dtype, kernel_init=_residual_init(self.config), name='c_proj')
    return sharding.episodes(projection(x))


class Block(nn.Module):
  """A pre-layer-norm transformer block."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD, mask, cached, index, layer=None):
    norm = {'epsilon': 1e-5, 'dtype': jnp.dtype(self.config.dtype)}
    attended, cached = Attention(self.config, name='attn')(
        nn.LayerNorm(**norm, name='ln_1')(x_BxTxD), mask, cached, index, layer)
    x_BxTxD = x_BxTxD + attended
    return x_BxTxD + MLP(self.config, name='mlp')(nn.LayerNorm(**norm, name='ln_2')(x_BxTxD)), cached


class GPT2(nn.Module):
  """GPT-2: `model.apply({'params': params}, tokens, ...) -> GPT2Output`.

  Attributes:
    config: sizes and numerics.
  """

  config: GPT2Config

  @nn.nowrap
  def language_model(self) -> LanguageModel:
    """Returns the model as the record that training and sampling use."""
    return gpt2(self.config)

  @nn.compact
  def __call__(self, tokens: chex.Array, mask: chex.Array | None = None, cache: KVCache | None = None,
               position_offset: chex.Array | int = 0, with_logits: bool = True) -> GPT2Output:
    """Runs the model over new tokens, which follow the tokens of the cache if there is one.

    The position of a token is the number of real tokens before it in its episode, plus the offset; so padding on the
    left changes nothing. Two limits are not checked: positions, offset included, must lie inside the context (greater
    ones are clipped to the last), and the cache must have a free slot for each new token.

    Args:
      tokens: int32 `[B, T]`, 0..V-1; an unmasked id outside the vocabulary gives NaN at its token and all later ones
        of the episode, and may do so at earlier ones.
      mask: bool `[B, T]` false at padding; all true if None.
      cache: keys and values of earlier tokens; the new ones are written at its index.
      position_offset: int32 `[]` or `[B]` added to the positions.
      with_logits: whether to compute logits.

    Returns:
      `GPT2Output`; its logits at `[b, t]` predict the token after `tokens[b, t]`.

    Raises:
      ValueError: if T exceeds the context, or the config's attention cannot run on this machine's devices.
    """
    config = self.config
    if tokens.shape[1] > config.context_length:
      raise ValueError(f'tokens: {tokens.shape[1]} positions do not fit into a context of {config.context_length}.')
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    tokens = known_or_padding(jnp.asarray(tokens, jnp.int32), mask, config.vocab_size)
    attention_mask, positions, cache = kv_cache.place(mask, cache)
    positions = positions + jnp.reshape(jnp.asarray(position_offset, jnp.int32), (-1, 1))

    wte = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02), name='wte')
    wpe = nn.Embed(config.context_length, config.width, embedding_init=nn.initializers.normal(0.01), name='wpe')
    x_BxTxD = (wte(tokens) + wpe(jnp.minimum(positions, config.context_length - 1))).astype(config.dtype)
    x_BxTxD = sharding.episodes(x_BxTxD)
    if config.scan_layers and not self.is_initializing():
      x_BxTxD, cached = self._loop(x_BxTxD, attention_mask, cache)
    else:
      x_BxTxD, cached = self._one_after_another(x_BxTxD, attention_mask, cache)
    hidden = nn.LayerNorm(epsilon=1e-5, dtype=jnp.dtype(config.dtype), name='ln_f')(x_BxTxD)
    logits = logits_of(hidden, OutputHead(wte.embedding)) if with_logits else None
    values = ValueHead(config, name='value_head')(hidden)
    if cache is not None:
      cache = cache.replace(keys=cached[0], values=cached[1], index=cache.index + tokens.shape[1])
    return GPT2Output(logits=logits, values=values, hidden=hidden, cache=cache)

  def _one_after_another(self, x_BxTxD, mask, cache):
    block = nn.remat(Block) if self.config.remat else Block
    layers = []
    for i in range(self.config.num_layers):
      cached = None if cache is None else (cache.keys[i], cache.values[i])
      index = None if cache is None else cache.index
      x_BxTxD, new = block(self.config, name=f'h_{i}')(x_BxTxD, mask, cached, index)
      layers.append(new)
    return x_BxTxD, None if cache is None else tuple(zip(*layers))

  def _loop(self, x_BxTxD, mask, cache):
    config = self.config
    params = self.variables['params']
    layers = stacked(config, params)['h']
    cached, index = (None, None) if cache is None else ((cache.keys, cache.values), cache.index)

    def block(params, x_BxTxD, cached, layer):
      return Block(config, parent=None).apply(
          {'params': sharding.gathered(params, partition)}, x_BxTxD, mask, cached, index, layer)

    return loop_over_blocks(block, layers, x_BxTxD, cached, config.num_layers, config.remat)


def _residual_init(config: GPT2Config):
  """Returns GPT-2's initializer of projections into the residual stream: normal, scale 0.02 / sqrt(2 L)."""
  return nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
