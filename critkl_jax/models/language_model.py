"""The record of a language model: pure functions of a parameter tree.

Training, sampling, checkpoints and analysis use a model only through this record. `gpt2.gpt2` makes the record of
GPT-2. For a model of your own, fill in the fields with plain functions, or with functions of an NNX module after
`nnx.split`.

Letters: B episodes, T tokens, V vocabulary, D model width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from critkl_jax import sharding


@struct.dataclass
class ModelOutput:
  """Outputs of a model at each token.

  Attributes:
    hidden: `[B, T, D]` last hidden states, in the dtype of the activations.
    values: float32 `[B, T]` value estimates; zeros for a model without a critic.
    cache: the cache with the new tokens in it, or None if none was given.
  """

  hidden: chex.Array
  values: chex.Array
  cache: Any = None


@struct.dataclass
class OutputHead:
  """The output layer: `logits = hidden @ embedding.T + bias`, with an optional soft cap.

  Attributes:
    embedding: `[V, D]` output embedding.
    bias: `[V]`, or None.
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None: no cap.
  """

  embedding: chex.Array
  bias: chex.Array | None = None
  soft_cap: float | None = struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A language model with a critic, as pure functions of its parameters.

  Paths of parameters are tuples of names, such as `('h_0', 'mlp', 'c_fc', 'kernel')`; paths in an optimizer state
  have a prefix.

  Attributes:
    config: a frozen dataclass with `vocab_size` (V), `context_length` and, unless it is float32, `dtype`, the dtype of
      the activations. Checkpoints save it as JSON.
    init: key -> params, a PyTree of float32 arrays; the key is consumed.
    apply: (params, tokens int32 `[B, T]`, mask bool `[B, T]` = None, cache = None, position_offset = 0) ->
      `ModelOutput`. The mask is false at padding; all true if None. Padding on the left must not change results. New
      tokens follow the tokens of the cache. The offset, `[]` or `[B]`, is added to positions; pre-training sets it.
    output_head: params -> `OutputHead`, the same for every token.
    init_cache: (B, length, in_step) -> a cache with room for `length` tokens of each episode: a PyTree of arrays
      `[B, ...]`, or `[]` for a number that all episodes share. `in_step` is true if all episodes always have the same
      number of tokens in the cache. None for a model that cannot sample.
    rewind: (cache, n int32 `[B]`) -> the cache without the last n tokens of each episode.
    grow: (cache, length) -> the cache with room for `length` tokens, no fewer than before.
    name: names the architecture in checkpoints.
    partition: (path, shape) -> for each axis of a parameter, `model` if a pass spreads it over the mesh axis `model`,
      `whole` if it is never spread, None if it may be spread over devices at rest.
    is_critic: path -> whether only the critic uses a parameter. Fine-tuning initializes these parameters if the
      reference lacks them.
    is_matrix: path -> whether a parameter is a matrix of the hidden layers: weight decay and Muon apply to these, and
      devices exchange them in the dtype of the activations.
    gathers_itself: path -> whether `apply` itself gathers a parameter over `data`, layer by layer.
    layer_of: path -> (position, name) of a parameter's layer or part of a layer; reports sort layers by position.
    prepare: params -> params, called once before a loop of `apply` calls.
    forward_flops: lengths of texts -> FLOP of a forward pass, output layer included; None if not known.
  """

  config: Any
  init: Callable[[chex.PRNGKey], Any]
  apply: Callable[..., ModelOutput]
  output_head: Callable[[Any], OutputHead]
  init_cache: Callable[[int, int, bool], Any] | None = None
  rewind: Callable[[Any, chex.Array], Any] | None = None
  grow: Callable[[Any, int], Any] | None = None
  name: str = 'custom'
  partition: sharding.Partition = sharding.unpartitioned
  is_critic: Callable[[tuple[str, ...]], bool] = lambda path: False
  is_matrix: Callable[[tuple[str, ...]], bool] = lambda path: False
  gathers_itself: Callable[[tuple[str, ...]], bool] = lambda path: False
  layer_of: Callable[[tuple[str, ...]], tuple[int, str]] = lambda path: (0, path[0])
  prepare: Callable[[Any], Any] = lambda params: params
  forward_flops: Callable[[Sequence[int]], float] | None = None

  @property
  def vocab_size(self) -> int:
    """V, the number of token ids."""
    return self.config.vocab_size

  @property
  def context_length(self) -> int:
    """The number of positions."""
    return self.config.context_length

  @property
  def dtype(self) -> str:
    """Dtype of the activations."""
    return getattr(self.config, 'dtype', 'float32')


def as_language_model(model: Any) -> LanguageModel:
  """Converts a module with a method `language_model`, such as `GPT2`, to its record; returns a record unchanged.

  Raises:
    TypeError: if the argument is neither.
  """
  if isinstance(model, LanguageModel):
    return model
  if not hasattr(model, 'language_model'):
    raise TypeError(f'model: expected a LanguageModel, such as gpt2(config) makes, got {type(model).__name__}.')
  return model.language_model()


def logits_of(hidden: chex.Array, head: OutputHead) -> chex.Array:
  """Computes logits float32 `[..., V]` from hidden states `[..., D]`, multiplied in the dtype of `hidden`."""
  logits = jnp.einsum('...d,vd->...v', hidden, head.embedding.astype(hidden.dtype),
                      preferred_element_type=jnp.float32)
  if head.bias is not None:
    logits = logits + jnp.expand_dims(head.bias.astype(jnp.float32), range(logits.ndim - 1))
  return logits if head.soft_cap is None else head.soft_cap * jnp.tanh(logits / head.soft_cap)


def gathered(model: LanguageModel, params: Any, dtype: str = 'float32') -> Any:
  """Gathers parameters over `data` for one pass over texts; they stay spread over `model`.

  Parameters that the model gathers itself are left as they are.

  Args:
    model: the model.
    params: its parameters, spread as in `sharding.shardings`.
    dtype: dtype in which matrices are transferred. Keep float32 for parameters that are differentiated: the sum of
      their gradients over devices would be rounded.
  """
  return sharding.gathered(params, model.partition, dtype, model.is_matrix, model.gathers_itself)


def gathered_whole(model: LanguageModel, params: Any) -> Any:
  """Prepares all parameters for a loop of passes and gathers them over `data`, matrices in the activations' dtype."""
  return sharding.gathered(model.prepare(params), model.partition, model.dtype, model.is_matrix)


def map_params(fn: Callable[[tuple[str, ...], chex.Array], Any], params: Any) -> Any:
  """Maps `fn(path, x)` over the parameters x, keeping the structure of the tree."""
  return jax.tree_util.tree_map_with_path(lambda path, x: fn(sharding.path_names(path), x), params)
