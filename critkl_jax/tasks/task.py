"""What a task is: a record of pure functions of one problem, each jittable and vmappable."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import numpy as np

from critkl_jax.records import Solution, Tokens
from critkl_jax.tokenizer import CharTokenizer


@dataclasses.dataclass(frozen=True)
class Task:
  """A reinforcement-learning task on text.

  Attributes:
    tokenizer: the vocabulary in which prompts and responses are written.
    prompt_length: Q, the fixed length of prompts.
    response_length: T, the fixed length of responses: the limit at which an episode is cut.
    stop: int32 `[S, V]` automaton that ends an episode, see `stop_after`.
    sample: key -> problem (any PyTree of arrays); the key is consumed.
    prompt: problem -> `Tokens` `[Q]`, padded on the left.
    solution: problem -> `Solution` `[T]`, padded on the right.
    reward: (problem, actions `[T]`, mask `[T]`) -> float32 `[]`, 1 for a right response and 0 for any other.
    well_formed: (actions `[T]`, mask `[T]`) -> bool `[]`, whether a response has the form of an answer, right or wrong.
      None where the task does not say.
    solution_length: no right response is longer; 0 if that is not known. Passes over episodes that keep to it do not
      pay for the longer limit.
    draft: (problem, actions `[T']`, number of actions `[]`, K) -> int32 `[K]`: what is expected to follow the first so
      many actions, -1 for nothing; it makes rollouts faster and changes nothing else. None where the task has no idea.
  """

  tokenizer: CharTokenizer
  prompt_length: int
  response_length: int
  stop: chex.Array
  sample: Callable[[chex.PRNGKey], Any]
  prompt: Callable[[Any], Tokens]
  solution: Callable[[Any], Solution]
  reward: Callable[[Any, chex.Array, chex.Array], chex.Array]
  well_formed: Callable[[chex.Array, chex.Array], chex.Array] | None = None
  solution_length: int = 0
  draft: Callable[[Any, chex.Array, chex.Array, int], chex.Array] | None = None


def stop_after(patterns: Sequence[Sequence[int]], stop_tokens: Sequence[int] = ()) -> np.ndarray:
  """Returns the automaton that ends an episode once `patterns` have been seen in a row, in order.

  Between two patterns any tokens may stand. Row `s`, column `v` holds the state that follows state `s` on token `v`;
  the last column stands for every greater token id. An episode starts in state 0 and ends in state `S` (the number of
  rows, which has no row of its own).

  Args:
    patterns: token sequences, none empty; an end-of-sequence token alone is `[[eos_id]]`.
    stop_tokens: tokens that end the episode in any state, padding for example.

  Returns:
    int32 `[S, C]` with S the summed length of the patterns and C the greatest token id named here plus 2.

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
  """Returns `[len(pattern), C]`: how long a prefix of the pattern ends the text, by Knuth, Morris and Pratt."""
  table = np.zeros((len(pattern), num_columns), np.int64)
  for state, wanted in enumerate(pattern):
    for token in set(pattern):
      seen = pattern[:state] + [token]
      table[state, token] = max(n for n in range(len(seen) + 1) if seen[len(seen) - n:] == pattern[:n])
    table[state, wanted] = state + 1
  return table
