"""The updates of an iteration: minibatches, microbatches, gradient, optimizer."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from critkl_jax import sharding
from critkl_jax.models.language_model import gathered, map_params
from critkl_jax.records import Experience, TrainState
from critkl_jax.rl.advantages import WITH_CRITIC
from critkl_jax.rl.aggregation import episode_terms
from critkl_jax.training import finite, slices
from critkl_jax.training.initial_state import Hyperparameters, clipped, finetuning_optimizer
from critkl_jax.training.setup import Setup, ref_head


def update(setup: Setup, state: TrainState, experience: Experience, key: chex.PRNGKey,
           hyperparameters: Hyperparameters) -> tuple[TrainState, dict[str, chex.Array]]:
  """Makes `epochs` x `minibatches` updates; each epoch shuffles the episodes anew.

  Args:
    setup: gives model, structure and estimators.
    state: the state at the time of the rollout.
    experience: B episodes of T tokens.
    key: PRNG key, consumed.
    hyperparameters: the numbers.

  Returns:
    The state after the iteration, and metrics, float32 `[]` each: means over the updates of the loss's metrics and of
    `grad_norm`; `kl_critical` and `weight_critical`, means over critical tokens, if the batch has critical tokens; and
    the metrics of `finite.counted`. An update that is not finite is skipped.
  """
  model, config = setup.model, setup.config
  optimizer, numbers = finetuning_optimizer(config), hyperparameters.loss
  warming_up = state.step < config.critic_warmup
  if config.advantage not in WITH_CRITIC:  # the critic's gradient would only use up the clipped norm
    numbers = numbers.replace(value_coefficient=0.0)
  if config.kl_placement == 'reward':  # the penalty is in the advantages
    numbers = numbers.replace(kl_coefficient=0.0)

  def move(norm, before, grads):
    params, opt_state = before
    updates, opt_state = optimizer.update(clipped(grads, norm, config.max_grad_norm), opt_state, params)
    return sharding.at_rest((optax.apply_updates(params, updates), opt_state), model.partition)

  def one_update(carry, indices):
    params, _ = carry
    minibatch = sharding.episodes(jax.tree.map(lambda x: x[indices], experience))
    grads, metrics = _mean_gradient(setup, _loss_fn(setup, state, numbers), params, minibatch)
    grads = map_params(lambda path, x: x if model.is_critic(path) else jnp.where(warming_up, 0.0, x), grads)
    norm = optax.tree.norm(grads)
    carry, number = finite.guarded(
        carry, functools.partial(move, norm), _terms(minibatch, learning_rate) | metrics, grads)
    return carry, (metrics | {'grad_norm': norm}, number)

  shuffles = jax.vmap(lambda k: jax.random.permutation(k, config.episodes))(jax.random.split(key, config.epochs))
  indices = shuffles.reshape(config.epochs * config.minibatches, -1)
  learning_rate = jnp.float32(hyperparameters.learning_rate)
  opt_state = state.opt_state._replace(hyperparams=state.opt_state.hyperparams | {'learning_rate': learning_rate})
  (params, opt_state), (metrics, not_finite) = finite.scan(one_update, (state.params, opt_state), indices)
  metrics = jax.tree.map(jnp.mean, metrics) | finite.counted(not_finite)
  if experience.batch.critical is not None:
    share = metrics.pop('critical')
    metrics |= {f'{name}_critical': finite.ratio(metrics.pop(f'{name}_at_critical'), share)
                for name in ('kl', 'weight')}
  return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _terms(experience, learning_rate):
  """Collects the terms of an update that are known before its loss, 0 at masked tokens."""
  batch, reference = experience.batch, experience.reference
  terms = {name: getattr(batch, name) for name in ('log_probs', 'values', 'advantages', 'returns')}
  terms['penalty_weight'] = batch.weight
  terms = {name: jnp.where(batch.mask, x, 0.0) for name, x in terms.items() if x is not None}
  reference = jnp.where(batch.mask[..., None], reference, jnp.zeros((), reference.dtype))
  return terms | {'reference': reference, 'learning_rate': learning_rate}


def _loss_fn(setup, state, numbers) -> Callable:
  """Makes `(params, experience) -> (loss, metrics)`, means over tokens or episodes as the config says."""
  scorer = setup.scorer
  config = setup.config.loss
  if config.aggregation == 'fixed_length':  # microbatches are cut to other lengths
    length = config.aggregation_length or setup.task.response_length
    config = dataclasses.replace(config, aggregation_length=length)

  def loss_fn(params, experience):
    params = gathered(setup.model, params)
    predictions, values = scorer.read(params, experience.rollout)
    return scorer.loss(predictions, scorer.head(params), values, experience.reference, ref_head(setup, state),
                       experience.batch, config, numbers)

  return loss_fn


def _mean_gradient(setup, loss_fn, params, experience):
  """Computes gradient and metrics of a loss that is a mean over a minibatch, in microbatches."""
  rollout = experience.rollout
  num_episodes, num_tokens = rollout.mask.shape

  def of_slice(part):
    def at(length):
      cut = Experience(slices.cut(part.rollout, length),
                       *jax.tree.map(lambda x: x[:, :length], (part.reference, part.batch)))
      grads, metrics = jax.grad(loss_fn, has_aux=True)(params, cut)
      return sharding.at_rest(grads, setup.model.partition), metrics

    return slices.at_length(at, (*setup.lengths, num_tokens), part.rollout.mask)

  size = slices.pick_size(num_episodes, rollout.prompt.shape[1] + num_tokens)
  if size < num_episodes:
    order = slices.by_length(rollout.mask)
    experience = jax.tree.map(lambda x: x[order], experience)
  counts = episode_terms(experience.rollout.mask, setup.config.loss.aggregation)
  return slices.weighted_mean(of_slice, experience, counts, size)
