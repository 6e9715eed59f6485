"""One iteration of fine-tuning as one program: rollout, reward, reference pass, advantages, updates.

Each part is a function of its own, so that it can be timed and replaced: `experience.py` and `updates.py`.

Letters: B episodes, T response tokens.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.records import Experience, Rollout, TrainState
from critkl_jax.tasks.task import Task, critical_tokens, right_solutions, successes
from critkl_jax.training import finite
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.experience import collect, ensemble_weighted, gated, make_batch, reference_pass
from critkl_jax.training.initial_state import Hyperparameters
from critkl_jax.training.setup import Setup
from critkl_jax.training.updates import update


def make_train_step(model: LanguageModel, task: Task, config: FinetuneConfig, mesh: Mesh | None = None,
                    probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> Callable:
  """Makes the step of fine-tuning, `(state, key, hyperparameters) -> (state, metrics)`, jitted with state donated.

  Under `vmap` the step advances several members at once; with axes `TrainState(..., ref_params=None)` they share one
  reference.

  Args:
    model: the model of policy and reference, a `LanguageModel` or a module that `as_language_model` converts.
    task: gives problems and rewards.
    config: gives structure and estimators; numbers come from the third argument of the step.
    mesh: the devices over which episodes and model are sharded, for a state of `init_finetuning` on the same mesh, and
      key and hyperparameters replicated on it; None for one device.
    probe: params -> further metrics, float32 `[]` each, of the policy that sampled the rollout.

  Returns:
    The step. Its key is the run's key: iteration i = `state.step` uses `fold_in(key, i)`. Its metrics are float32 `[]`:

    - means over the updates: the metrics of `ppo_loss`, and `grad_norm`;
    - means over critical tokens: `kl_critical` and `weight_critical`, NaN if the rollout has none, missing if the task
      does not mark them; they replace `critical`, `kl_at_critical` and `weight_at_critical`;
    - of the rollout: `reward`, the mean of the task's rewards; `accuracy`, the share of rewards that reach the task's
      `success`; `response_length`, tokens per episode; `num_tokens`, tokens sampled; and `rollout_metrics`;
    - of updates skipped because they were not finite: `skipped_updates`, their number, and `not_finite`, the number of
      the first term that was not finite, 0 if all were (`finite.term_of` names it);
    - the metrics of `probe`.

  Raises:
    ValueError: if the vocabularies of model and task differ, or the config's gate needs critical tokens that the task
      does not mark; when the step is traced, also as `ensemble_weighted`.
  """
  if task.host is not None:
    raise ValueError('task: draws its problems and rewards on the host; train it with make_host_step.')
  setup = Setup.of(model, task, config)

  def step(state: TrainState, key: chex.PRNGKey, hyperparameters: Hyperparameters):
    rollout_key, _ = jax.random.split(jax.random.fold_in(key, state.step))
    problems, rollout, rewards = collect(setup, state.params, rollout_key, hyperparameters.loss.temperature)
    return learn(setup, mesh, state, key, hyperparameters, problems, rollout, rewards, probe)

  return jax.jit(sharding.on_mesh(mesh, step), donate_argnums=0)


def learn(setup: Setup, mesh: Mesh | None, state: TrainState, key: chex.PRNGKey, hyperparameters: Hyperparameters,
          problems: Any, rollout: Rollout, rewards: chex.Array,
          probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> tuple[TrainState, dict[str, chex.Array]]:
  """Makes the updates of an iteration from its rollout and rewards; returns the new state and the metrics.

  Args:
    setup: the static part of the iteration.
    mesh: the devices of the state; None for one.
    state: the state that sampled the rollout.
    key: the run's key.
    hyperparameters: the numbers.
    problems: the problems, with a leading axis B.
    rollout: B episodes of T tokens.
    rewards: float32 `[B]`.
    probe: as in `make_train_step`.
  """
  task, config = setup.task, setup.config
  step_key = jax.random.fold_in(key, state.step)
  _, shuffle_key = jax.random.split(step_key)
  reference = reference_pass(setup, state.ref_params, rollout)
  batch = make_batch(setup, state, rollout, rewards, reference, hyperparameters)
  batch = batch.replace(critical=critical_tokens(task, problems, rollout))
  experience = Experience(rollout, reference, batch)
  if config.certainty_ensemble:
    experience = ensemble_weighted(setup, state, experience, hyperparameters)
  if config.kl_gate != 'none':
    gate_key = jax.random.fold_in(step_key, 2)  # 0 and 1 may give the two keys of the split
    experience = gated(setup, state, experience, gate_key, hyperparameters)
  probed = probe(state.params) if probe else {}
  state, metrics = update(setup, state, experience, shuffle_key, hyperparameters)
  metrics['not_finite'] = finite.blamed('rewards', rewards, metrics['not_finite'])
  metrics |= rollout_metrics(task, problems, rollout, experience.batch.critical) | probed
  num_tokens = jnp.sum(rollout.mask, dtype=jnp.float32)
  if mesh is not None:
    state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh, setup.model.partition))
  return state, metrics | {
      'accuracy': jnp.mean(successes(task, rewards)), 'reward': jnp.mean(rewards),
      'response_length': num_tokens / config.episodes, 'num_tokens': num_tokens}


def rollout_metrics(task: Task, problems: Any, rollout: Rollout, critical: chex.Array | None) -> dict[str, chex.Array]:
  """Computes the metrics of a rollout's critical tokens, lengths and form, float32 `[]` each.

  Args:
    task: may have right solutions and judge form.
    problems: the problems of the episodes, with a leading axis B.
    rollout: B episodes of T tokens.
    critical: bool `[B, T]` mask from `critical_tokens`; None if not known.

  Returns:
    `truncated`, the share of episodes that were cut before they ended; `max_response_length`, tokens in the longest
    episode; if critical tokens are known, `critical_right`, the share of critical tokens that are right, NaN if there
    are none; and, if the task judges form, `format_errors`, the share of responses that are not well formed.
  """
  metrics = {'truncated': jnp.mean(rollout.truncated.astype(jnp.float32)),
             'max_response_length': jnp.max(jnp.sum(rollout.mask, 1)).astype(jnp.float32)}
  if critical is not None:
    right = jnp.sum(critical & (rollout.actions == right_solutions(task, problems).tokens), dtype=jnp.float32)
    metrics['critical_right'] = finite.ratio(right, jnp.sum(critical, dtype=jnp.float32))
  if task.well_formed is not None:
    formed = jax.vmap(task.well_formed)(problems, rollout.actions, rollout.mask)
    metrics['format_errors'] = jnp.mean(1.0 - formed.astype(jnp.float32))
  return metrics
