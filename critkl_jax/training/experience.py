"""Makes the experience of an iteration: rollout, rewards, reference pass, advantages and weights of the penalty.

The first argument of each function is the `Setup`, which is the same in every iteration.

Letters: B episodes, T response tokens, V vocabulary, D model width.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from critkl_jax import sharding
from critkl_jax.models.language_model import gathered, gathered_whole
from critkl_jax.records import Batch, Experience, Rollout, TrainState
from critkl_jax.rl.advantages import ADVANTAGES, whiten
from critkl_jax.rl.certainties import certainty, kl_weight, mean_distribution
from critkl_jax.rl.gates import kl_gate
from critkl_jax.rl.losses import weighted_penalty
from critkl_jax.sampling.generation import respond
from critkl_jax.sampling.scoring import value_at_end
from critkl_jax.training import slices
from critkl_jax.training.initial_state import Hyperparameters
from critkl_jax.training.setup import Setup, episodes_at_a_time, ref_head


def collect(setup: Setup, params: Any, key: chex.PRNGKey, temperature: chex.Numeric
            ) -> tuple[Any, Rollout, chex.Array]:
  """Draws problems, samples a response to each and rewards it.

  Args:
    setup: gives the task, the number of episodes and the number of episodes per problem.
    params: the policy's parameters.
    key: PRNG key, consumed.
    temperature: sampling temperature; may be traced.

  Returns:
    The problems, with a leading axis B, the `Rollout` of B episodes, and the task's rewards, float32 `[B]`.
  """
  task, config = setup.task, setup.config
  problem_key, sample_key = jax.random.split(key)
  problems = jax.vmap(task.sample)(jax.random.split(problem_key, config.episodes // config.episodes_per_problem))
  problems, rollout = answered(setup, params, problems, sample_key, temperature)
  return problems, rollout, sharding.episodes(jax.vmap(task.reward)(problems, rollout.actions, rollout.mask))


def answered(setup: Setup, params: Any, problems: Any, key: chex.PRNGKey, temperature: chex.Numeric
             ) -> tuple[Any, Rollout]:
  """Samples `episodes_per_problem` responses to each problem.

  Args:
    setup: gives the number of episodes.
    params: the policy's parameters.
    problems: with a leading axis of `episodes / episodes_per_problem`.
    key: PRNG key, consumed.
    temperature: sampling temperature; may be traced.

  Returns:
    The problem of each episode, with a leading axis B, and the `Rollout` of B episodes.
  """
  task, config = setup.task, setup.config
  problems = sharding.episodes(jax.tree.map(lambda x: jnp.repeat(x, config.episodes_per_problem, axis=0), problems))
  return problems, sharding.episodes(respond(
      setup.model, gathered_whole(setup.model, params), task, problems, key, method=config.rollout,
      window=config.window, temperature=temperature))


def reference_pass(setup: Setup, ref_params: Any, rollout: Rollout) -> chex.Array:
  """Computes the reference's predictions at each action of a rollout.

  It passes over at most a minibatch at a time, so that it needs no more memory than an update.

  Args:
    setup: gives the numbers of episodes and minibatches, and the lengths to which microbatches are cut.
    ref_params: the reference's parameters.
    rollout: B episodes of T tokens.

  Returns:
    The scorer's predictions: float32 logits `[B, T, V]`, before any temperature, or hidden states `[B, T, D]`.
  """
  params = gathered(setup.model, ref_params, setup.model.dtype)
  return slices.read(lambda part: setup.scorer.read(params, part)[0], rollout, setup.lengths,
                     episodes_at_a_time(setup, rollout))


def make_batch(setup: Setup, state: TrainState, rollout: Rollout, rewards: chex.Array, reference: chex.Array,
               hyperparameters: Hyperparameters) -> Batch:
  """Makes the loss's `Batch` from a rollout and its rewards.

  Args:
    setup: names the estimators.
    state: the state at the time of the rollout; used for a KL penalty in the reward and for bootstrapping.
    rollout: B episodes of T tokens.
    rewards: float32 `[B]` rewards of the task, given at the last token of each episode.
    reference: the predictions of `reference_pass`.
    hyperparameters: the numbers.

  Returns:
    A `Batch` `[B, T]`. Its returns are the sums of future rewards, unless the advantages are GAE's.
  """
  config, mask = setup.config, rollout.mask
  last = mask & (jnp.cumsum(mask[:, ::-1], 1)[:, ::-1] == 1)
  token_rewards = jnp.where(last, rewards[:, None], 0.0)
  if config.kl_placement == 'reward':
    token_rewards -= penalties(setup, state, rollout, reference, hyperparameters)
  final_values = last_values(setup, state.params, rollout) if config.bootstrap_truncated else None
  token_advantages, returns = ADVANTAGES[config.advantage](
      token_rewards, rollout.values, mask, group_size=config.group_size, discount=hyperparameters.discount,
      gae_lambda=hyperparameters.gae_lambda, final_values=final_values)
  if config.whiten_advantages:
    token_advantages = whiten(token_advantages, mask)
  return Batch(actions=rollout.actions, mask=mask, log_probs=rollout.log_probs, values=rollout.values,
               advantages=token_advantages, returns=returns)


def penalties(setup: Setup, state: TrainState, rollout: Rollout, reference: chex.Array,
              hyperparameters: Hyperparameters) -> chex.Array:
  """Returns each token's weighted KL penalty, coefficient included, float32 `[B, T]`; arguments as in `make_batch`."""
  numbers, scorer = hyperparameters.loss, setup.scorer
  params = gathered(setup.model, state.params, setup.model.dtype)
  record = scorer.statistics(scorer.read(params, rollout)[0], scorer.head(params), reference, ref_head(setup, state),
                             rollout.actions, rollout.mask, setup.config.loss, numbers)
  return jnp.where(rollout.mask, numbers.kl_coefficient * weighted_penalty(record, setup.config.loss)[0], 0.0)


