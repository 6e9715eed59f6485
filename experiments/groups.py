"""The members of a sweep by groups that differ in the seed alone, and what the groups' tests say."""

import dataclasses
from typing import Any

import numpy as np

from critkl_jax import config, population
from critkl_jax.analysis.statistics import paired_difference, seed_statistics
from critkl_jax.config import FinetuneConfig
from critkl_jax.intervals import of_difference, of_share


@dataclasses.dataclass(frozen=True)
class Group:
  """The members that differ in the seed alone.

  Attributes:
    label: what is the group's own.
    config: of its first member.
    members: their indices.
  """

  label: str
  config: FinetuneConfig
  members: tuple[int, ...]


def groups_of(configs: tuple[FinetuneConfig, ...]) -> list[Group]:
  """Returns the groups in the order of their first members."""
  found: dict[FinetuneConfig, list[int]] = {}
  for i, member in enumerate(configs):
    found.setdefault(config.replace(member, seed=configs[0].seed), []).append(i)
  own = population.differences(configs)
  return [Group(' '.join(f'{name}={value}' for name, value in own[some[0]].items() if name != 'seed') or 'all',
                member, tuple(some)) for member, some in found.items()]


def is_standard(member: FinetuneConfig) -> bool:
  """Returns whether a penalty weighs all tokens alike."""
  return member.loss.kl == 'standard' or (member.loss.kl == 'prioritized' and member.loss.certainty_exponent == 0)


def baseline_of(group: Group, groups: list[Group]) -> Group | None:
  """Returns the group that is like another but for a standard penalty; None if there is none, or it is the group."""
  def key(member):
    return config.replace(member, kl='standard', certainty_exponent=0.0, certainty_intercept=0.0)

  like = [other for other in groups if is_standard(other.config) and key(other.config) == key(group.config)]
  return like[0] if like and like[0] is not group else None


def compare(groups: list[Group], tests, name: str) -> list[dict[str, Any]]:
  """Returns a row for each group: mean accuracy on `name` and its paired difference from the standard penalty, both
  with their intervals, None for too few seeds, and of each run, or pair of runs, by seed."""
  rows = []
  for group in groups:
    rewards = {g.label: np.stack([tests[i][1][name] for i in g.members]) for g in groups}
    own = rewards[group.label]
    accuracy, *interval = without_nan(of_share(seed_statistics(own)['mean'], own.shape[1]))
    row = {'group': group.label, 'members': len(group.members), 'accuracy': accuracy, 'accuracy_interval': interval,
           'accuracies': own.mean(1).tolist()}
    baseline = baseline_of(group, groups)
    if baseline is not None:
      mean, low, high = without_nan(of_difference(paired_difference(own, rewards[baseline.label]), own.shape[1]))
      row |= {'baseline': baseline.label, 'difference': mean, 'low': low, 'high': high,
              'differences': (own - rewards[baseline.label]).mean(1).tolist()}
    rows.append(row)
  return rows


def without_nan(value: tuple[float, float, float]) -> list[float | None]:
  """Returns `(value, low, high)` with None for bounds that there are not."""
  return [None if np.isnan(x) else x for x in value]
