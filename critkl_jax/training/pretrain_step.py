"""The pre-training step: draws new problems on the device and learns from the tokens of their solutions alone."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel, as_language_model, gathered, logits_of, map_params
from critkl_jax.records import TrainState
from critkl_jax.rl.aggregation import masked_mean
from critkl_jax.tasks.task import Task, check_vocabulary
from critkl_jax.training import finite, slices
from critkl_jax.training.config import PretrainConfig


def pretraining_optimizer(model: LanguageModel, config: PretrainConfig) -> optax.GradientTransformation:
  """Makes Muon (Jordan 2024; Adam for the other parameters) or AdamW, with warm-up and cosine decay.

  With `hidden_only`, weight decay and Muon act on the matrices of the hidden layers (`LanguageModel.is_matrix`);
  without, AdamW decays all parameters, and Muon takes all matrices.
  """
  matrices = functools.partial(map_params, lambda path, _: model.is_matrix(path))

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers()
    return jax.tree.map(lambda hidden: matrix if hidden else None, matrices(params))

  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup_steps, max(config.num_steps, config.warmup_steps + 1),
      config.learning_rate * config.final_learning_rate)
  if config.optimizer == 'muon':
    optimizer = optax.contrib.muon(schedule, weight_decay=config.weight_decay,
                                   muon_weight_dimension_numbers=dimensions if config.hidden_only else None)
  else:
    optimizer = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay,
                            mask=matrices if config.hidden_only else None)
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)


def pretraining_keys(config: PretrainConfig) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Derives the key of the initial parameters and the key of the run from the seed."""
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  return init_key, run_key


def init_pretraining(model: LanguageModel, config: PretrainConfig, mesh: Mesh | None = None) -> TrainState:
  """Makes the state before the first step from the config's seed, sharded over the mesh if there is one."""
  model = as_language_model(model)

  def init(key):
    params = model.init(key)
    opt_state = pretraining_optimizer(model, config).init(params)
    # Muon's coefficients have JAX's default type, which is float64 under x64.
    opt_state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, opt_state)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))

  init_key, _ = pretraining_keys(config)
  if mesh is None:
    return sharding.bound(init(init_key))
  places = sharding.shardings(jax.eval_shape(init, init_key), mesh, model.partition)
  return jax.jit(init, out_shardings=places)(sharding.replicate(init_key, mesh))


def make_pretrain_step(model: LanguageModel, task: Task, config: PretrainConfig, mesh: Mesh | None = None) -> Callable:
  """Makes the step `(state, key) -> (state, metrics)`, to be jitted with the state donated.

  The key of a step is `fold_in(key, state.step)`. Each example starts at a random position, uniform over the positions
  from which it fits into the context, so that every position embedding is trained.

  Args:
    model: the model.
    task: its problems and solutions are the data; all examples of a step have the same padded length.
    config: optimizer and batch size.
    mesh: the devices over which examples and model are sharded, as the state is; None for one device.

  Returns:
    The step. Its metrics are float32 `[]`: `loss` in nats per token, `accuracy` of the next token, `num_tokens`, the
    number of solution tokens, and the metrics of `finite.counted`. An update that is not finite is skipped.

  Raises:
    ValueError: if the longest example does not fit into the context, the vocabularies of model and task differ, or the
      task has no solutions to learn from.
  """
  model = as_language_model(model)
  check_vocabulary(task, model.vocab_size)
  if task.solution is None:
    raise ValueError('task: pre-training learns from right solutions, and this task has none.')
  optimizer = pretraining_optimizer(model, config)
  length = task.prompt_length + task.response_length
  if length > model.context_length:
    raise ValueError(f'context_length: expected {length} or more for this task, got {model.context_length}.')

  loss_fn = _loss_fn(model, task)

  def step(state: TrainState, key: chex.PRNGKey):
    problem_key, offset_key = jax.random.split(jax.random.fold_in(key, state.step))
    problems = jax.vmap(task.sample)(jax.random.split(problem_key, config.batch_size))
    prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
    used = sum(jnp.sum(text.mask, 1, dtype=jnp.int32) for text in (prompt, solution))
    free = model.context_length + 1 - used
    offset = jax.random.randint(offset_key, (config.batch_size,), 0, free, dtype=jnp.int32)
    examples = sharding.episodes((prompt, solution, offset))
    grads, metrics = slices.weighted_mean(
        lambda part: jax.grad(loss_fn, has_aux=True)(state.params, *part), examples,
        jnp.sum(solution.mask, 1, dtype=jnp.float32),
        slices.pick_size(config.batch_size, length))
    grads = sharding.at_rest(grads, model.partition)
    metrics['num_tokens'] = jnp.sum(solution.mask, dtype=jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, updates), opt_state
    (params, opt_state), number = finite.guarded(  # computed once at any size: Muon's update is expensive
        (state.params, state.opt_state), lambda *_: after, metrics, grads)
    metrics |= finite.counted(number[None])
    state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
    if mesh is not None:
      state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh, model.partition))
    return state, metrics

  return sharding.on_mesh(mesh, step)


def _loss_fn(model, task):
  """Makes `(params, prompt [B, Q], solution [B, T], offset [B]) -> (loss, metrics)`, means over solution tokens."""

  def loss_fn(params, prompt, solution, offset):
    params = gathered(model, params)
    tokens = jnp.concatenate([prompt.tokens, solution.tokens], 1)
    mask = jnp.concatenate([prompt.mask, solution.mask], 1)
    hidden = model.apply(params, tokens[:, :-1], mask[:, :-1], position_offset=offset).hidden
    logits = logits_of(hidden, model.output_head(params))[:, task.prompt_length - 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, solution.tokens)
    right = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == solution.tokens
    loss, accuracy = masked_mean(losses, solution.mask), masked_mean(right.astype(jnp.float32), solution.mask)
    return loss, {'loss': loss, 'accuracy': accuracy}

  return loss_fn
