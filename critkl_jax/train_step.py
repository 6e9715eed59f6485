"""One iteration of fine-tuning as one program: rollout, reward, reference pass, advantages, updates.

The parts are functions of their own, so that they can be timed and replaced one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from critkl_jax import advantages, finite, sharding, slices
from critkl_jax.confidence import certainty, kl_weight, mean_distribution
from critkl_jax.config import FinetuneConfig
from critkl_jax.critical_tokens import on_path
from critkl_jax.gates import kl_gate
from critkl_jax.gpt2 import GPT2, gathered, gathered_whole
from critkl_jax.initial_state import Hyperparameters, make_optimizer
from critkl_jax.losses import linear_ppo_loss, op_options, ppo_loss, weighted_penalty
from critkl_jax.ops.weighted_kl import linear_weighted_kl, pick_implementation, weighted_kl
from critkl_jax.records import Batch, Rollout, Solution, TrainState
from critkl_jax.rollout import respond, score, score_hidden, value_at_end
from critkl_jax.tasks.task import Task


def make_train_step(model: GPT2, task: Task, config: FinetuneConfig, mesh: Mesh | None = None,
                    probe: Callable[[Any], dict[str, chex.Array]] | None = None) -> Callable:
  """Makes one iteration of fine-tuning: `(state, key, hyperparameters) -> (state, metrics)`, jitted, the state donated.

  Under `vmap` it advances several members at once; with `TrainState(..., ref_params=None)` as their axes they share one
  reference.

  Args:
    model: the policy network.
    task: problems and reward.
    config: structure and estimators; its numbers are taken from the third argument of the step.
    mesh: the devices over which episodes and model are spread, for a state of `init_finetuning` on the same mesh, and
      key and hyperparameters replicated on it; None for one device.
    probe: params -> further metrics, float32 `[]` each, of the policy as it was when the rollout was sampled.

  Returns:
    The step. Its key is the run's: iteration i uses `fold_in(key, i)`, i being `state.step`. Its metrics are float32
    `[]`: those of `ppo_loss` and `grad_norm` as means over the updates, and of the rollout `accuracy`, the mean of what
    the task rewards, `response_length`, tokens in an episode, `num_tokens`, tokens sampled, and those of
    `rollout_metrics`. `kl_critical` and `weight_critical` are means over critical tokens, NaN where there were none.
    An update with anything in it that is not finite is not made: `skipped_updates` counts them, `not_finite` is the
    number of the first term that was not, 0 if all were (`finite.term_of` names it).
  """

  lengths = shorter_lengths(task)

  def step(state: TrainState, key: chex.PRNGKey, hyperparameters: Hyperparameters):
    step_key = jax.random.fold_in(key, state.step)
    rollout_key, shuffle_key = jax.random.split(step_key)
    problems, rollout, rewards = collect(
        model, task, config, state.params, rollout_key, hyperparameters.loss.temperature)
    ref_output = reference_pass(model, config, state.ref_params, rollout, lengths)
    batch = make_batch(model, config, state, rollout, rewards, ref_output, hyperparameters)
    solutions = jax.vmap(task.solution)(problems)
    batch = batch.replace(critical=on_path(task, problems, rollout) & solutions.critical)
    if config.certainty_ensemble:
      batch = ensemble_weighted(model, config, state, rollout, ref_output, batch, hyperparameters, lengths)
    if config.loss.kl_gate != 'none':
      gate_key = jax.random.fold_in(step_key, 2)  # 0 and 1 may be the two of the split
      batch = gated(model, config, state, rollout, ref_output, batch, gate_key, hyperparameters)
    probed = probe(state.params) if probe else {}
    state, metrics = update(model, config, state, rollout, ref_output, batch, shuffle_key, hyperparameters, lengths)
    metrics['not_finite'] = finite.blamed('rewards', rewards, metrics['not_finite'])
    metrics |= rollout_metrics(task, rollout, solutions, batch.critical) | probed
    num_tokens = jnp.sum(rollout.mask, dtype=jnp.float32)
    if mesh is not None:
      state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh))
    return state, metrics | {
        'accuracy': jnp.mean(rewards), 'response_length': num_tokens / config.episodes,
        'num_tokens': num_tokens}

  return jax.jit(sharding.on_mesh(mesh, step), donate_argnums=0)


def collect(model: GPT2, task: Task, config: FinetuneConfig, params: Any, key: chex.PRNGKey,
            temperature: chex.Numeric) -> tuple[Any, Rollout, chex.Array]:
  """Draws problems, samples a response to each and rewards it.

  Args:
    model: the policy network.
    task: problems and reward.
    config: number of episodes, and how many of them share a problem.
    params: the policy's parameters.
    key: PRNG key, consumed.
    temperature: of the samples; may be traced.

  Returns:
    The problems, with a leading axis B, the `Rollout` of B episodes, and the task's rewards, float32 `[B]`.
  """
  problem_key, sample_key = jax.random.split(key)
  problems = jax.vmap(task.sample)(jax.random.split(problem_key, config.episodes // config.episodes_per_problem))
  problems = sharding.episodes(jax.tree.map(lambda x: jnp.repeat(x, config.episodes_per_problem, axis=0), problems))
  rollout = sharding.episodes(respond(
      model, gathered_whole(model, params), task, problems, sample_key, method=config.rollout,
      window=config.window, temperature=temperature))
  return problems, rollout, sharding.episodes(jax.vmap(task.reward)(problems, rollout.actions, rollout.mask))


def shorter_lengths(task: Task) -> tuple[int, ...]:
  """Returns the lengths below the limit at which passes over a rollout are compiled too: that of right responses."""
  return (task.solution_length,) if 0 < task.solution_length < task.response_length else ()


def holds_logits(model: GPT2) -> bool:
  """Returns whether the vocabulary is so small that logits of whole episodes are held; else hidden states are."""
  return pick_implementation(model.config.vocab_size, from_logits=False) == 'fused'


def reference_pass(model: GPT2, config: FinetuneConfig, ref_params: Any, rollout: Rollout,
                   lengths: Sequence[int] = ()) -> chex.Array:
  """Returns what the reference says at each action, at most a minibatch at a time, so that no pass needs more memory
  than an update.

  Args:
    model: the network.
    config: number of episodes and minibatches.
    ref_params: the reference's parameters.
    rollout: B episodes of T tokens.
    lengths: lengths below T, in rising order, at which episodes that fit are read.

  Returns:
    float32 logits `[B, T, V]`, before any temperature, where `holds_logits`; hidden states `[B, T, D]` else.
  """
  read = score if holds_logits(model) else score_hidden
  size = slices.pick_size(config.episodes // config.minibatches, rollout.prompt.shape[1] + rollout.actions.shape[1])
  ref_params = gathered(model, ref_params, model.config.dtype)
  return slices.read(lambda part: read(model, ref_params, part)[0], rollout, lengths, size)


def make_batch(model: GPT2, config: FinetuneConfig, state: TrainState, rollout: Rollout, rewards: chex.Array,
               ref_output: chex.Array, hyperparameters: Hyperparameters) -> Batch:
  """Turns a rollout and its rewards into what the loss needs.

  Args:
    model: the policy network; used only for a KL penalty in the reward, which needs its distributions.
    config: names of the estimators.
    state: the state at the time of the rollout.
    rollout: B episodes of T tokens.
    rewards: float32 `[B]` of the task, 1 for a right response and 0 for a wrong one, which gets the config's
      `wrong_reward`; given at the last token of each episode.
    ref_output: of `reference_pass`.
    hyperparameters: the numbers.

  Returns:
    A `Batch` `[B, T]`. Unless the advantages are GAE's, the returns are the sums of the rewards to come.
  """
  mask = rollout.mask
  rewards = rewards + config.wrong_reward * (1.0 - rewards)
  last = mask & (jnp.cumsum(mask[:, ::-1], 1)[:, ::-1] == 1)
  token_rewards = jnp.where(last, rewards[:, None], 0.0)
  if config.loss.kl_placement == 'reward':
    numbers = hyperparameters.loss
    params = gathered(model, state.params, model.config.dtype)
    if holds_logits(model):
      record = weighted_kl(score(model, params, rollout)[0], ref_output, rollout.actions, mask=mask,
                           **op_options(config.loss, numbers))
    else:
      hidden, embedding, _ = score_hidden(model, params, rollout)
      record = sharding.own_tokens(
          lambda own, shared: linear_weighted_kl(own[0], shared[0], own[1], shared[1], own[2], mask=own[3],
                                                 **op_options(config.loss, shared[2])),
          (hidden, ref_output, rollout.actions, mask), (embedding, _ref_embedding(state, embedding), numbers))
    token_rewards -= jnp.where(mask, numbers.kl_coefficient * weighted_penalty(record, config.loss)[0], 0.0)
  if config.advantage == 'gae':
    final_values = last_values(model, config, state.params, rollout) if config.bootstrap_truncated else None
    token_advantages, returns = advantages.gae(
        token_rewards, rollout.values, mask, hyperparameters.discount, hyperparameters.gae_lambda, final_values)
    if config.whiten_advantages:
      token_advantages = advantages.whiten(token_advantages, mask)
  else:
    estimate = {'group_relative': advantages.group_relative, 'leave_one_out': advantages.leave_one_out}
    episode = estimate[config.advantage](jnp.sum(token_rewards, -1), config.group_size)
    token_advantages = jnp.where(mask, episode[:, None], 0.0)
    returns = jnp.where(mask, jnp.cumsum(token_rewards[:, ::-1], -1)[:, ::-1], 0.0)
  return Batch(actions=rollout.actions, mask=mask, log_probs=rollout.log_probs, values=rollout.values,
               advantages=token_advantages, returns=returns)


def last_values(model: GPT2, config: FinetuneConfig, params: Any, rollout: Rollout) -> chex.Array:
  """Returns the values `[B]` of the states in which episodes were cut, 0 for those that ended; arguments as
  `reference_pass`."""
  params = gathered(model, params, model.config.dtype)
  size = slices.pick_size(config.episodes // config.minibatches, rollout.prompt.shape[1] + rollout.actions.shape[1])
  parts = sharding.episodes(slices.split(rollout, size), axis=1)
  values = jax.lax.map(lambda part: value_at_end(model, params, part), parts).reshape(-1)
  return jnp.where(rollout.truncated, values, 0.0)


def gated(model: GPT2, config: FinetuneConfig, state: TrainState, rollout: Rollout, ref_output: chex.Array,
          batch: Batch, key: chex.PRNGKey, hyperparameters: Hyperparameters) -> Batch:
  """Returns the batch with the gate that the config names.

  Args:
    model: the network.
    config: names the gate and the certainty.
    state: its reference's embedding is taken where hidden states are held.
    rollout: B episodes of T tokens.
    ref_output: of `reference_pass`.
    batch: `[B, T]`, with its critical tokens.
    key: PRNG key, consumed.
    hyperparameters: the numbers.
  """
  numbers = hyperparameters.loss
  if holds_logits(model):  # the reference against itself: its own entropy and certainty
    record = weighted_kl(ref_output, ref_output, rollout.actions, mask=rollout.mask, **op_options(config.loss, numbers))
  else:
    record = sharding.own_tokens(
        lambda own, shared: linear_weighted_kl(own[0], shared[0], own[0], shared[0], own[1], mask=own[2],
                                               **op_options(config.loss, shared[1])),
        (ref_output, rollout.actions, rollout.mask), (_ref_embedding(state, ref_output), numbers))
  gate = kl_gate(config.loss.kl_gate, rollout.mask, certainty=record.certainty, entropy=record.entropy,
                 log_probs=rollout.log_probs, advantages=batch.advantages, critical=batch.critical, key=key,
                 threshold=numbers.gate_threshold, fraction=numbers.gate_fraction)
  return batch.replace(gate=sharding.episodes(gate))


def ensemble_weighted(model: GPT2, config: FinetuneConfig, state: TrainState, rollout: Rollout, ref_output: chex.Array,
                      batch: Batch, hyperparameters: Hyperparameters, lengths: Sequence[int] = ()) -> Batch:
  """Returns the batch with the weights of the penalty as its gate: those of the mean distribution of all references.

  Args:
    model: the network.
    config: names the certainty.
    state: holds the further references.
    rollout: B episodes of T tokens.
    ref_output: of `reference_pass`, logits.
    batch: `[B, T]`.
    hyperparameters: the numbers.
    lengths: as in `reference_pass`.

  Raises:
    ValueError: if the vocabulary is so large that no logits are held.
  """
  if not holds_logits(model):
    raise ValueError(f'certainty_ensemble: needs the logits of whole episodes, which are not held at a vocabulary of '
                     f'{model.config.vocab_size}.')
  numbers = hyperparameters.loss
  logits = [ref_output, *(reference_pass(model, config, params, rollout, lengths) for params in state.ensemble)]
  mean = mean_distribution(logits, numbers.certainty_temperature)
  weight = kl_weight(certainty(mean, config.loss.certainty), numbers.certainty_exponent, numbers.certainty_intercept)
  return batch.replace(gate=sharding.episodes(jnp.where(batch.mask, weight, 0.0)))


def rollout_metrics(task: Task, rollout: Rollout, solutions: Solution, critical: chex.Array) -> dict[str, chex.Array]:
  """Returns what a rollout tells of critical tokens and of form, float32 `[]` each.

  Args:
    task: may know which responses are well formed.
    rollout: B episodes of T tokens.
    solutions: the right ones, `[B, T]`.
    critical: bool `[B, T]` the critical tokens, as far as responses follow the right solutions.

  Returns:
    `critical_right`, the share of critical tokens that are the right ones, NaN if there are none; `truncated`, the
    share of episodes that were cut before they ended; `max_response_length`, tokens in the longest episode; and, if the
    task judges form, `format_errors`, the share of responses that are not well formed.
  """
  right = jnp.sum(critical & (rollout.actions == solutions.tokens), dtype=jnp.float32)
  metrics = {'critical_right': finite.ratio(right, jnp.sum(critical, dtype=jnp.float32)),
             'truncated': jnp.mean(rollout.truncated.astype(jnp.float32)),
             'max_response_length': jnp.max(jnp.sum(rollout.mask, 1)).astype(jnp.float32)}
  if task.well_formed is not None:
    formed = jax.vmap(task.well_formed)(rollout.actions, rollout.mask)
    metrics['format_errors'] = jnp.mean(1.0 - formed.astype(jnp.float32))
  return metrics


def update(model: GPT2, config: FinetuneConfig, state: TrainState, rollout: Rollout, ref_output: chex.Array,
           batch: Batch, key: chex.PRNGKey, hyperparameters: Hyperparameters, lengths: Sequence[int] = ()
           ) -> tuple[TrainState, dict[str, chex.Array]]:
  """Makes `epochs` x `minibatches` updates; each epoch shuffles the episodes anew.

  Args:
    model: the policy network.
    config: structure and estimators.
    state: the state at the time of the rollout.
    rollout: B episodes of T tokens.
    ref_output: of `reference_pass`.
    batch: `[B, T]`.
    key: PRNG key, consumed.
    hyperparameters: the numbers.
    lengths: lengths below T, in rising order, at which episodes that fit are read.

  Returns:
    The state one step later, and the means of the loss's metrics over the updates; where the batch knows its critical
    tokens `kl_critical` and `weight_critical`, means over them; and the metrics of `finite.counted`, since an update
    with anything in it that is not finite is not made.
  """
  optimizer, numbers = make_optimizer(config), hyperparameters.loss
  if config.certainty_ensemble:  # the weight is in the batch's gate
    numbers = numbers.replace(certainty_exponent=0.0, certainty_intercept=0.0)
  warming_up = state.step < config.critic_warmup
  if config.advantage != 'gae':  # nothing asks for values: their gradient would only take its share of the norm
    numbers = numbers.replace(value_coefficient=0.0)

  def one_update(carry, indices):
    params, opt_state = carry
    minibatch = sharding.episodes(jax.tree.map(lambda x: x[indices], (rollout, ref_output, batch)))
    grads, metrics = _mean_gradient(_loss_fn(model, config, state, numbers), params, *minibatch, lengths)
    grads = {name: grad if name == 'value_head' else jax.tree.map(lambda x: jnp.where(warming_up, 0.0, x), grad)
             for name, grad in grads.items()}
    updates, after = optimizer.update(grads, opt_state, params)
    after = sharding.at_rest((optax.apply_updates(params, updates), after))
    carry, number = finite.guarded(carry, after, _terms(*minibatch, learning_rate) | metrics, grads)
    return carry, (metrics | {'grad_norm': optax.tree.norm(grads)}, number)

  shuffles = jax.vmap(lambda k: jax.random.permutation(k, config.episodes))(jax.random.split(key, config.epochs))
  indices = shuffles.reshape(config.epochs * config.minibatches, -1)
  learning_rate = jnp.float32(hyperparameters.learning_rate)
  opt_state = state.opt_state._replace(hyperparams=state.opt_state.hyperparams | {'learning_rate': learning_rate})
  (params, opt_state), (metrics, numbers) = finite.scan(one_update, (state.params, opt_state), indices)
  metrics = jax.tree.map(jnp.mean, metrics) | finite.counted(numbers)
  if batch.critical is not None:
    share = metrics.pop('critical')
    metrics |= {f'{name}_critical': finite.ratio(metrics.pop(f'{name}_at_critical'), share)
                for name in ('kl', 'weight')}
  return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _terms(rollout, ref_output, batch, learning_rate):
  """Returns the terms of an update that are known before its loss, 0 where they do not count."""
  terms = {name: getattr(batch, name) for name in ('log_probs', 'values', 'advantages', 'returns', 'gate')}
  terms = {name: jnp.where(batch.mask, x, 0.0) for name, x in terms.items() if x is not None}
  reference = jnp.where(batch.mask[..., None], ref_output, jnp.zeros((), ref_output.dtype))
  return terms | {'reference': reference, 'learning_rate': learning_rate}


def _loss_fn(model, config, state, numbers) -> Callable:
  """Returns `(params, rollout, ref_output, batch) -> (loss, metrics)`, means over tokens."""

  def of_own_tokens(own, shared):
    hidden, values, ref_output, batch = own
    embedding, ref_embedding, numbers = shared
    return linear_ppo_loss(hidden, embedding, values, ref_output, ref_embedding, batch, config.loss, numbers)

  def loss_fn(params, rollout, ref_output, batch):
    params = gathered(model, params)
    if holds_logits(model):
      logits, values = score(model, params, rollout)
      return ppo_loss(logits, values, ref_output, batch, config.loss, numbers)
    hidden, embedding, values = score_hidden(model, params, rollout)
    return sharding.own_tokens_mean(of_own_tokens, (hidden, values, ref_output, batch),
                                    (embedding, _ref_embedding(state, embedding), numbers), batch.mask)

  return loss_fn


def _mean_gradient(loss_fn, params, rollout, ref_output, batch, lengths):
  """Returns gradient and metrics of a loss that is a mean over tokens."""
  num_tokens = rollout.actions.shape[1]

  def of_slice(part):
    rollout, ref_output, batch = part

    def at(length):
      rest = jax.tree.map(lambda x: x[:, :length], (ref_output, batch))
      grads, metrics = jax.grad(loss_fn, has_aux=True)(params, slices.cut(rollout, length), *rest)
      return sharding.at_rest(grads), metrics

    return slices.at_length(at, (*lengths, num_tokens), rollout.mask)

  episodes, num_episodes = (rollout, ref_output, batch), rollout.mask.shape[0]
  size = slices.pick_size(num_episodes, rollout.prompt.shape[1] + num_tokens)
  if size < num_episodes:
    order = slices.by_length(rollout.mask)
    episodes = jax.tree.map(lambda x: x[order], episodes)
  return slices.mean_over_tokens(of_slice, episodes, episodes[0].mask, size)


def _ref_embedding(state, embedding):
  return sharding.gathered(state.ref_params['wte']['embedding'].astype(embedding.dtype))
