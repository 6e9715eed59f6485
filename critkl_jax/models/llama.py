"""The decoder of the Llama family with a value head: Llama, Mistral, Qwen2 and Qwen3 are settings of one module.

Touvron et al., arXiv 2307.09288: RMSNorm, rotary positions, SwiGLU, grouped queries. Qwen2 has biases on queries, keys
and values (arXiv 2407.10671), Qwen3 norms of queries and keys instead (arXiv 2505.09388), Mistral a sliding window
(arXiv 2310.06825).

Letters: B episodes, T new tokens, S slots of the cache, D model width, H query heads, K key heads, E width of a head,
F width of the feed-forward network, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.config import at_least, between, convert_fields, one_of, positive
from critkl_jax.models import kv_cache
from critkl_jax.models.attention import attend, causal_attention, check_implementation
from critkl_jax.models.blocks import known_or_padding, loop_over_blocks, stack_blocks
from critkl_jax.models.language_model import LanguageModel, ModelOutput, OutputHead
from critkl_jax.models.rotary import SCALINGS, inverse_frequencies, rotate
from critkl_jax.models.value_head import ValueHead

MOST_POSITIONS, MOST_LAYERS = 2**24, 10_000
# Last names of a parameter's path -> the axis of the parameter that a pass spreads over `model`.
_MODEL_AXIS = {('q_proj', 'kernel'): 1, ('k_proj', 'kernel'): 1, ('v_proj', 'kernel'): 1, ('q_proj', 'bias'): 0,
               ('k_proj', 'bias'): 0, ('v_proj', 'bias'): 0, ('o_proj', 'kernel'): 0, ('gate_proj', 'kernel'): 1,
               ('up_proj', 'kernel'): 1, ('down_proj', 'kernel'): 0}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and numerics of the model.

  Attributes:
    vocab_size: V, the number of token ids.
    context_length: The number of positions.
    num_layers: L, the number of blocks.
    num_heads: H, the number of query heads.
    num_kv_heads: K, the number of key and value heads, a divisor of `num_heads`; 0 for as many.
    width: D, the width of the residual stream.
    head_width: E, the width of a head, even; 0 for `width / num_heads`.
    hidden_width: F, the width of the feed-forward network; 0 for 8/3 of the width, rounded up to a multiple of 8.
    norm_epsilon: Added to the mean square in every RMSNorm.
    rope_base: The base theta of the rotary positions.
    rope_scaling: Scaling of the rotary positions: `none`, `linear` or `llama3`.
    rope_factor: By which a scaling lengthens the context.
    rope_low_frequency_factor: Of `llama3`.
    rope_high_frequency_factor: Of `llama3`.
    rope_original_length: Of `llama3`: the context before it was lengthened.
    qkv_bias: Whether queries, keys and values have biases (Qwen2).
    qk_norm: Whether queries and keys have an RMSNorm in each head (Qwen3).
    tied_embedding: Whether the output layer is the token embedding.
    window: The number of tokens, its own included, that a token sees; 0 for all.
    value_head: The critic: `linear`, or `mlp` with two hidden layers of 128.
    value_head_detached: Whether the gradient of the critic stops before the trunk.
    dtype: Type of activations, `float32` or `bfloat16`; parameters, logits and values are always float32.
    attention: Implementation of attention over whole texts: `auto`, `xla` or `cudnn`, as in `GPT2Config`.
    remat: Whether the backward pass recomputes the blocks, to save memory.
    scan_layers: Whether `lax.scan` runs the blocks, for deep models.
  """

  vocab_size: int = 41
  context_length: int = 768
  num_layers: int = 4
  num_heads: int = 2
  num_kv_heads: int = 0
  width: int = 128
  head_width: int = 0
  hidden_width: int = 0
  norm_epsilon: float = 1e-6
  rope_base: float = 10_000.0
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_low_frequency_factor: float = 1.0
  rope_high_frequency_factor: float = 4.0
  rope_original_length: int = 8192
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_embedding: bool = True
  window: int = 0
  value_head: str = 'linear'
  value_head_detached: bool = True
  dtype: str = 'float32'
  attention: str = 'auto'
  remat: bool = False
  scan_layers: bool = False

  def __post_init__(self):
    convert_fields(self)
    at_least(self, 1, 'vocab_size', 'num_heads', 'width', 'rope_original_length')
    at_least(self, 0, 'num_kv_heads', 'head_width', 'hidden_width', 'window')
    between(self, 1, MOST_POSITIONS, 'context_length')
    between(self, 1, MOST_LAYERS, 'num_layers')
    positive(self, 'norm_epsilon', 'rope_base', 'rope_factor', 'rope_low_frequency_factor')
    one_of(self, 'rope_scaling', *SCALINGS)
    one_of(self, 'value_head', 'linear', 'mlp')
    one_of(self, 'dtype', 'float32', 'bfloat16')
    one_of(self, 'attention', 'auto', 'xla', 'cudnn')
    if self.num_heads % self.kv_heads:
      raise ValueError(f'num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}.')
    if not self.head_width and self.width % self.num_heads:
      raise ValueError(f'num_heads: expected a divisor of width={self.width}, or a head_width, got {self.num_heads}.')
    if self.each_width % 2:
      name = 'head_width' if self.head_width else 'num_heads'
      raise ValueError(f'{name}: rotary positions need heads of even width, got {self.each_width}.')
    if not self.rope_high_frequency_factor > self.rope_low_frequency_factor:
      raise ValueError(f'rope_high_frequency_factor: expected more than rope_low_frequency_factor='
                       f'{self.rope_low_frequency_factor}, got {self.rope_high_frequency_factor}.')
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise ValueError(f"attention: 'cudnn' needs dtype='bfloat16', got {self.dtype!r}.")

  @property
  def kv_heads(self) -> int:
    """K, the number of key and value heads."""
    return self.num_kv_heads or self.num_heads

  @property
  def each_width(self) -> int:
    """E, the width of a head."""
    return self.head_width or self.width // self.num_heads

  @property
  def mlp_width(self) -> int:
    """F, the width of the feed-forward network."""
    return self.hidden_width or -(-8 * self.width // 24) * 8


# Published sizes, by name: config.json of Qwen/Qwen3-0.6B and of meta-llama/Meta-Llama-3-8B.
SIZES = {
    'qwen3_0_6b': LlamaConfig(
        vocab_size=151936, context_length=40960, num_layers=28, num_heads=16, num_kv_heads=8, width=1024,
        head_width=128, hidden_width=3072, rope_base=1e6, qk_norm=True),
    'llama3_8b': LlamaConfig(
        vocab_size=128256, context_length=8192, num_layers=32, num_heads=32, num_kv_heads=8, width=4096,
        hidden_width=14336, norm_epsilon=1e-5, rope_base=500_000.0, tied_embedding=False),
}


@functools.cache
def llama(config: LlamaConfig = LlamaConfig()) -> LanguageModel:
  """Makes a decoder of the Llama family as a `LanguageModel`; equal configs return the same record."""
  module = Llama(config)

  def init(key):
    return module.init(key, jnp.zeros((1, 1), jnp.int32))['params']

  def apply(params, tokens, mask=None, cache=None, position_offset=0):
    return module.apply({'params': params}, tokens, mask, cache, position_offset)

  def init_cache(batch_size, length, in_step=True):
    return kv_cache.empty_cache(batch_size, length, config.num_layers, config.kv_heads, config.each_width, config.dtype,
                                in_step, config.scan_layers)

  def output_head(params):
    return OutputHead(params['embed_tokens' if config.tied_embedding else 'lm_head']['embedding'])

  return LanguageModel(
      config=config, name='llama', init=init, apply=apply, init_cache=init_cache, rewind=kv_cache.rewind,
      grow=kv_cache.grow, output_head=output_head, partition=partition, is_critic=lambda path: 'value_head' in path,
      is_matrix=lambda path: _in_block(path) and path[-1] == 'kernel',
      gathers_itself=_in_block if config.scan_layers else lambda path: False, layer_of=_layer_of,
      prepare=functools.partial(stacked, config), forward_flops=functools.partial(forward_flops, config))


def forward_flops(config: LlamaConfig, lengths: Sequence[int]) -> float:
  """Counts the FLOP of a forward pass over texts of these lengths, logits included.

  Counts matrix products and causal attention over the whole text; not padding, masked scores, softmax or norms.
  """
  heads, keys = config.num_heads * config.each_width, config.kv_heads * config.each_width
  block = config.width * (2 * heads + 2 * keys + 3 * config.mlp_width)
  dense = config.num_layers * block + config.width * config.vocab_size
  total, squares = float(sum(lengths)), float(sum(float(n) * (n + 1) for n in lengths))
  return 2 * dense * total + 2 * squares * heads * config.num_layers


def partition(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Looks up the axis of a parameter that a pass spreads over `model`, by the end of its path: Llama's `Partition`.

  All other axes are None. The axis of layers (`scan_layers`) is `whole`: it is never spread.
  """
  layers = ('whole',) if path[:1] == ('layers',) else ()
  at = _MODEL_AXIS.get(path[-2:])
  return layers + tuple('model' if axis == at else None for axis in range(len(shape) - len(layers)))


def _layer_of(path):
  """Returns position and name of a parameter's layer; within a block the name includes its part."""
  if path[0].startswith('layers_'):
    return 1 + int(path[0][len('layers_'):]), '/'.join(path[:2])
  return {'embed_tokens': 0}.get(path[0], 1 + MOST_LAYERS), path[0]


def _in_block(path):
  """Returns whether a parameter belongs to a block: `layers_0`, ..., or `layers` with a leading axis of layers."""
  return ''.join(path[:1]).startswith('layers')


def stacked(config: LlamaConfig, params):
  """Stacks the parameters of all blocks under `layers`, with a leading axis L, if `scan_layers` is set."""
  return stack_blocks(params, 'layers', config.num_layers) if config.scan_layers else params


class RMSNorm(nn.Module):
  """Divides by the root of the mean square over the last axis, in float32, and scales."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.config.norm_epsilon)
    return jnp.expand_dims(scale, range(x.ndim - 1)).astype(x.dtype) * normed.astype(x.dtype)


class HeadProjection(nn.Module):
  """Projects hidden states `[B, T, D]` to heads `[B, T, num_heads, E]`; heads are spread over `model` if it divides
  their number, else every device computes all of them."""

  config: LlamaConfig
  num_heads: int

  @nn.compact
  def __call__(self, x_BxTxD):
    config, size = self.config, self.num_heads * self.config.each_width
    kernel = self.param('kernel', nn.initializers.normal(0.02), (config.width, size), jnp.float32)
    kernel = sharding.constrain(kernel.astype(config.dtype).reshape(config.width, self.num_heads, -1), None, 'model')
    out = jnp.einsum('btd,dhe->bthe', x_BxTxD, kernel)
    if config.qkv_bias:
      bias = self.param('bias', nn.initializers.zeros, (size,), jnp.float32).astype(config.dtype)
      out = out + bias.reshape(1, 1, self.num_heads, -1)
    return sharding.constrain(out, 'data', None, 'model')


class Attention(nn.Module):
  """Causal self-attention with grouped queries over cached and new tokens, with the mask from `kv_cache.place`.

  `cached` holds the keys and values of this layer, or of all layers if `layer`, this layer's number, is given.
  """

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BxTxD, mask, positions, cached, index, layer=None):
    config = self.config
    q_BxTxHxE = HeadProjection(config, config.num_heads, name='q_proj')(x_BxTxD)
    k_BxTxKxE, v_BxTxKxE = (HeadProjection(config, config.kv_heads, name=name)(x_BxTxD)
                            for name in ('k_proj', 'v_proj'))
    if config.qk_norm:
      q_BxTxHxE, k_BxTxKxE = RMSNorm(config, name='q_norm')(q_BxTxHxE), RMSNorm(config, name='k_norm')(k_BxTxKxE)
    frequencies = inverse_frequencies(
        config.each_width, config.rope_base, config.rope_scaling, config.rope_factor, config.rope_low_frequency_factor,
        config.rope_high_frequency_factor, config.rope_original_length)
    q_BxTxHxE, k_BxTxKxE = (rotate(x, positions, frequencies) for x in (q_BxTxHxE, k_BxTxKxE))
    if cached is not None:
      cached = (kv_cache.write(cached[0], jnp.transpose(k_BxTxKxE, (0, 2, 3, 1)), index, axis=-1, layer=layer),
                kv_cache.write(cached[1], jnp.swapaxes(v_BxTxKxE, 1, 2), index, axis=-2, layer=layer))
      own = cached if layer is None else [jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False) for x in cached]
      out_BxTxHxE = jnp.swapaxes(attend(jnp.swapaxes(q_BxTxHxE, 1, 2), *own, mask), 1, 2)
    elif config.attention == 'auto':
      out_BxTxHxE = causal_attention(q_BxTxHxE, k_BxTxKxE, v_BxTxKxE, mask, config.window)
    else:
      itself = jnp.eye(mask.shape[1], dtype=bool)  # padding sees itself, so that every query sees a key
      sees = mask[:, None, None] | itself[None, None]
      check_implementation(config.attention)
      out_BxTxHxE = jax.nn.dot_product_attention(
          q_BxTxHxE, k_BxTxKxE, v_BxTxKxE, mask=sees, is_causal=True, implementation=config.attention,
          local_window_size=(config.window - 1, 0) if config.window else None)
    out = out_BxTxHxE.reshape(*x_BxTxD.shape[:2], -1)
    return sharding.episodes(_dense(config, config.width, 'o_proj')(out)), cached


class MLP(nn.Module):
  """The feed-forward network of a block: SwiGLU."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BxTxD):
    gate, up = (sharding.constrain(_dense(self.config, self.config.mlp_width, name)(x_BxTxD), 'data', None, 'model')
                for name in ('gate_proj', 'up_proj'))
    return sharding.episodes(_dense(self.config, self.config.width, 'down_proj')(nn.silu(gate) * up))


class Block(nn.Module):
  """A pre-norm transformer block."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x_BxTxD, mask, positions, cached, index, layer=None):
    attended, cached = Attention(self.config, name='self_attn')(
        RMSNorm(self.config, name='input_layernorm')(x_BxTxD), mask, positions, cached, index, layer)
    x_BxTxD = x_BxTxD + attended
    normed = RMSNorm(self.config, name='post_attention_layernorm')(x_BxTxD)
    return x_BxTxD + MLP(self.config, name='mlp')(normed), cached


class Llama(nn.Module):
  """A decoder of the Llama family: `model.apply({'params': params}, tokens, ...) -> ModelOutput`.

  Attributes:
    config: sizes and numerics.
  """

  config: LlamaConfig

  @nn.nowrap
  def language_model(self) -> LanguageModel:
    """Returns the model as the record that training and sampling use."""
    return llama(self.config)

  @nn.compact
  def __call__(self, tokens, mask=None, cache=None, position_offset=0) -> ModelOutput:
    """Runs the model over new tokens, which follow the tokens of the cache if there is one.

    Args:
      tokens: int32 `[B, T]`, 0..V-1; an unmasked id outside the vocabulary gives NaN at its token and all later ones
        of the episode.
      mask: bool `[B, T]` false at padding; all true if None.
      cache: keys and values of earlier tokens; the new ones are written at its index.
      position_offset: int32 `[]` or `[B]` added to the positions, which count real tokens.

    Returns:
      `ModelOutput`, whose hidden states at `[b, t]` predict the token after `tokens[b, t]`.

    Raises:
      ValueError: if T exceeds the context, or the config's attention cannot run on this machine's devices.
    """
    config = self.config
    if tokens.shape[1] > config.context_length:
      raise ValueError(f'tokens: {tokens.shape[1]} positions do not fit into a context of {config.context_length}.')
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    tokens = known_or_padding(jnp.asarray(tokens, jnp.int32), mask, config.vocab_size)
    attention_mask, positions, cache = kv_cache.place(mask, cache, config.window)
    positions = positions + jnp.reshape(jnp.asarray(position_offset, jnp.int32), (-1, 1))

    embed = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02), name='embed_tokens')
    x_BxTxD = sharding.episodes(embed(tokens).astype(config.dtype))
    if not config.tied_embedding:  # read by `output_head`
      _Table(config, name='lm_head')()
    if config.scan_layers and not self.is_initializing():
      x_BxTxD, cached = self._loop(x_BxTxD, attention_mask, positions, cache)
    else:
      x_BxTxD, cached = self._one_after_another(x_BxTxD, attention_mask, positions, cache)
    hidden = RMSNorm(config, name='norm')(x_BxTxD)
    values = ValueHead(config, name='value_head')(hidden)
    if cache is not None:
      cache = cache.replace(keys=cached[0], values=cached[1], index=cache.index + tokens.shape[1])
    return ModelOutput(hidden=hidden, values=values, cache=cache)

  def _one_after_another(self, x_BxTxD, mask, positions, cache):
    block = nn.remat(Block) if self.config.remat else Block
    layers = []
    for i in range(self.config.num_layers):
      cached = None if cache is None else (cache.keys[i], cache.values[i])
      index = None if cache is None else cache.index
      x_BxTxD, new = block(self.config, name=f'layers_{i}')(x_BxTxD, mask, positions, cached, index)
      layers.append(new)
    return x_BxTxD, None if cache is None else tuple(zip(*layers))

  def _loop(self, x_BxTxD, mask, positions, cache):
    config = self.config
    layers = stacked(config, self.variables['params'])['layers']
    cached, index = (None, None) if cache is None else ((cache.keys, cache.values), cache.index)

    def block(params, x_BxTxD, cached, layer):
      return Block(config, parent=None).apply(
          {'params': sharding.gathered(params, partition)}, x_BxTxD, mask, positions, cached, index, layer)

    return loop_over_blocks(block, layers, x_BxTxD, cached, config.num_layers, config.remat)


class _Table(nn.Module):
  """The output embedding `[V, D]` of a model whose output layer is not its token embedding."""

  config: LlamaConfig

  @nn.compact
  def __call__(self):
    return self.param('embedding', nn.initializers.normal(0.02), (self.config.vocab_size, self.config.width),
                      jnp.float32)


def _dense(config, size, name):
  return nn.Dense(size, use_bias=False, dtype=jnp.dtype(config.dtype), kernel_init=nn.initializers.normal(0.02),
                  name=name)
