"""The start of fine-tuning: a config's numbers, keys and optimizer, and the state before the first iteration."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, as_language_model, map_params
from critkl_jax.records import TrainState
from critkl_jax.rl.losses import Coefficients
from critkl_jax.training.config import FinetuneConfig


@struct.dataclass
class Hyperparameters:
  """The numbers that a study varies, float32 `[]` each; they are traced, so that a new value needs no compilation.

  Attributes:
    learning_rate: learning rate of Adam.
    discount: gamma of GAE.
    gae_lambda: lambda of GAE.
    loss: the numbers of the loss.
    gate_threshold: certainty below which a gate switches the penalty off.
    gate_fraction: share of tokens that a gate selects.
  """

  learning_rate: chex.Numeric
  discount: chex.Numeric
  gae_lambda: chex.Numeric
  loss: Coefficients
  gate_threshold: chex.Numeric = 0.9
  gate_fraction: chex.Numeric = 0.2

  @classmethod
  def of(cls, config: FinetuneConfig) -> 'Hyperparameters':
    """Returns the numbers of a config as float32 arrays."""
    numbers = cls(learning_rate=config.learning_rate, discount=config.discount, gae_lambda=config.gae_lambda,
                  loss=Coefficients.of(config.loss), gate_threshold=config.gate_threshold,
                  gate_fraction=config.gate_fraction)
    return jax.tree.map(jnp.float32, numbers)


def finetuning_optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
  """Makes Adam for gradients that `clipped` has clipped; the learning rate is part of the optimizer's state."""

  def adam(learning_rate):
    return optax.chain(optax.identity(), optax.adam(learning_rate))  # clipping stood first when checkpoints were saved

  return optax.inject_hyperparams(adam)(learning_rate=config.learning_rate)


def clipped(grads: Any, norm: chex.Array, max_norm: float) -> Any:
  """Returns a gradient scaled down to a global norm of at most `max_norm`.

  `optax.clip_by_global_norm` divides each number, which compilers do once and keep; a product they repeat where it is
  needed, so that no clipped gradient is held beside the gradient.

  Args:
    grads: the gradient.
    norm: its global norm, `[]`.
    max_norm: the greatest norm.
  """
  factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
  return jax.tree.map(lambda x: x * factor, grads)


def init_finetuning(model: LanguageModel, config: FinetuneConfig, ref_params: Any, mesh: Mesh | None = None,
                    ensemble: Sequence[Any] = ()) -> TrainState:
  """Makes the state before the first iteration: the policy is a copy of the reference.

  If the reference lacks the config's critic, the critic is initialised from a key derived from the config's seed.

  Args:
    model: the policy's model, with the critic that the config asks for.
    config: the fine-tuning config.
    ref_params: parameters of the pre-trained model.
    mesh: the arrays are placed on it by `sharding.shardings`; None for the default device.
    ensemble: parameters of the config's further references.

  Returns:
    A `TrainState`; none of its arrays is shared with the arguments, so it may be donated. Its arrays are committed to
    their devices, like those that a train step returns, so that a loop over the step compiles once.

  Raises:
    ValueError: as `init_policy` and `check_ensemble`.
  """
  model = as_language_model(model)

  def init(key, ref_params, ensemble):
    params, opt_state = init_policy(model, config, ref_params, key)
    state = TrainState(params, opt_state, jnp.int32(0), params, with_critic(model, ensemble, params))
    return jax.tree.map(jnp.copy, state)

  (init_key, _), ensemble = finetuning_keys(config), check_ensemble(config, ensemble)
  if mesh is None:
    return sharding.bound(jax.jit(init)(init_key, ref_params, ensemble))
  init_key = sharding.replicate(init_key, mesh)
  ref_params, ensemble = sharding.place((ref_params, ensemble), mesh, model.partition)
  places = sharding.shardings(jax.eval_shape(init, init_key, ref_params, ensemble), mesh, model.partition)
  return jax.jit(init, out_shardings=places)(init_key, ref_params, ensemble)


def check_ensemble(config: FinetuneConfig, ensemble: Sequence[Any]) -> tuple[Any, ...]:
  """Checks the number of further references and returns their parameters as a tuple.

  Raises:
    ValueError: if the config names another number of references.
  """
  if len(ensemble) != len(config.ensemble_paths):
    raise ValueError(f'ensemble: expected parameters of {len(config.ensemble_paths)} references, got {len(ensemble)}.')
  return tuple(ensemble)


def with_critic(model: LanguageModel, ensemble: tuple[Any, ...], params: Any) -> tuple[Any, ...]:
  """Replaces the critic of each reference of the ensemble by the critic of `params`, so that one model runs them all.

  The references' own critics are never used.
  """
  return tuple(_merged(model, params, own) for own in ensemble)


def init_policy(model: LanguageModel, config: FinetuneConfig, ref_params: Any, key: chex.PRNGKey) -> tuple[Any, Any]:
  """Makes the policy's parameters and optimizer state before the first iteration.

  The critic is the reference's if it has the right shapes, else new. The key initialises a new critic; it is consumed.

  Raises:
    ValueError: if the reference lacks a parameter of the model, or has one of another shape.
  """
  fresh = model.init(key)
  old, new = ({path: x.shape for path, x in _by_path(tree).items()} for tree in (ref_params, fresh))
  own = {path for path in new if model.is_critic(path)}
  kept = own == {path for path in old if model.is_critic(path)} and all(old[path] == new[path] for path in own)
  for path in old.keys() | new.keys():
    if old.get(path) != new.get(path) and not model.is_critic(path):
      raise ValueError(f'ref_params: {"/".join(path)} has shape {old.get(path, "none")}, expected '
                       f'{new.get(path, "none")}; the reference is of another model.')
  params = _merged(model, ref_params if kept else fresh, ref_params, fresh)
  return params, finetuning_optimizer(config).init(params)


def _merged(model, critic, rest, structure=None):
  """Merges the critic of `critic` with all other parameters of `rest`, in the structure of `structure` or `critic`."""
  critic_params, rest_params = _by_path(critic), _by_path(rest)
  return map_params(lambda path, _: (critic_params if model.is_critic(path) else rest_params)[path],
                    critic if structure is None else structure)


def _by_path(params):
  found: dict[tuple[str, ...], Any] = {}
  map_params(lambda path, x: found.update({path: x}), params)
  return found


def finetuning_keys(config: FinetuneConfig) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Derives the key of the initial critic and the key of the run from the seed."""
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  return init_key, run_key
