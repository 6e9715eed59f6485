"""Accuracy by operand length, and what a model knows of the critical tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from critkl_jax import sharding
from critkl_jax.confidence import certainty
from critkl_jax.config import GPT2Config
from critkl_jax.gpt2 import GPT2, gathered, gathered_whole
from critkl_jax.intervals import share_interval
from critkl_jax.losses import action_log_probs
from critkl_jax.records import Problem
from critkl_jax.rollout import as_rollout, respond, score
from critkl_jax.tasks import addition
from critkl_jax.tasks.task import Task

# (key, number of digits of the longer operand, N) -> lengths [2]
DISTRIBUTIONS = {
    'identical': lambda key, num_digits, known: addition.identical_lengths(key, num_digits),
    'varying': lambda key, num_digits, known: addition.varying_lengths(key, num_digits),
    'plus': lambda key, num_digits, known: addition.plus_lengths(
        key, min(known, num_digits), max(num_digits - known, 0)),
}


def make_answer(model: GPT2, task: Task, greedy: bool = True, temperature: float = 1.0, mesh: Mesh | None = None
                ) -> Callable:
  """Makes `(params, problems, key) -> (Rollout, rewards float32 [B])`, jitted: one response to each of B problems.

  On a mesh the parameters are spread over it, problems and key replicated, and the problems shared out.
  """

  def answer(params, problems, key):
    problems = sharding.episodes(problems)
    rollout = respond(model, gathered_whole(model, params), task, problems, key,
                      temperature=temperature, greedy=greedy)
    return rollout, sharding.whole(jax.vmap(task.reward)(problems, rollout.actions, rollout.mask))

  return jax.jit(sharding.on_mesh(mesh, answer))


def draw_problems(key: chex.PRNGKey, num_problems: int, distribution: str, num_digits: int, known_digits: int,
                  max_digits: int) -> Problem:
  """Draws addition problems for a test.

  Args:
    key: PRNG key, consumed.
    num_problems: B.
    distribution: `identical`, `varying` or `plus`; the last with up to N digits is `varying`.
    num_digits: digits of the longer operand.
    known_digits: N of pre-training.
    max_digits: M, size of the digit arrays.

  Returns:
    A `Problem` with a leading axis B.

  Raises:
    ValueError: if the distribution is unknown or the digits do not fit.
  """
  _check_distribution(distribution)
  if not 1 <= num_digits <= max_digits:
    raise ValueError(f'num_digits: expected 1..{max_digits}, got {num_digits}.')
  lengths = functools.partial(DISTRIBUTIONS[distribution], num_digits=num_digits, known=known_digits)
  sample = addition.addition(known_digits, max_digits, lengths).sample
  return jax.jit(lambda key: jax.vmap(sample)(jax.random.split(key, num_problems)))(key)  # one program, not fifty


def answer_all(answer: Callable, params: Any, problems: Problem, key: chex.PRNGKey, batch_size: int = 128
                 ) -> np.ndarray:
  """Answers problems in batches of one size, so that one program serves all of them.

  Args:
    answer: what `make_answer` returns.
    params: the model's parameters.
    problems: with a leading axis B.
    key: PRNG key, consumed.
    batch_size: problems in a batch; the last batch is filled up with the first problems.

  Returns:
    float32 NumPy `[B]` rewards.
  """
  total, rewards = problems.lengths.shape[0], []
  for indices in _batches(total, batch_size):
    batch = jax.tree.map(lambda x, i=indices: x[i], problems)
    rewards.append(np.asarray(answer(params, batch, jax.random.fold_in(key, indices[0]))[1]))
  return np.concatenate(rewards)[:total]


def _batches(total: int, size: int) -> list[np.ndarray]:
  """Returns the indices of batches of one size, the last one filled up with the first indices."""
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


def accuracies(model: GPT2, params: Any, known_digits: int, digits: list[int], distributions: list[str],
               num_problems: int, seed: int = 0, greedy: bool = True, temperature: float = 1.0,
               mesh: Mesh | None = None) -> Iterator[dict[str, Any]]:
  """Tests a model on every distribution at every number of digits, and yields the row of each cell as it is tested.

  One program is compiled for each number of digits.

  Args:
    model: the network.
    params: its parameters.
    known_digits: N of pre-training.
    digits: numbers of digits of the longer operand.
    distributions: names out of `DISTRIBUTIONS`.
    num_problems: problems in a cell.
    seed: seed of problems and samples.
    greedy: whether the most probable tokens are taken.
    temperature: of the samples, where not greedy.
    mesh: the devices over which the parameters are spread; None for one device.

  Yields:
    `digits`, `distribution`, `accuracy` 0..1, `low` and `high` of its 95% interval (`accuracy_interval`),
    `num_problems`.

  Raises:
    ValueError: before the first row, if a distribution is unknown or texts do not fit into the model's context.
  """
  tasks = {n: task_of(model.config, known_digits, n) for n in digits}
  for distribution in distributions:
    _check_distribution(distribution)
  for num_digits, task in tasks.items():
    answer = make_answer(model, task, greedy, temperature, mesh)
    for distribution in distributions:
      problem_key, answer_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), num_digits))
      problems = draw_problems(problem_key, num_problems, distribution, num_digits, known_digits, num_digits)
      accuracy = float(answer_all(answer, params, *sharding.replicate((problems, answer_key), mesh)).mean())
      low, high = accuracy_interval(accuracy, num_problems)
      yield {'digits': num_digits, 'distribution': distribution, 'accuracy': accuracy, 'low': low, 'high': high,
             'num_problems': num_problems}


def accuracy_table(*args: Any, **options: Any) -> list[dict[str, Any]]:
  """Returns all rows of `accuracies`, whose arguments it takes."""
  return list(accuracies(*args, **options))


def task_of(config: GPT2Config, known_digits: int, num_digits: int) -> Task:
  """Returns the task of problems whose longer operand has so many digits.

  Raises:
    ValueError: if the model's context is too short for them, or its vocabulary too small.
  """
  addition.check_vocabulary(config.vocab_size)
  if num_digits < 1:
    raise ValueError(f'digits: expected 1 or more, got {num_digits}.')
  task = addition.plus_task(min(known_digits, num_digits), max(num_digits - known_digits, 0))
  needed = task.prompt_length + task.response_length
  if needed > config.context_length:
    raise ValueError(f'digits: {num_digits} need a context of {needed}, and the model has {config.context_length}; '
                     'take fewer.')
  return task


def _check_distribution(name):
  if name not in DISTRIBUTIONS:
    raise ValueError(f'distribution: expected one of {tuple(DISTRIBUTIONS)}, got {name!r}.')


def make_reader(model: GPT2, task: Task, mesh: Mesh | None = None) -> Callable:
  """Makes `(params, problems) -> dict`, jitted: what a model says of the right solutions of B problems.

  The dict holds arrays `[B, T]`: float32 `probability` of the right token given what stands before it and `certainty`
  of the prediction (negentropy), bool `mask` and `critical`.
  """

  def read(params, problems):
    prompt, solution = sharding.episodes((jax.vmap(task.prompt)(problems), jax.vmap(task.solution)(problems)))
    logits, _ = score(model, gathered(model, params, model.config.dtype), as_rollout(prompt, solution))
    return sharding.whole({
        'probability': jnp.exp(action_log_probs(logits, solution.tokens)), 'certainty': certainty(logits),
        'mask': solution.mask, 'critical': solution.critical})

  return jax.jit(sharding.on_mesh(mesh, read))


def solution_statistics(read: Callable, params: Any, problems: Problem, batch_size: int = 64
                        ) -> dict[str, float | None]:
  """Reads right solutions to a model and compares critical tokens with the others.

  Args:
    read: what `make_reader` returns.
    params: the model's parameters.
    problems: with a leading axis B.
    batch_size: problems read at a time; the last batch is filled up with the first problems, which count once.

  Returns:
    `critical_probability` and `other_probability` of the right token, `critical_certainty` and `other_certainty` of the
    prediction (negentropy), means over the tokens; None where there are none.
  """
  total, parts = problems.lengths.shape[0], []
  for indices in _batches(total, batch_size):
    batch = jax.tree.map(lambda x, i=indices: x[i], problems)
    parts.append(jax.device_get(read(params, batch)))
  found = {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}
  places = {'critical': found['critical'], 'other': found['mask'] & ~found['critical']}
  return {f'{place}_{name}': float(found[name][where].mean()) if where.any() else None
          for place, where in places.items() for name in ('probability', 'certainty')}


def make_test(model: GPT2, known_digits: int, extra_digits: int, num_problems: int, seed: int = 1_000_003,
              mesh: Mesh | None = None) -> Callable:
  """Makes the test of a fine-tuning run, always on the same problems.

  Args:
    model: the network.
    known_digits: N of pre-training.
    extra_digits: k.
    num_problems: problems of N and of N + k digits (`plus`) each; 0 for an empty result.
    seed: of problems and samples.
    mesh: the devices over which the parameters are spread; None for one device.

  Returns:
    `params -> (result, rewards)`, greedy: the result holds accuracies `N` and `N+k` and `tokens`, the
    `solution_statistics` at N + k digits; the rewards are those behind the accuracies, float32 NumPy `[num_problems]`.
  """
  longest = known_digits + extra_digits
  task, longer = addition.plus_task(known_digits, extra_digits), f'N+{extra_digits}'
  answer, read = make_answer(model, task, mesh=mesh), make_reader(model, task, mesh)
  problem_key, answer_key = jax.random.split(jax.random.key(seed))
  problems = {name: draw_problems(jax.random.fold_in(problem_key, n), num_problems, 'plus', n, known_digits, longest)
              for name, n in (('N', known_digits), (longer, longest)) if num_problems}
  problems, answer_key = sharding.replicate((problems, answer_key), mesh)

  def test(params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rewards = {name: answer_all(answer, params, drawn, answer_key) for name, drawn in problems.items()}
    result: dict[str, Any] = {name: float(some.mean()) for name, some in rewards.items()}
    if problems:
      result['tokens'] = solution_statistics(read, params, problems[longer])
    return result, rewards

  return test
