"""Results of a study: metrics of each run, of each arm, and of the contrasts between arms, with intervals."""

import collections
import itertools
from typing import Any

import numpy as np

from critkl_jax.analysis.intervals import clip_interval, of_difference, of_share, share_interval
from critkl_jax.analysis.statistics import (
  area_under_curve,
  count_pairs,
  paired_statistics,
  problem_statistics,
  seed_statistics,
  smooth,
  steps_to_target,
)
from critkl_jax.runtime.failure_signatures import signatures, unmoved
from critkl_jax.studies.catalog import Study, reference_key, reference_name
from critkl_jax.studies.measures import CRITICAL_PROBLEMS
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.records import Record, RecordError
from critkl_jax.training.config import FinetuneConfig

TARGETS = (0.5, 0.8, 0.9)  # sampled accuracies on N + k for the metrics `episodes_to_...`
# name -> (label, whether it is a share, which is shown in points)
FIGURES = {
    'greedy': ('greedy accuracy, N+k', True),
    'sampled': ('sampled accuracy, N+k', True),
    'greedy_known': ('greedy accuracy, N', True),
    'sampled_known': ('sampled accuracy, N', True),
    'area': ('area under the learning curve', True),
    **{f'episodes_to_{100 * target:.0f}': (f'episodes to {100 * target:.0f} %', False) for target in TARGETS},
    'critical_probability': ('probability of the right critical token', True),
    'kl_critical': ('KL at critical tokens, N+k', False),
    'kl_other': ('KL at other tokens, N+k', False),
    'kl_known': ('KL at tokens of N', False),
    'format_errors': ('format errors, N+k', True),
    'reward': ('mean reward of sampled answers, N+k', True),
    'reward_known': ('mean reward of sampled answers, N', True),
    'paid': ('penalty paid for a nat of KL', False),
}
_OF_PROBLEMS = {'greedy': ('longer', 'greedy'), 'sampled': ('longer', 'sampled'), 'greedy_known': ('N', 'greedy'),
                'sampled_known': ('N', 'sampled'), 'critical_probability': ('longer', 'critical_probability')}


def run_figures(record: Record, reference: Record) -> dict[str, np.ndarray]:
  """Computes the metrics of a run: accuracies `[B]`, one for each problem, and probabilities; other metrics `[]`.

  The learning curve is the accuracy of the rollouts, followed by the sampled accuracy of the test. Targets are sought
  in the smoothed curve, which starts at the reference's sampled accuracy if `comparable`; a run that never reaches a
  target counts with all of its episodes. `paid` is the effective coefficient.

  Raises:
    RecordError: if a record is from an older version, without the metrics of the test.
  """
  for one in (record, reference):
    if 'critical_probability' not in one.longer:
      raise RecordError(f'{one.name}: its record is of an older version; remove it, and it is made again.')
  test, config = {'N': record.test['N'], 'longer': record.longer}, record.config
  figures = {name: np.asarray(test[digits][kind], np.float64) for name, (digits, kind) in _OF_PROBLEMS.items()}
  accuracy = _learning_curve(record)
  episodes = np.arange(accuracy.size) * float(config.episodes)
  reached = {f'episodes_to_{100 * target:.0f}': min(float(steps_to_target(
      episodes, _smooth_curve(record, reference), target)), episodes[-1]) for target in TARGETS}
  numbers = {'area': float(area_under_curve(episodes, accuracy)), **reached,
             'paid': 0.0 if config.loss.kl == 'none' else config.loss.kl_coefficient * record.paid,
             'kl_critical': test['longer']['kl_critical'], 'kl_other': test['longer']['kl_other'],
             'kl_known': test['N']['kl_other'], 'format_errors': test['longer']['format_errors'],
             **{name: test[where].get('reward', np.mean(test[where]['sampled'], dtype=np.float64))
                for name, where in (('reward', 'longer'), ('reward_known', 'N'))}}
  return figures | {name: np.asarray(value, np.float64) for name, value in numbers.items()}


def _kinds(records):
  """Returns the probability of the right token at each kind of critical token that all records have.

  Taken at the `start`, `after_one` iteration and `before_last` update.
  """
  found = {}
  first = records[0].metrics[0] if records[0].metrics else {}
  names = [name.removeprefix('critical/') for name in first if name.startswith('critical/')]
  for kind in (*(name for name in names if name not in ('kl', 'probability')), 'probability'):
    columns = np.array([one.column(f'critical/{kind}') for one in records])
    if columns.shape[1] > 1 and not np.isnan(columns).any():
      found[kind] = {place: of_share(seed_statistics(columns[:, i])['mean'], CRITICAL_PROBLEMS)
                     for place, i in (('start', 0), ('after_one', 1), ('before_last', -1))}
  return found


