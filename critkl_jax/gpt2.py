"""GPT-2 with a value head, as a Linen module: one function from tokens to logits and values.

Radford et al. (2019), "Language models are unsupervised multitask learners": learned positions, pre-layer-norm,
tanh-GELU, tied embedding; parameters carry the names of the released model. Letters in names of arrays:
B episodes, T new tokens, S cached and new tokens, D width, H heads, K width of a head, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax import sharding
from critkl_jax.attention import attend, causal_attention, check_implementation
from critkl_jax.config import GPT2Config


@struct.dataclass
class KVCache:
  """Keys and values of the tokens seen so far.

  Attributes:
    keys: L arrays `[B, H, K, S]`; axes stand as a decoding step multiplies them, so that nothing is transposed. Where
      the blocks are a loop, one array `[B, L, H, K, S]`.
    values: L arrays `[B, H, S, K]`, or one `[B, L, H, S, K]`.
    mask: bool `[B, S]` true at slots that hold a real token; what stands at the index and beyond does not count.
    index: int32 first free slot, `[]` of all episodes or `[B]` of each.
  """

  keys: tuple[chex.Array, ...] | chex.Array
  values: tuple[chex.Array, ...] | chex.Array
  mask: chex.Array
  index: chex.Array


@struct.dataclass
class GPT2Output:
  """What the model says after each token.

  Attributes:
    logits: float32 `[B, T, V]` of the next token.
    values: float32 `[B, T]` value estimates.
    hidden: `[B, T, D]` final hidden states, after the last layer norm, in the activations' type.
    cache: the cache with the new tokens in it, or None if none was given.
  """

  logits: chex.Array
  values: chex.Array
  hidden: chex.Array
  cache: KVCache | None


def init_params(model: 'GPT2', key: chex.PRNGKey) -> chex.ArrayTree:
  """Returns fresh parameters, a nested dict of float32 arrays; the key is consumed."""
  return model.init(key, jnp.zeros((1, 1), jnp.int32))['params']


def reference_config(policy: GPT2Config, reference: GPT2Config) -> GPT2Config:
  """Returns the config with which a reference is read beside a policy: its own sizes and critic, the policy's numerics.

  Training reads both with one network (`FinetuneConfig.model_of`); whatever compares a policy with a reference has to,
  or rounding would pass for a divergence.

  Args:
    policy: the policy's.
    reference: the reference's.
  """
  numerics = {name: getattr(policy, name) for name in ('dtype', 'attention', 'remat', 'scan_layers')}
  return dataclasses.replace(reference, **numerics)


def forward_flops(config: GPT2Config, lengths: Sequence[int]) -> float:
  """Returns the FLOP that logits of texts of these lengths need: matrix products, and attention to the keys up to each
  query; nothing for padding, masked scores, softmax or norms."""
  dense = 12 * config.num_layers * config.width**2 + config.width * config.vocab_size
  total, squares = float(sum(lengths)), float(sum(float(n) * (n + 1) for n in lengths))
  return 2 * dense * total + 2 * squares * config.width * config.num_layers


def init_cache(config: GPT2Config, batch_size: int, length: int, in_step: bool = True) -> KVCache:
  """Returns an empty cache of `length` slots (S) for `batch_size` (B) episodes, in step or each at its own pace."""
  shape = (batch_size, config.num_heads, length, config.width // config.num_heads)
  if config.scan_layers:
    values = jnp.zeros((batch_size, config.num_layers, *shape[1:]), config.dtype)
    keys, values = (sharding.constrain(x, 'data', None, 'model') for x in (jnp.swapaxes(values, 3, 4), values))
  else:
    layers = [jnp.zeros(shape, config.dtype)] * config.num_layers
    values = tuple(sharding.constrain(x, 'data', 'model') for x in layers)
    keys = tuple(sharding.constrain(jnp.swapaxes(x, 2, 3), 'data', 'model') for x in layers)
  index = jnp.zeros(() if in_step else batch_size, jnp.int32)
  return KVCache(keys=keys, values=values, mask=jnp.zeros((batch_size, length), bool), index=index)


def gathered_whole(model: 'GPT2', params: Any) -> Any:
  """Returns parameters as a loop around the model takes them: whole over `data`, in the type of the products, and put
  together as `stacked` does."""
  return sharding.gathered(stacked(model.config, params), model.config.dtype)


def gathered(model: 'GPT2', params: Any, dtype: str = 'float32') -> Any:
  """Returns parameters as one pass over texts takes them: `sharding.gathered`, but for those of blocks that are a loop,
  which gathers them one after another."""
  return sharding.gathered(params, dtype, blocks=not model.config.scan_layers)


def stacked(config: GPT2Config, params: Any) -> Any:
  """Returns parameters in which those of all blocks stand together under `h`, with a leading axis L, if the blocks are
  a loop. The model takes both forms; in a loop around it, this one is not made again in every round."""
  if not config.scan_layers or 'h' in params:
    return params
  rest = {name: x for name, x in params.items() if not name.startswith('h_')}
  return rest | {'h': jax.tree.map(lambda *x: jnp.stack(x), *(params[f'h_{i}'] for i in range(config.num_layers)))}


class HeadProjection(nn.Module):
  """Queries, keys and values `[B, T, H, K]` of hidden states `[B, T, D]`; the parameters are those of a dense layer
  `[D, 3 D]`, taken apart by heads before the product, so that devices can share it."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD):
    config = self.config
    kernel = self.param('kernel', nn.initializers.normal(0.02), (config.width, 3 * config.width), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (3 * config.width,), jnp.float32)
    x_BxTxD, kernel, bias = nn.dtypes.promote_dtype(x_BxTxD, kernel, bias, dtype=jnp.dtype(config.dtype))
    heads = (3, config.num_heads, config.width // config.num_heads)
    kernel_Dx3xHxK = sharding.constrain(kernel.reshape(config.width, *heads), None, None, 'model')
    out_BxTx3xHxK = jnp.einsum('btd,dchk->btchk', x_BxTxD, kernel_Dx3xHxK) + bias.reshape(1, 1, *heads)
    return tuple(sharding.constrain(out_BxTx3xHxK[:, :, i], 'data', None, 'model') for i in range(3))


class Attention(nn.Module):
  """Causal self-attention over the cached and the new tokens; the mask is that of `_place`. `cached` are keys and
  values of this layer, or those of all layers and `layer` the number of this one."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD, mask, cached, index, layer=None):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = HeadProjection(config, name='c_attn')(x_BxTxD)
    if cached is not None:
      cached = (_write(cached[0], jnp.transpose(k_BxTxHxK, (0, 2, 3, 1)), index, axis=-1, layer=layer),
                _write(cached[1], jnp.swapaxes(v_BxTxHxK, 1, 2), index, axis=-2, layer=layer))
      own = cached if layer is None else [jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False) for x in cached]
      out_BxTxHxK = jnp.swapaxes(attend(jnp.swapaxes(q_BxTxHxK, 1, 2), *own, mask), 1, 2)
    elif config.attention == 'auto':
      out_BxTxHxK = causal_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, mask)
    else:
      itself = jnp.eye(mask.shape[1], dtype=bool)  # at padding, so that no row is empty
      sees = mask[:, None, None] | itself[None, None]
      check_implementation(config.attention)
      out_BxTxHxK = jax.nn.dot_product_attention(
          q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, mask=sees, is_causal=True, implementation=config.attention)
    projection = nn.Dense(config.width, dtype=dtype, kernel_init=_residual_init(config), name='c_proj')
    return sharding.episodes(projection(out_BxTxHxK.reshape(x_BxTxD.shape))), cached


class MLP(nn.Module):
  """The feed-forward part of a block."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD):
    dtype = jnp.dtype(self.config.dtype)
    x = nn.Dense(4 * self.config.width, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name='c_fc')(x_BxTxD)
    x = nn.gelu(sharding.constrain(x, 'data', None, 'model'), approximate=True)
    projection = nn.Dense(self.config.width, dtype=dtype, kernel_init=_residual_init(self.config), name='c_proj')
    return sharding.episodes(projection(x))


class Block(nn.Module):
  """A transformer block, layer norms first."""

  config: GPT2Config

  @nn.compact
  def __call__(self, x_BxTxD, mask, cached, index, layer=None):
    norm = {'epsilon': 1e-5, 'dtype': jnp.dtype(self.config.dtype)}
    attended, cached = Attention(self.config, name='attn')(
        nn.LayerNorm(**norm, name='ln_1')(x_BxTxD), mask, cached, index, layer)
    x_BxTxD = x_BxTxD + attended
    return x_BxTxD + MLP(self.config, name='mlp')(nn.LayerNorm(**norm, name='ln_2')(x_BxTxD)), cached


class ValueHead(nn.Module):
  """A scalar for each hidden state."""

  config: GPT2Config

  @nn.compact
  def __call__(self, h_BxTxD):
    x = h_BxTxD.astype(jnp.float32)
    if self.config.value_head_detached:
      x = jax.lax.stop_gradient(x)
    if self.config.value_head == 'mlp':
      for i in range(2):
        x = nn.relu(nn.Dense(128, name=f'c_fc_{i}')(x))
    return nn.Dense(1, kernel_init=nn.initializers.zeros, name='c_proj')(x)[..., 0]


class GPT2(nn.Module):
  """GPT-2: `model.apply({'params': params}, tokens, ...) -> GPT2Output`.

  Attributes:
    config: sizes and numerics.
  """

  config: GPT2Config

  @nn.compact
  def __call__(self, tokens: chex.Array, mask: chex.Array | None = None, cache: KVCache | None = None,
               position_offset: chex.Array | int = 0) -> GPT2Output:
    """Runs the model over new tokens, after those of the cache if one is given.

    The position of a token is the number of real tokens before it in its episode plus the offset, so padding on the
    left changes nothing; positions past the context are taken for its last one. What shapes do not show is the caller's
    care: offsets that keep positions inside the context, and no more tokens than the cache has free slots.

    Args:
      tokens: int32 `[B, T]`, 0..V-1; with any other one that is no padding, what is said of its episode is NaN.
      mask: bool `[B, T]` false at padding; all true if None.
      cache: keys and values of earlier tokens; the new ones are written at its index.
      position_offset: int32 `[]` or `[B]` added to the positions.

    Returns:
      `GPT2Output`, its logits at `[b, t]` those of the token that follows `tokens[b, t]`.

    Raises:
      ValueError: if T exceeds the context.
    """
    config = self.config
    if tokens.shape[1] > config.context_length:
      raise ValueError(f'tokens: {tokens.shape[1]} positions do not fit into a context of {config.context_length}.')
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    tokens = _known_or_padding(jnp.asarray(tokens, jnp.int32), mask, config.vocab_size)
    attention_mask, positions, cache = _place(mask, cache)
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
    embedding_VxD = wte.embedding.astype(config.dtype)
    logits = jnp.einsum('btd,vd->btv', hidden, embedding_VxD, preferred_element_type=jnp.float32)
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

    def block(carry, inputs):
      x_BxTxD, cached = carry
      params, layer = inputs
      return Block(config, parent=None).apply(
          {'params': sharding.gathered_block(params)}, x_BxTxD, mask, cached, index, layer), None

    block = jax.checkpoint(block, prevent_cse=False) if config.remat else block
    return jax.lax.scan(block, (x_BxTxD, cached), (layers, jnp.arange(config.num_layers, dtype=jnp.int32)))[0]


def _known_or_padding(tokens, mask, vocab_size):
  """Returns ids whose embedding is NaN where a token that is no padding is not in the vocabulary, and never elsewhere:
  padding would reach all others as 0 times NaN, and a negative id is counted from the end of an array."""
  return jnp.where(mask, jnp.where(tokens < 0, vocab_size, tokens), jnp.clip(tokens, 0, vocab_size - 1))


def _place(mask, cache):
  """Returns the attention mask, `[B, T]` of keys or over a cache `[B, 1, T, S]`, the positions `[B, T]` and the cache
  with its mask updated."""
  if cache is None:
    return mask, jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0), None
  start, slots = jnp.reshape(cache.index, (-1, 1)), jnp.arange(cache.mask.shape[1], dtype=jnp.int32)[None]
  before = jnp.sum(cache.mask & (slots < start), axis=1, keepdims=True, dtype=jnp.int32)
  all_mask = _write(cache.mask, mask, cache.index, axis=-1)
  query = (start + jnp.arange(mask.shape[1], dtype=jnp.int32)[None])[:, :, None]
  visible = (slots[None] <= query) & all_mask[:, None, :]
  positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
  return visible[:, None], positions, cache.replace(mask=all_mask)


def _write(old, new, index, axis, layer=None):
  """Writes new slots into old ones from `index` on, `[]` for all episodes or `[B]`; in place where XLA may.

  `axis` is that of the slots, counted from the end; `layer` a place along the second axis, if the old ones have layers
  there.
  """
  new = new if layer is None else new[:, None]

  def write(old, new, index):
    start = [jnp.int32(0)] * old.ndim
    start[axis] = index
    if layer is not None:
      start[-4] = jnp.asarray(layer, jnp.int32)
    return jax.lax.dynamic_update_slice(old, new, start)

  return write(old, new, index) if index.ndim == 0 else jax.vmap(write)(old, new, index)


def _residual_init(config: GPT2Config):
  """Initialises projections into the residual stream at 0.02 / sqrt(2 L), as GPT-2 does."""
  return nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
