"""Two language models that are no GPT-2 and not written in Linen, as a user would bring them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from critkl_jax.models.language_model import LanguageModel, ModelOutput, OutputHead


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
  vocab_size: int = 6
  context_length: int = 16
  width: int = 16


@struct.dataclass
class States:
  """The state after each token `[B, 1 + S, D]`, the first one before all tokens; and how many there are."""

  states: jax.Array
  index: jax.Array


def init_states(width, batch_size, length, in_step=True):
  return States(jnp.zeros((batch_size, 1 + length, width)), jnp.zeros(() if in_step else batch_size, jnp.int32))


def rewind(cache, num_tokens):
  return cache.replace(index=cache.index - num_tokens)


def grow(cache, length):
  return cache.replace(states=jnp.pad(cache.states, ((0, 0), (0, 1 + length - cache.states.shape[1]), (0, 0))))


def run(cell, inputs, mask, cache):
  """Runs a cell (state, input) -> state over inputs `[B, T, D]`; padding leaves the state as it is."""
  batch_size, length, _ = inputs.shape
  start = jnp.zeros((batch_size, 1)) if cache is None else None
  index = None if cache is None else jnp.broadcast_to(cache.index, (batch_size,))
  state = start * jnp.zeros((1, inputs.shape[2])) if cache is None else cache.states[jnp.arange(batch_size), index]

  def step(state, token):
    x, real = token
    state = jnp.where(real[:, None], cell(state, x), state)
    return state, state

  _, states = jax.lax.scan(step, state, (jnp.swapaxes(inputs, 0, 1), mask.T))
  hidden = jnp.swapaxes(states, 0, 1)
  if cache is None:
    return hidden, None
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  return hidden, cache.replace(states=jax.vmap(write)(cache.states, hidden, index + 1), index=cache.index + length)


def plain_model(config=RecurrentConfig()):
  """An Elman network of plain functions: no position embedding, a bias in the output layer, a critic of its own."""

  def init(key):
    keys, width = jax.random.split(key, 4), config.width
    return {'embed': jax.random.normal(keys[0], (config.vocab_size, width)),
            'recurrent': 0.3 * jax.random.normal(keys[1], (width, width)),
            'output': [0.5 * jax.random.normal(keys[2], (config.vocab_size, width)),
                       0.5 * jax.random.normal(keys[3], (config.vocab_size,))],
            'critic': jnp.zeros(width)}

  def apply(params, tokens, mask=None, cache=None, position_offset=0):
    del position_offset
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden, cache = run(lambda state, x: jnp.tanh(x + state @ params['recurrent']), params['embed'][tokens], mask,
                        cache)
    return ModelOutput(hidden, jax.lax.stop_gradient(hidden) @ params['critic'], cache)

  return LanguageModel(
      config=config, name='elman', init=init, apply=apply, output_head=lambda params: OutputHead(*params['output']),
      init_cache=functools.partial(init_states, config.width), rewind=rewind, grow=grow,
      is_critic=lambda path: path[-1] == 'critic',
      partition=lambda path, shape: (None, 'model') if path[-1] == 'recurrent' else (None,) * len(shape))


class Recurrent(nnx.Module):
  """The same kind of network in NNX, without a critic."""

  def __init__(self, config, rngs):
    self.embed = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
    self.cell = nnx.SimpleCell(config.width, config.width, rngs=rngs)
    self.output = nnx.Linear(config.width, config.vocab_size, rngs=rngs)

  def __call__(self, tokens, mask, cache):
    return run(lambda state, x: self.cell(state, x)[0], self.embed(tokens), mask, cache)


def nnx_model(config=RecurrentConfig()):
  """An NNX module, split and merged."""
  graph, _ = nnx.split(Recurrent(config, nnx.Rngs(0)))

  def init(key):
    return nnx.to_pure_dict(nnx.split(Recurrent(config, nnx.Rngs(params=key)), nnx.Param)[1])

  def apply(params, tokens, mask=None, cache=None, position_offset=0):
    del position_offset
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden, cache = nnx.merge(graph, params)(tokens, mask, cache)
    return ModelOutput(hidden, jnp.zeros(tokens.shape), cache)

  def output_head(params):
    return OutputHead(params['output']['kernel'].T, params['output']['bias'])

  return LanguageModel(config=config, name='nnx_recurrent', init=init, apply=apply, output_head=output_head,
                       init_cache=functools.partial(init_states, config.width), rewind=rewind, grow=grow)