def last_values(setup: Setup, params: Any, rollout: Rollout) -> chex.Array:
  """Computes the values `[B]` of the states in which episodes were cut; 0 for episodes that ended."""
  params = gathered(setup.model, params, setup.model.dtype)
  parts = sharding.episodes(slices.split(rollout, episodes_at_a_time(setup, rollout)), axis=1)
  values = jax.lax.map(lambda part: value_at_end(setup.model, params, part), parts).reshape(-1)
  return jnp.where(rollout.truncated, values, 0.0)


def gated(setup: Setup, state: TrainState, experience: Experience, key: chex.PRNGKey,
          hyperparameters: Hyperparameters) -> Experience:
  """Applies the config's gate: sets the penalty's weight to 0 at tokens where the gate is off.

  Args:
    setup: names the gate, the penalty and the certainty.
    state: has the reference.
    experience: B episodes of T tokens, with their critical tokens.
    key: PRNG key, consumed.
    hyperparameters: the numbers.
  """
  rollout, batch, numbers = experience.rollout, experience.batch, hyperparameters.loss
  reference, head = experience.reference, ref_head(setup, state)
  critical = jnp.zeros_like(rollout.mask) if batch.critical is None else batch.critical
  # The reference compared with itself gives the reference's entropy and certainty.
  record = setup.scorer.statistics(reference, head, reference, head, rollout.actions, rollout.mask, setup.config.loss,
                                   numbers)
  gate = kl_gate(setup.config.kl_gate, rollout.mask, certainty=record.certainty, entropy=record.entropy,
                 log_probs=rollout.log_probs, advantages=batch.advantages, critical=critical, key=key,
                 threshold=hyperparameters.gate_threshold, fraction=hyperparameters.gate_fraction)
  weight = gate * weighted_penalty(record, setup.config.loss)[1]
  return experience.replace(batch=batch.replace(weight=sharding.episodes(weight)))


def ensemble_weighted(setup: Setup, state: TrainState, experience: Experience, hyperparameters: Hyperparameters
                      ) -> Experience:
  """Weights the penalty by the certainty of the mean distribution of all references.

  Args:
    setup: names the certainty.
    state: has the further references.
    experience: B episodes of T tokens.
    hyperparameters: the numbers.

  Raises:
    ValueError: if the vocabulary is so large that hidden states are held instead of logits.
  """
  if not setup.scorer.holds_logits:
    raise ValueError(f'certainty_ensemble: needs the logits of whole episodes, which are not held at a vocabulary of '
                     f'{setup.model.vocab_size}.')
  numbers, batch = hyperparameters.loss, experience.batch
  logits = [experience.reference, *(reference_pass(setup, params, experience.rollout) for params in state.ensemble)]
  mean = mean_distribution(logits, numbers.certainty_temperature)
  weight = kl_weight(certainty(mean, setup.config.loss.certainty), numbers.certainty_exponent,
                     numbers.certainty_intercept)
  return experience.replace(batch=batch.replace(weight=sharding.episodes(jnp.where(batch.mask, weight, 0.0))))
