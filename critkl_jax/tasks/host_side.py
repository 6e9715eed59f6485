"""The part of a task that runs in Python on the host: prompts of any length, and rewards that read text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from critkl_jax.tasks.rewards.pool import RewardPool


class Answers(NamedTuple):
  """Responses as reward functions read them: n entries each.

  Attributes:
    prompts: texts, or lists of messages.
    completions: the same.
    columns: name -> n values of the prompts' rows.
    rows: number of each prompt's row, from 1.
  """

  prompts: list[Any]
  completions: list[Any]
  columns: dict[str, list[Any]]
  rows: list[int]


@dataclasses.dataclass(frozen=True)
class HostSide:
  """What a task does on the host, in place of `Task.sample` and `Task.reward`.

  Attributes:
    draw: (seed, first, number) -> `number` problems from position `first` of an endless sequence; the seed, whole
      numbers, fixes the sequence. A PyTree of NumPy arrays with a leading axis. Prompts are padded to one of a few
      lengths, so that few programs are compiled.
    read: (problems, actions `[B, T]`, mask `[B, T]`) -> `Answers`, all arguments NumPy arrays.
    functions: name -> reward function, or its name `module:function`.
    weights: name -> weight; the reward is the weighted sum of the values.
    columns: names of the columns that functions may ask for.
  """

  draw: Callable[[Sequence[int], int, int], Any]
  read: Callable[[Any, np.ndarray, np.ndarray], Answers]
  functions: dict[str, Callable | str]
  weights: dict[str, float]
  columns: tuple[str, ...] = ()


def rewarded(host: HostSide, problems: Any, actions: chex.Array, mask: chex.Array, pool: RewardPool | None = None
             ) -> tuple[np.ndarray, dict[str, np.ndarray], Answers]:
  """Rewards B responses.

  Args:
    host: gives the functions.
    problems: their problems, with a leading axis B.
    actions: `[B, T]`.
    mask: bool `[B, T]`.
    pool: runs the functions; None to call them in this process.

  Returns:
    The rewards, float32 NumPy `[B]`; the values of each function, float64 `[B]`; and the texts.

  Raises:
    RewardError: as `RewardPool`.
  """
  answers = host.read(problems, np.asarray(actions), np.asarray(mask))
  values = (pool or RewardPool())(host.functions, *answers)
  total = sum(host.weights[name] * value for name, value in values.items())
  return np.asarray(total, np.float32), values, answers