def run_signatures(record: Record, reference: Record | None) -> list[str]:
  """Names the failure signatures of a run.

  `no_exploration` is judged by the tests of run and reference if they are `comparable`, else by the probe; without both
  it is left out.
  """
  found = signatures(record.metrics)
  if reference is not None and comparable(record, reference):
    before, after = (one.longer['critical_probability'].mean() for one in (reference, record))
    found['no_exploration'] = unmoved(before, after)
  elif np.isnan(record.column('critical/probability')).all():
    found.pop('no_exploration', None)
  return [name for name, seen in found.items() if seen]


def comparable(record: Record, other: Record) -> bool:
  """Tells whether sampled answers and probabilities of two runs are comparable, i.e. at the same temperature."""
  configs = [FinetuneConfig() if one.config is None else one.config for one in (record, other)]
  return configs[0].loss.temperature == configs[1].loss.temperature


def _learning_curve(record):
  return np.append(record.column('accuracy'), record.longer['sampled'].mean())


def _smooth_curve(record, reference):
  curve = _learning_curve(record)
  if comparable(record, reference):
    curve[0] = reference.longer['sampled'].mean()
  return smooth(curve)


def _reached(records, reference):
  """Counts the learning curves that reach each target."""
  tops = np.array([_smooth_curve(one, reference).max() for one in records])
  return {f'{100 * target:.0f}': int((tops >= target).sum()) for target in TARGETS}


def study_results(study: Study, plan: Plan, references: dict[str, Record]) -> dict[str, Any]:
  """Computes the results of a study from its finished runs.

  Args:
    study: the study.
    plan: plan of its runs.
    references: `catalog.reference_key` of an arm -> record of its reference; those that do not exist yet are missing.

  Returns:
    Plain JSON, except that missing values and bounds are NaN:
    `question`, `counterpart`, `primary_metrics`, `unit`, `extra` (k), `num_missing` runs;
    `references`, for each name its `known` (N), `num_problems` and metrics;
    `arms`, for each label its `changes` in words, the name of its `reference`, its `seeds`, `figures` (metric ->
    `seed_statistics`), the `gain` in greedy accuracy over its reference (`paired_statistics`), the number of runs that
    `reached` each target (in percent), `signatures` (name -> number of runs), `compares_with_reference` (see
    `comparable`), `critical_kinds`, and the `mean_weight` of the penalty;
    `contrasts`, rows with `arm`, `against`, `seeds` and `figures` (metric -> `paired_statistics`, with `count_pairs` as
    `pairs`); `runs`, a row for each; `commits`, `devices` and `seconds`, the runs' times summed.
  """
  records = plan.records(study)
  names = {arm.label: reference_key(arm) for arm in study.arms}
  figures = {label: {seed: run_figures(one, references[names[label]]) for seed, one in own.items()}
             for label, own in records.items()}
  every = [one for own in records.values() for one in own.values()]
  most = _most(every)
  seen = {label: {seed: run_signatures(one, references[names[label]]) for seed, one in own.items()}
          for label, own in records.items()}
  arms = {label: {'reference': names[label], 'changes': _changes(study, label),
                  **_arm(own, figures[label], references[names[label]], seen[label], most)}
          for label, own in records.items() if own}
  contrasts = [_contrast(arm, against, records, figures, most) for arm, against in study.contrasts
               if figures[arm].keys() & figures[against].keys()]
  return {
      'study': study.name, 'primary_metrics': study.primary_metrics, 'note': study.note,
      'question': study.question, 'counterpart': study.counterpart,
      'unit': plan.unit, 'extra': plan.extra, 'num_missing': plan.number_missing(study),
      'references': {name: _reference(one) for name, one in references.items() if name in names.values()},
      'arms': arms, 'contrasts': contrasts,
      'runs': [_row(label, seed, records[label][seed], figures[label][seed], seen[label][seed])
               for label in records for seed in records[label]],
      'commits': sorted({one.about['commit'] for one in every}),
      'devices': sorted({one.about['device'] for one in every}),
      'seconds': sum(one.about['seconds'] + one.about['test_seconds'] for one in every)}


