"""The pre-training step: fresh problems drawn on the device, loss on the solution text only."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from critkl_jax import finite, sharding, slices
from critkl_jax.config import PretrainConfig
from critkl_jax.gpt2 import GPT2, gathered, init_params
from critkl_jax.losses import masked_mean
from critkl_jax.records import TrainState
from critkl_jax.tasks.task import Task


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
  """Returns Muon (Jordan 2024; the rest by Adam) or AdamW with warm-up and a cosine.

  With `hidden_only`, weight decay and Muon act on the kernels of the blocks (`hidden_kernels`); without, AdamW decays
  all parameters, and Muon takes all matrices.
  """
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup_steps, max(config.num_steps, config.warmup_steps + 1),
      config.learning_rate * config.final_learning_rate)
  if config.optimizer == 'muon':
    optimizer = optax.contrib.muon(schedule, weight_decay=config.weight_decay,
                                   muon_weight_dimension_numbers=_muon_dimensions if config.hidden_only else None)
  else:
    optimizer = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay,
                            mask=hidden_kernels if config.hidden_only else None)
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)


def hidden_kernels(params: Any) -> Any:
  """Returns where a PyTree of parameters holds kernels of the blocks: true for each of them, false for biases, layer
  norms, embeddings and value head."""

  def hidden(path, _):
    names = [entry.key for entry in path]
    return names[0].startswith('h_') and names[-1] == 'kernel'

  return jax.tree_util.tree_map_with_path(hidden, params)


def _muon_dimensions(params):
  matrix = optax.contrib.MuonDimensionNumbers()
  return jax.tree.map(lambda hidden: matrix if hidden else None, hidden_kernels(params))


def pretraining_keys(config: PretrainConfig) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Returns the key of the initial parameters and the key of the run, both functions of the seed."""
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  return init_key, run_key


def draw_longest(config: PretrainConfig, step: int) -> int:
  """Draws, on the host, the number of digits of the longer operand of a step's examples.

  Both operands' lengths uniform in 1..N make the longer one n with probability (2n - 1) / N^2. A function of the seed
  and the step.
  """
  n = np.arange(1, config.known_digits + 1)
  rng = np.random.default_rng((config.seed, step))
  return int(rng.choice(n, p=(2 * n - 1) / config.known_digits**2))


def init_pretraining(model: GPT2, config: PretrainConfig, mesh: Mesh | None = None) -> TrainState:
  """Returns the state before the first step, a function of the config's seed, spread over a mesh if one is given."""

  def init(key):
    params = init_params(model, key)
    opt_state = make_optimizer(config).init(params)  # Muon's coefficients have the default type, which x64 changes
    opt_state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, opt_state)
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))

  init_key, _ = pretraining_keys(config)
  if mesh is None:
    return sharding.bound(init(init_key))
  places = sharding.shardings(jax.eval_shape(init, init_key), mesh)
  return jax.jit(init, out_shardings=places)(sharding.replicate(init_key, mesh))


def make_pretrain_step(model: GPT2, task: Task, config: PretrainConfig, mesh: Mesh | None = None) -> Callable:
  """Makes the step `(state, key) -> (state, metrics)`, to be jitted with the state donated.

  The key of a step is `fold_in(key, state.step)`. Each example starts at a position drawn uniformly from those at which
  the whole of it fits into the context, so that every position embedding is trained.

  Args:
    model: the policy network.
    task: its problems and solutions are the data; all examples of a step have the task's one length.
    config: optimizer and batch size.
    mesh: the devices over which examples and model are spread, as the state is; None for one device.

  Returns:
    The step; its metrics are float32 `[]`: `loss` in nats a token, `accuracy` of the next token, `num_tokens`, and
    those of `finite.counted`: an update with anything in it that is not finite is not made.

  Raises:
    ValueError: if the longest example does not fit into the context.
  """
  optimizer = make_optimizer(config)
  length = task.prompt_length + task.response_length
  if length > model.config.context_length:
    raise ValueError(f'context_length: expected {length} or more for this task, got {model.config.context_length}.')

  def loss_fn(params, prompt, solution, offset):
    params = gathered(model, params)
    tokens = jnp.concatenate([prompt.tokens, solution.tokens], 1)
    mask = jnp.concatenate([prompt.mask, solution.mask], 1)
    logits = model.apply({'params': params}, tokens[:, :-1], mask[:, :-1], position_offset=offset).logits
    logits = logits[:, task.prompt_length - 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, solution.tokens)
    right = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == solution.tokens
    loss, accuracy = masked_mean(losses, solution.mask), masked_mean(right.astype(jnp.float32), solution.mask)
    return loss, {'loss': loss, 'accuracy': accuracy}

  def step(state: TrainState, key: chex.PRNGKey):
    problem_key, offset_key = jax.random.split(jax.random.fold_in(key, state.step))
    problems = jax.vmap(task.sample)(jax.random.split(problem_key, config.batch_size))
    prompt, solution = jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)
    used = sum(jnp.sum(text.mask, 1, dtype=jnp.int32) for text in (prompt, solution))
    free = model.config.context_length + 1 - used
    offset = jax.random.randint(offset_key, (config.batch_size,), 0, free, dtype=jnp.int32)
    examples = sharding.episodes((prompt, solution, offset))
    grads, metrics = slices.mean_over_tokens(
        lambda part: jax.grad(loss_fn, has_aux=True)(state.params, *part), examples, solution.mask,
        slices.pick_size(config.batch_size, length))
    grads = sharding.at_rest(grads)
    metrics['num_tokens'] = jnp.sum(solution.mask, dtype=jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, updates), opt_state
    (params, opt_state), number = finite.guarded((state.params, state.opt_state), after, metrics, grads)
    metrics |= finite.counted(number[None])
    state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
    if mesh is not None:
      state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh))
    return state, metrics

  return sharding.on_mesh(mesh, step)
