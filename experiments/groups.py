"""Groups the members of a sweep that differ in the seed alone, and compares the accuracies of the groups."""

import dataclasses
from typing import Any

import numpy as np

from critkl_jax import config
from critkl_jax.analysis.intervals import of_difference, of_share
from critkl_jax.analysis.statistics import paired_difference, seed_statistics
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Group:
  """Members that differ in the seed alone.

  Attributes:
    label: the settings that distinguish the group.
    config: config of its first member.
    members: indices of its members.
  """

  label: str
  config: FinetuneConfig
  members: tuple[int, ...]


def groups_of(configs: tuple[FinetuneConfig, ...]) -> list[Group]:
  """Groups the members of a sweep, in the order of the first member of each group."""
  found: dict[FinetuneConfig, list[int]] = {}
  for i, member in enumerate(configs):
    found.setdefault(config.replace(member, seed=configs[0].seed), []).append(i)
  own = population.differences(configs)
  return [Group(' '.join(f'{name}={value}' for name, value in own[members[0]].items() if name != 'seed') or 'all',
                group_config, tuple(members)) for group_config, members in found.items()]


def is_standard(member: FinetuneConfig) -> bool:
  """Returns whether the KL penalty has the same weight at all tokens."""
  return member.loss.kl == 'standard' or (member.loss.kl == 'prioritized' and member.loss.certainty_exponent == 0)


def baseline_of(group: Group, groups: list[Group]) -> Group | None:
  """Returns the group with `group`'s settings and a standard penalty; None if there is none or it is `group`."""
  def with_penalty_of_group(member):
    own, others = config.counting_values(group.config), config.counting_values(member)
    penalty = {name: value for name, value in own.items()
               if name in ('kl', 'certainty_exponent', 'certainty_intercept') or name not in others}
    return config.replace(member, **penalty)

  standard = [other for other in groups if is_standard(other.config)]
  like = [other for other in standard if with_penalty_of_group(other.config) == group.config]
  return like[0] if like and like[0] is not group else None


def compare(groups: list[Group], tests, name: str) -> list[dict[str, Any]]:
  """Compares the groups of a sweep with the standard penalty.

  Args:
    groups: the groups.
    tests: for each member the pair `(result, right)` that `evaluation.make_test` returns.
    name: test set.

  Returns:
    A row for each group: mean accuracy, paired difference from the standard penalty, their intervals (None for too few
    seeds), and the values of each run, or pair of runs, by seed.
  """
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
  """Replaces NaN in `(value, low, high)` by None."""
  return [None if np.isnan(x) else x for x in value]
