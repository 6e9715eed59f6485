"""Where fine-tuning starts: numbers, keys and optimizer of a config, and the state before the first iteration."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.config import FinetuneConfig
from critkl_jax.gpt2 import GPT2, init_params
from critkl_jax.losses import Coefficients
from critkl_jax.records import TrainState


@struct.dataclass
class Hyperparameters:
  """The numbers that a study varies, float32 `[]` each; traced, so that a change of one compiles nothing anew.

  Attributes:
    learning_rate: of Adam.
    discount: gamma of GAE.
    gae_lambda: lambda of GAE.
    loss: the numbers of the loss.
  """

  learning_rate: chex.Numeric
  discount: chex.Numeric
  gae_lambda: chex.Numeric
  loss: Coefficients

  @classmethod
  def of(cls, config: FinetuneConfig) -> 'Hyperparameters':
    """Returns the numbers of a config as float32 arrays."""
    numbers = cls(learning_rate=config.learning_rate, discount=config.discount, gae_lambda=config.gae_lambda,
                  loss=Coefficients.of(config.loss))
    return jax.tree.map(jnp.float32, numbers)


def make_optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
  """Returns Adam behind a clip of the global norm, its learning rate a part of the state."""

  def adam(learning_rate):
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate))

  return optax.inject_hyperparams(adam)(learning_rate=config.learning_rate)


def init_finetuning(model: GPT2, config: FinetuneConfig, ref_params: Any, mesh: Mesh | None = None,
                    ensemble: Sequence[Any] = ()) -> TrainState:
  """Returns the state before the first iteration: the policy is a copy of the reference.

  A value head of another kind than the reference's starts anew, from a key that is a function of the config's seed.

  Args:
    model: the policy network, with the value head that the config asks for.
    config: the fine-tuning config.
    ref_params: parameters of the pre-trained model.
    mesh: where the arrays lie, as `sharding.shardings` says; on the default device if None.
    ensemble: parameters of the config's further references.

  Returns:
    A `TrainState`; none of its arrays is shared with the arguments, so it may be donated. Its arrays are bound to their
    devices, as those that a train step returns are: a loop over the step compiles once.
  """

  def init(key, ref_params, ensemble):
    params, opt_state = init_policy(model, config, ref_params, key)
    state = TrainState(params, opt_state, jnp.int32(0), params, with_value_head(ensemble, params))
    return jax.tree.map(jnp.copy, state)

  (init_key, _), ensemble = finetuning_keys(config), check_ensemble(config, ensemble)
  if mesh is None:
    return sharding.bound(jax.jit(init)(init_key, ref_params, ensemble))
  init_key, (ref_params, ensemble) = sharding.replicate(init_key, mesh), sharding.place((ref_params, ensemble), mesh)
  places = sharding.shardings(jax.eval_shape(init, init_key, ref_params, ensemble), mesh)
  return jax.jit(init, out_shardings=places)(init_key, ref_params, ensemble)


def check_ensemble(config: FinetuneConfig, ensemble: Sequence[Any]) -> tuple[Any, ...]:
  """Returns the parameters of a config's further references as a tuple.

  Raises:
    ValueError: if they are not as many as the config names.
  """
  if len(ensemble) != len(config.ensemble_paths):
    raise ValueError(f'ensemble: expected parameters of {len(config.ensemble_paths)} references, got {len(ensemble)}.')
  return tuple(ensemble)


def with_value_head(ensemble: tuple[Any, ...], params: Any) -> tuple[Any, ...]:
  """Returns parameters of references with the value head of others, so that the same network takes them: their own are
  not asked for."""
  return tuple({**own, 'value_head': params['value_head']} for own in ensemble)


def init_policy(model: GPT2, config: FinetuneConfig, ref_params: Any, key: chex.PRNGKey) -> tuple[Any, Any]:
  """Returns the policy's parameters and its optimizer's state before the first iteration; the key, of the value head if
  it starts anew, is consumed."""
  fresh = init_params(model, key)
  params = {**ref_params, 'value_head': _matching(ref_params.get('value_head'), fresh['value_head'])}
  chex.assert_trees_all_equal_shapes(params, fresh)
  return params, make_optimizer(config).init(params)


def finetuning_keys(config: FinetuneConfig) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Returns the key of the initial critic and the key of the run, both functions of the seed."""
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  return init_key, run_key


def _matching(old, fresh):
  """Returns the old value head if its arrays have the fresh one's names and shapes, else the fresh one."""
  if old is None or jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, fresh):
    return fresh
  return old
