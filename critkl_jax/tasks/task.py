"""The `Task` record: pure functions of one problem, each jittable and vmappable."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from critkl_jax.records import Rollout, Solution, Tokens
from critkl_jax.tasks.host_side import HostSide
from critkl_jax.tasks.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Task:
  """A reinforcement-learning task on text.

  Attributes:
    tokenizer: the vocabulary in which prompts and responses are written.
    prompt_length: Q, the fixed length of prompts.
    response_length: T, the fixed length of responses: the limit at which an episode is cut.
    stop: int32 `[num_states, num_columns]` automaton that ends an episode, see `stop_after`.
    prompt: problem -> `Tokens` `[Q]`, padded on the left; a problem is any PyTree of arrays.
    sample: key -> problem; the key is consumed. None if the problems come from `host`.
    reward: (problem, actions `[T]`, mask `[T]`) -> float32 `[]`, any finite number; training maximises it as it is.
      None if the rewards come from `host`.
    host: draws problems and rewards responses in Python, in place of `sample` and `reward`; `make_host_step` trains
      such a task.
    success: the least reward that counts as success; `accuracy` is the share of responses that reach it.
    solution: problem -> `Solution` `[T]`, padded on the right. None if no right response is known; metrics, curves and
      detectors that compare with a solution are then left out.
    well_formed: (problem, actions `[T]`, mask `[T]`) -> bool `[]`, whether a response has the form of an answer, right
      or wrong. None if the task does not judge form.
    solution_length: most tokens of a right response; 0 if not known. Passes over episodes that are no longer are cut
      to this length; with `host` also to a half and a quarter of it, or of `response_length` if it is not known.
    draft: (problem, actions, num_actions `[]`, size) -> int32 `[size]`: guesses of the tokens after the first
      `num_actions` of the response, -1 for no guess. It makes rollouts faster and changes nothing else. None if the
      task has no draft.
    shown: text of a prompt -> the problem as tables and pages show it; by default the whole prompt.
  """

  tokenizer: Tokenizer
  prompt_length: int
  response_length: int
  stop: chex.Array
  prompt: Callable[[Any], Tokens]
  sample: Callable[[chex.PRNGKey], Any] | None = None
  reward: Callable[[Any, chex.Array, chex.Array], chex.Array] | None = None
  host: HostSide | None = None
  success: float = 1.0
  solution: Callable[[Any], Solution] | None = None
  well_formed: Callable[[Any, chex.Array, chex.Array], chex.Array] | None = None
  solution_length: int = 0
  draft: Callable[[Any, chex.Array, chex.Array, int], chex.Array] | None = None
  shown: Callable[[str], str] = str

  def __post_init__(self):
    missing = [name for name in ('sample', 'reward') if getattr(self, name) is None]
    if len(missing) != (0 if self.host is None else 2):
      raise ValueError('task: needs sample and reward, or host in place of both; '
                       f'{"missing: " + ", ".join(missing) if self.host is None else "both are given"}.')


class ProblemSet(NamedTuple):
  """A set of test problems.

  Attributes:
    task: the task that the problems belong to.
    problems: PyTree of arrays with a leading axis B.
    key: PRNG key for sampled responses.
    labels: column -> value that identifies the set in tables.
  """

  task: Task
  problems: Any
  key: chex.PRNGKey
  labels: dict[str, Any]


class NamedSet(NamedTuple):
  """What reports say about a set of test problems.

  Attributes:
    meaning: what it contains, in a few words.
    most: the number of its problems; None if there are as many as one likes.
  """

  meaning: str
  most: int | None = None


def stop_after(patterns: Sequence[Sequence[int]], stop_tokens: Sequence[int] = ()) -> np.ndarray:
  """Makes the automaton that ends an episode once all `patterns` have occurred, in this order.

  Any tokens may stand between two patterns. Entry `[state, token]` is the next state; the last column stands for every
  greater token id. An episode starts in state 0 and ends in state `num_states`, which has no row of its own.

  Args:
    patterns: token sequences, none empty; `[[eos_id]]` for an end-of-sequence token alone.
    stop_tokens: tokens that end the episode in any state, padding for example.

  Returns:
    int32 `[num_states, num_columns]`: the summed length of the patterns, and the greatest token id named here plus 2.

  Raises:
    ValueError: if there is no pattern or an empty one.
  """
  if not patterns or any(len(pattern) == 0 for pattern in patterns):
    raise ValueError(f'patterns: expected at least one, none of them empty; got {patterns!r}.')
  num_columns = int(max(*(max(pattern) for pattern in patterns), *stop_tokens, 0)) + 2
  tables, first = [], 0
  for pattern in patterns:
    tables.append(first + _match_automaton([int(token) for token in pattern], num_columns))
    first += len(pattern)
  automaton = np.concatenate(tables).astype(np.int32)
  automaton[:, list(stop_tokens)] = first
  return automaton


def _match_automaton(pattern: list[int], num_columns: int) -> np.ndarray:
  """Makes the transitions `[len(pattern), num_columns]` of Knuth, Morris and Pratt; a state is the length of the
  longest prefix of the pattern that ends the text."""
  table = np.zeros((len(pattern), num_columns), np.int64)
  for state, wanted in enumerate(pattern):
    for token in set(pattern):
      seen = pattern[:state] + [token]
      table[state, token] = max(n for n in range(len(seen) + 1) if seen[len(seen) - n:] == pattern[:n])
    table[state, wanted] = state + 1
  return table


def successes(task: Task, rewards: chex.Array) -> chex.Array:
  """Returns float32 1 where a reward reaches the task's `success`, else 0; NumPy for NumPy rewards, JAX for JAX."""
  return (rewards >= task.success).astype('float32')