def _arm(records, figures, reference, seen, most):
  every, rewards = list(records.values()), np.stack([one['greedy'] for one in figures.values()])
  before = np.broadcast_to(np.asarray(reference.longer['greedy'], np.float64), rewards.shape)
  counts = dict(collections.Counter(itertools.chain(*seen.values())))
  return {'seeds': list(records), 'reached': _reached(every, reference), 'signatures': counts,
          'compares_with_reference': comparable(every[0], reference),
          'gain': _bounded_difference('greedy', paired_statistics(rewards, before), rewards.shape[1], most),
          'mean_weight': float(np.mean([one.column('weight').mean() for one in every])),
          'critical_kinds': _kinds(every),
          'figures': {name: _bounded(name, seed_statistics(np.stack([one[name] for one in figures.values()])),
                                     rewards.shape[1], most) for name in FIGURES}}


def _changes(study, label):
  """Describes in words the changes of an arm to the preset."""
  arm = next(arm for arm in study.arms if arm.label == label)
  parts = [f'{name}={value}' for name, value in arm.changes.items()]
  parts += [f'{name} times {factor:g}' for name, factor in arm.times.items()]
  parts += [f'kl_coefficient from {arm.matches}, equal {arm.by}'] if arm.matches else []
  parts += [f'certainty with {len(arm.ensemble)} further references'] if arm.ensemble else []
  parts += [f'reference {reference_name(arm.pretraining)}'] if arm.pretraining else []
  return ', '.join(parts) or 'the preset itself'


def _most(records):
  """Returns the upper limit of each metric, name -> limit; the lower limit of all is 0."""
  most = {name: 1.0 if share else np.inf for name, (_, share) in FIGURES.items()}
  episodes = float(max((len(one.metrics) * one.config.episodes for one in records), default=np.inf))
  return most | {name: episodes for name in FIGURES if name.startswith('episodes_to_')}


def _bounded(name, statistics, number, most):
  """Clips the `seed_statistics` of a metric to its limits; intervals of shares get a width (`of_share`)."""
  share = FIGURES[name][1]
  return {kind: of_share(value, number) if share else clip_interval(value, 0.0, most[name])
          for kind, value in statistics.items()}


def _bounded_difference(name, statistics, number, most):
  """Like `_bounded`, for the `paired_statistics` of a metric."""
  share = FIGURES[name][1]
  return {kind: value if kind == 'improvement' else of_difference(value, number) if share else
          clip_interval(value, -most[name], most[name]) for kind, value in statistics.items()}


def _contrast(arm, against, records, figures, most):
  seeds = [seed for seed in figures[arm] if seed in figures[against]]
  number = figures[arm][seeds[0]]['greedy'].size
  pairs = {name: [np.stack([figures[label][seed][name] for seed in seeds]) for label in (arm, against)]
           for name in FIGURES}
  if not comparable(*(records[label][seeds[0]] for label in (arm, against))):
    for name in FIGURES.keys() - {'greedy', 'greedy_known'}:
      pairs[name] = [np.full_like(values, np.nan) for values in pairs[name]]
  return {'arm': arm, 'against': against, 'seeds': seeds,
          'figures': {name: _bounded_difference(name, paired_statistics(*pair), number, most)
                      | {'pairs': count_pairs(*pair)} for name, pair in pairs.items()}}


def _reference(record):
  test = {'N': record.test['N'], 'longer': record.longer}
  found = {}
  for name, (digits, kind) in _OF_PROBLEMS.items():
    values = np.asarray(test[digits][kind], np.float64)
    found[name] = (share_interval(values.sum(), values.size) if kind in ('greedy', 'sampled') else
                   of_share(problem_statistics(values), values.size))
  for name, own in (('reward', test['longer']), ('reward_known', test['N'])):
    if 'reward' in own:
      found[name] = float(own['reward']), np.nan, np.nan
  return found | {'known': record.known, 'num_problems': len(test['longer']['greedy'])}


def _row(label, seed, record, figures, seen):
  return {'name': record.name, 'arm': label, 'seed': seed, **{name: float(x.mean()) for name, x in figures.items()},
          'mean_weight': float(record.column('weight').mean()), 'signatures': ' '.join(seen),
          'seconds': record.about['seconds'], 'test_seconds': record.about['test_seconds'],
          'commit': record.about['commit']}
