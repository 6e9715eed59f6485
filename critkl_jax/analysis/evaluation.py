"""Accuracy on problem sets, and statistics of right solutions under a model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.analysis.intervals import share_interval
from critkl_jax.models.language_model import LanguageModel, as_language_model, gathered, gathered_whole
from critkl_jax.rl.certainties import certainty
from critkl_jax.rl.losses import action_log_probs
from critkl_jax.sampling.generation import respond
from critkl_jax.sampling.scoring import as_rollout, score
from critkl_jax.tasks.host_side import rewarded
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.task import ProblemSet, Task, check_vocabulary, successes

SEED = 1_000_003  # seed of the test problems; a run trains on them only by chance


def make_answer(model: LanguageModel, task: Task, greedy: bool = True, temperature: float = 1.0,
                mesh: Mesh | None = None, pool: RewardPool | None = None) -> Callable:
  """Makes `(params, problems, key) -> (Rollout, rewards float32 [B])`, jitted: one response to each of B problems.

  On a mesh the parameters are sharded, problems and key come in replicated, and each device answers its share of the
  problems. Reward functions in Python are called by `pool`, or in this process if it is None.

  Raises:
    ValueError: if task and model have vocabularies of different sizes.
  """
  model = as_language_model(model)
  check_vocabulary(task, model.vocab_size)

  def answer(params, problems, key):
    problems = sharding.episodes(problems)
    rollout = respond(model, gathered_whole(model, params), task, problems, key,
                      temperature=temperature, greedy=greedy)
    if task.host is not None:
      return sharding.whole(rollout)
    return rollout, sharding.whole(jax.vmap(task.reward)(problems, rollout.actions, rollout.mask))

  jitted = jax.jit(sharding.on_mesh(mesh, answer))
  if task.host is None:
    return jitted

  def answer_on_host(params, problems, key):
    rollout = jitted(params, problems, key)
    return rollout, rewarded(task.host, problems, rollout.actions, rollout.mask, pool)[0]

  return answer_on_host


def answer_all(answer: Callable, params: Any, problems: Any, key: chex.PRNGKey, batch_size: int = 128) -> np.ndarray:
  """Answers problems in batches of equal size, so that one program is compiled, and returns the rewards.

  Args:
    answer: function made by `make_answer`.
    params: the model's parameters.
    problems: PyTree of arrays with a leading axis B.
    key: PRNG key, consumed.
    batch_size: problems in a batch; the last batch is filled up with the first problems.

  Returns:
    float32 NumPy `[B]` rewards.
  """
  total, rewards = jax.tree.leaves(problems)[0].shape[0], []
  for indices in _batches(total, batch_size):
    batch = jax.tree.map(lambda x, i=indices: x[i], problems)
    rewards.append(np.asarray(answer(params, batch, jax.random.fold_in(key, indices[0]))[1]))
  return np.concatenate(rewards)[:total]


def _batches(total: int, size: int) -> list[np.ndarray]:
  """Returns the indices of batches of equal size; the last batch is filled up with the first indices."""
  size = min(size, total)
  return [(start + np.arange(size)) % total for start in range(0, total, size)]


def bootstrap_interval(samples: np.ndarray, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
                       ) -> tuple[float, float]:
  """Returns the percentile bootstrap interval of the mean of `samples` `[B]` (Efron 1979)."""
  rng = np.random.default_rng(seed)
  samples = np.asarray(samples)
  means = samples[rng.integers(0, len(samples), (num_resamples, len(samples)))].mean(1)
  low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
  return float(low), float(high)


def accuracy_interval(accuracy: float, num_problems: int) -> tuple[float, float]:
  """Returns the exact 95% interval of a share of problems (`intervals.share_interval`)."""
  return share_interval(accuracy * num_problems, num_problems)[1:]


def accuracies(model: LanguageModel, params: Any, sets: Iterable[ProblemSet], greedy: bool = True,
               temperature: float = 1.0, mesh: Mesh | None = None, pool: RewardPool | None = None
               ) -> Iterator[dict[str, Any]]:
  """Tests a model on problem sets and yields a row for each as soon as it is done.

  Consecutive sets of the same task share one compiled program.

  Args:
    model: the network.
    params: its parameters.
    sets: problem sets, `addition.by_digits_and_distribution` for example.
    greedy: whether to take the most probable tokens.
    temperature: sampling temperature, if not greedy.
    mesh: the devices over which the parameters are sharded; None for one device.
    pool: as in `make_answer`.

  Yields:
    The set's labels with `accuracy` (0 to 1), `low` and `high` of its 95% interval (`accuracy_interval`) and
    `num_problems`.

  Raises:
    ValueError: if a task and the model have vocabularies of different sizes.
  """
  task, answer = None, None
  for one in sets:
    if one.task is not task:
      task, answer = one.task, make_answer(model, one.task, greedy, temperature, mesh, pool)
    rewards = answer_all(answer, params, *sharding.replicate((one.problems, one.key), mesh))
    accuracy = float(successes(task, rewards).mean())
    low, high = accuracy_interval(accuracy, rewards.size)
    yield one.labels | {'accuracy': accuracy, 'low': low, 'high': high, 'num_problems': rewards.size}


def accuracy_table(*args: Any, **options: Any) -> list[dict[str, Any]]:
  """Returns all rows of `accuracies` in a list; takes the same arguments."""
  return list(accuracies(*args, **options))


def make_reader(model: LanguageModel, task: Task, mesh: Mesh | None = None) -> Callable:
  """Makes `(params, problems) -> dict`, jitted: a teacher-forced pass over the right solutions of B problems.

  The dict holds arrays `[B, T]`: float32 `probability` of the right token given the tokens before it and `certainty`
  of the prediction (negentropy); bool `mask` and `critical` (false everywhere if the task knows no critical tokens).
  """

  model = as_language_model(model)

  def read(params, problems):
    prompt, solution = sharding.episodes((jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)))
    logits, _ = score(model, gathered(model, params, model.dtype), as_rollout(prompt, solution))
    critical = jnp.zeros_like(solution.mask) if solution.critical is None else solution.critical
    return sharding.whole({
        'probability': jnp.exp(action_log_probs(logits, solution.tokens)), 'certainty': certainty(logits),
        'mask': solution.mask, 'critical': critical})

  return jax.jit(sharding.on_mesh(mesh, read))


def solution_statistics(read: Callable, params: Any, problems: Any, batch_size: int = 64) -> dict[str, float | None]:
  """Averages a model's probability and certainty over the critical and the other tokens of right solutions.

  Args:
    read: function made by `make_reader`.
    params: the model's parameters.
    problems: PyTree of arrays with a leading axis B.
    batch_size: problems in a batch; the last batch is filled up with the first problems, which count once.

  Returns:
    Means over tokens: `critical_probability` and `other_probability` of the right token, `critical_certainty` and
    `other_certainty` of the prediction (negentropy); None where there are no such tokens.
  """
  total, parts = jax.tree.leaves(problems)[0].shape[0], []
  for indices in _batches(total, batch_size):
    batch = jax.tree.map(lambda x, i=indices: x[i], problems)
    parts.append(jax.device_get(read(params, batch)))
  found = {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}
  places = {'critical': found['critical'], 'other': found['mask'] & ~found['critical']}
  return {f'{place}_{name}': float(found[name][where].mean()) if where.any() else None
          for place, where in places.items() for name in ('probability', 'certainty')}


def make_test(model: LanguageModel, task: Task, draw: Callable[[chex.PRNGKey], dict[str, Any]], seed: int = SEED,
              mesh: Mesh | None = None, pool: RewardPool | None = None) -> Callable:
  """Makes the greedy test of a fine-tuning run, always on the same problems.

  Args:
    model: the network.
    task: the task of the problems.
    draw: key -> problem sets by name, each with a leading axis B, for example `addition.before_and_after` with its
      settings bound. An empty dict gives an empty result.
    seed: seed of problems and samples.
    mesh: the devices over which the parameters are sharded; None for one device.
    pool: as in `make_answer`.

  Returns:
    `params -> (result, right)`: `result` holds the accuracy of each set by its name and, if the task knows right
    solutions, `tokens`, the `solution_statistics` of the last set; `right` holds for each set float32 NumPy `[B]`, 1
    for right answers and 0 for wrong ones.

  Raises:
    ValueError: if task and model have vocabularies of different sizes.
  """
  answer = make_answer(model, task, mesh=mesh, pool=pool)
  read = make_reader(model, task, mesh) if task.solution else None
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = draw(problem_key)
  names = list(problems)  # keeps their order: PyTrees sort the keys of a dict
  problems, answer_key = sharding.replicate((problems, answer_key), mesh)

  def test(params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    right = {name: successes(task, answer_all(answer, params, problems[name], answer_key)) for name in names}
    result: dict[str, Any] = {name: float(some.mean()) for name, some in right.items()}
    if names and read:
      result['tokens'] = solution_statistics(read, params, problems[names[-1]])
    return result, right

  return test
