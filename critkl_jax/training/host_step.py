"""One iteration of fine-tuning with rewards in Python, as two programs: the rollout, and everything after the rewards.

Letters: B episodes, T response tokens.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from critkl_jax import sharding
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.records import Rollout, TrainState
from critkl_jax.tasks.host_side import Answers, rewarded
from critkl_jax.tasks.rewards import RewardError, RewardPool
from critkl_jax.tasks.task import Task
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.experience import answered
from critkl_jax.training.initial_state import Hyperparameters
from critkl_jax.training.setup import Setup
from critkl_jax.training.train_step import learn

SHOWN = 4  # responses of an iteration that are kept as samples


class HostStep:
  """The step of fine-tuning a task with rewards on the host, `(state, key, hyperparameters) -> (state, metrics)`.

  The state is donated. Between rollout and update the host reads the responses of its own devices and rewards them.
  Prompts are tokenised before the first step, and those of the next step are laid out while the devices work. Iteration
  i = `state.step` takes the prompts that follow those of iteration i - 1 in the task's sequence, so a resumed run sees
  the prompts that it would have seen.

  Attributes:
    samples: up to four responses of the last iteration, to different prompts where there are several, on the first
      host: `row`, `prompt`, `completion`, `reward`, and `reward/NAME`, the value of each reward function.
  """

  def __init__(self, model: LanguageModel, task: Task, config: FinetuneConfig, mesh: Mesh | None = None,
               pool: RewardPool | None = None):
    """Makes the step; see `make_host_step`."""
    self._setup, self._mesh, self._pool = Setup.of(model, task, config), mesh, pool or RewardPool()
    self.samples: list[dict[str, Any]] = []
    self._number, self._next = -1, None
    self._rollout = jax.jit(sharding.on_mesh(mesh, self._sample))
    self._learn = jax.jit(sharding.on_mesh(mesh, self._update), donate_argnums=0)

  def __call__(self, state: TrainState, key: chex.PRNGKey, hyperparameters: Hyperparameters, number: int | None = None
               ) -> tuple[TrainState, dict[str, chex.Array]]:
    """Makes one iteration.

    Args:
      state: as for `make_train_step`.
      key: the run's key.
      hyperparameters: the numbers.
      number: the iteration, if the caller knows it; reading it from the state waits for the devices.

    Returns:
      The state after the iteration, and the metrics of `make_train_step` with `reward/NAME`, the mean value of each
      reward function.

    Raises:
      RewardError: as `RewardPool`, on every host if any host raises it; the state has been read but not donated.
    """
    number = int(state.step) if number is None else number
    problems = self._next if self._number == number else self._drawn(number)
    episodes, rollout = self._rollout(state.params, sharding.replicate(problems, self._mesh), key, state.step,
                                      hyperparameters.loss.temperature)
    rewards, values = self._rewarded(problems, rollout)
    state, metrics = self._learn(state, key, hyperparameters, episodes, rollout, rewards, values)
    self._number, self._next = number + 1, self._drawn(number + 1)
    return state, metrics

  def _sample(self, params, problems, key, step, temperature):
    rollout_key, _ = jax.random.split(jax.random.fold_in(key, step))
    _, sample_key = jax.random.split(rollout_key)
    return answered(self._setup, params, problems, sample_key, temperature)

  def _update(self, state, key, hyperparameters, problems, rollout, rewards, values):
    state, metrics = learn(self._setup, self._mesh, state, key, hyperparameters, problems, rollout, rewards)
    return state, metrics | {f'reward/{name}': jnp.mean(value) for name, value in values.items()}

  def _drawn(self, number):
    config = self._setup.config
    each = config.episodes // config.episodes_per_problem
    return self._setup.task.host.draw((config.seed,), number * each, each)

  def _rewarded(self, problems, rollout: Rollout) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Rewards the episodes of this host's devices; returns all rewards and values, `[B]` each, placed as episodes."""
    config, host = self._setup.config, self._setup.task.host
    actions, mask = (_local(x) for x in (rollout.actions, rollout.mask))
    own = np.flatnonzero(actions[1])
    problems = jax.tree.map(lambda x: np.repeat(x, config.episodes_per_problem, axis=0)[own], problems)
    fault, total, values, answers = None, np.zeros(0, np.float32), {name: np.zeros(0) for name in host.functions}, None
    try:
      total, values, answers = rewarded(host, problems, actions[0][own], mask[0][own], self._pool)
    except Exception as error:  # the other hosts must hear of it
      fault = error
    if _any_host(fault is not None):
      raise fault or RewardError('reward: a reward function failed on another host, which says why.')
    if jax.process_index() == 0:
      self.samples = _samples(answers, total, values)

    def placed(some):
      whole = np.zeros(config.episodes, np.float32)
      whole[own] = some
      if self._mesh is None:
        return whole
      place = NamedSharding(self._mesh, PartitionSpec('data'))
      return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return placed(total), {name: placed(value) for name, value in values.items()}


def make_host_step(model: LanguageModel, task: Task, config: FinetuneConfig, mesh: Mesh | None = None,
                   pool: RewardPool | None = None) -> HostStep:
  """Makes the step of fine-tuning for a task with rewards in Python, such as `questions.prompted_task`.

  Args:
    model: the model of policy and reference, a `LanguageModel` or a module that `as_language_model` converts.
    task: draws problems and rewards responses on the host.
    config: as in `make_train_step`; its seed also determines the order of the prompts.
    mesh: as in `make_train_step`; each host rewards the episodes of its own devices.
    pool: runs the reward functions; None to call them in this process, without a time limit.

  Raises:
    ValueError: if the task is not of this kind, or as `make_train_step`.
  """
  if task.host is None:
    raise ValueError('task: draws its problems on the device; train it with make_train_step.')
  return HostStep(model, task, config, mesh, pool)


def _local(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Returns an array `[B, ...]` with the rows of this host's devices, and bool `[B]`, which rows these are."""
  if x.is_fully_addressable:
    return np.asarray(x), np.ones(x.shape[0], bool)
  found, here = np.zeros(x.shape, x.dtype), np.zeros(x.shape[0], bool)
  for shard in x.addressable_shards:
    found[shard.index], here[shard.index[0]] = np.asarray(shard.data), True
  return found, here


def _any_host(flag: bool) -> bool:
  """Returns whether the flag is true on any host."""
  return flag if jax.process_count() == 1 else bool(np.max(multihost_utils.process_allgather(np.int32(flag))))


def _samples(answers: Answers, total: np.ndarray, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
  """Returns the first responses, each to another prompt where there are several, with their rewards."""
  first = [i for i, row in enumerate(answers.rows) if row not in answers.rows[:i]]
  chosen = [*first, *(i for i in range(len(answers.rows)) if i not in first)][:SHOWN]
  return [{'row': answers.rows[i], 'prompt': answers.prompts[i], 'completion': answers.completions[i],
           'reward': float(total[i]), **{f'reward/{name}': float(value[i]) for name, value in values.items()}}
          for i in sorted(chosen)]