def check_vocabulary(task: Task, vocab_size: int) -> None:
  """Checks that a task and a model have the same vocabulary size.

  Raises:
    ValueError: if they differ; if the model's is larger, the message says how to pad the vocabulary of the task.
  """
  own = task.tokenizer.vocab_size
  if own != vocab_size:
    padding = f', or pad the vocabulary of the task: CharTokenizer(alphabet, vocab_size={vocab_size})'
    raise ValueError(f'vocab_size: the task has {own} tokens, got a model of {vocab_size}; take a model of {own}'
                     f'{padding if own < vocab_size else ""}.')


def knows_critical_tokens(task: Task) -> bool:
  """Returns whether the solutions of a task mark critical tokens; only shapes are traced, of a problem on the host."""
  if task.solution is None:
    return False
  if task.host is not None:
    problem = jax.tree.map(lambda x: x[0], task.host.draw((0,), 0, 1))
    return jax.eval_shape(task.solution, problem).critical is not None
  return jax.eval_shape(lambda key: task.solution(task.sample(key)), jax.random.key(0)).critical is not None


def right_solutions(task: Task, problems: Any) -> Solution | None:
  """Returns the right solutions `[B, T]` of problems; None if the task has none."""
  return None if task.solution is None else jax.vmap(task.solution)(problems)


def critical_tokens(task: Task, problems: Any, rollout: Rollout) -> chex.Array | None:
  """Returns the mask, bool `[B, T]`, of critical tokens on the right path (`on_path`); None if the task marks none."""
  solutions = right_solutions(task, problems)
  if solutions is None or solutions.critical is None:
    return None
  return on_path(task, problems, rollout) & solutions.critical


def on_path(task: Task, problems: Any, rollout: Rollout) -> chex.Array:
  """Returns the mask, bool `[B, T]`, of tokens before which a response equals the right solution.

  The mask includes the first wrong token, and ends where response or solution ends. The task must have solutions.
  """
  solution = jax.vmap(task.solution)(problems)
  same = (rollout.actions == solution.tokens) & solution.mask
  before = jnp.cumprod(jnp.pad(same[:, :-1], ((0, 0), (1, 0)), constant_values=True), axis=1)
  return (before > 0) & rollout.mask & solution.mask
