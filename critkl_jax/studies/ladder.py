"""The ladder: a policy that has learned N + k digits is the reference from which N + 2k are learned, and so on.

A rung is a run. Its result becomes the reference of the next one if it answers at least half of the problems that were
new to it; else the climb ends there.
"""

import itertools
from typing import Any

import numpy as np

from critkl_jax import checkpoint
from critkl_jax.analysis.statistics import paired_statistics, seed_statistics
from critkl_jax.checkpoint import CheckpointError, CheckpointInfo
from critkl_jax.config import FinetuneConfig
from critkl_jax.studies.advance import run_path
from critkl_jax.studies.catalog import Arm, Study, arm_config, reference_name
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.records import Record
from critkl_jax.studies.references import references_path

LEAST = 0.5  # greedy accuracy on N + k from which on the climb goes on


def climb(plan: Plan, study: Study, arm: Arm, seed: int) -> list[tuple[FinetuneConfig, Record | None]]:
  """Returns the rungs of one climb from the lowest on, each with its record; the last one may be still to be run."""
  rungs, name = [], reference_name(arm.pretraining)
  for number in range(1, study.rungs + 1):
    config = arm_config(plan.base, arm, seed, reference=name)
    record = plan.find(config)
    rungs.append((config, record))
    if record is None or accuracy(record) < LEAST:
      break
    name = f'{study.name}-{arm.label.replace(" ", "_")}-seed={seed}-rung={number}'
  return rungs


def missing_rungs(plan: Plan, study: Study) -> list[FinetuneConfig]:
  """Returns the config of the rung that each climb that is not at its end has to run now.

  That is its next one, or the highest one below it from whose reference it can be run: records do without parameters,
  and what is to be climbed from is made again where these are gone.
  """
  found = []
  for seed in plan.seeds(study):
    for arm in study.arms:
      *below, (config, record) = climb(plan, study, arm, seed)
      if record is not None:
        continue
      for lower, done in reversed(below):
        if _has_reference(plan, config.reference) or run_path(plan.workdir, done.name).is_dir():
          break
        config = lower
      found.append(config)
  return found


def _has_reference(plan, name):
  return checkpoint.latest(references_path(plan.workdir, name) / 'reference') is not None


def top(rungs: list[tuple[FinetuneConfig, Record | None]]) -> Record | None:
  """Returns the highest rung of a climb that was reached, or the lowest that was tried; None if none was."""
  records = [record for _, record in rungs if record is not None]
  return next((one for one in reversed(records) if accuracy(one) >= LEAST), records[0] if records else None)


def promote(plan: Plan, study: Study, name: str) -> None:
  """Leaves the result of a finished rung as the reference of the next one, which knows k digits more.

  Args:
    plan: knows the runs.
    study: the ladder.
    name: of the reference that is needed; if it is no rung's, nothing is done.

  Raises:
    CheckpointError: if the parameters of a finished rung are gone.
  """
  for seed in plan.seeds(study):
    for arm in study.arms:
      rungs = climb(plan, study, arm, seed)
      for (_, record), (config, _) in itertools.pairwise(rungs):
        if config.reference == name:
          _promote(plan, record, references_path(plan.workdir, name) / 'reference')


def _promote(plan, record, home):
  if checkpoint.latest(home) is not None:
    return
  source = run_path(plan.workdir, record.name)
  if not source.is_dir():
    raise CheckpointError(f'{source}: the parameters of a rung are gone; it has to be run again.')
  own = checkpoint.load_checkpoint(source)
  info = CheckpointInfo(own.info.model, own.info.known_digits + plan.base.extra_digits, own.info.training)
  checkpoint.save_params(home, own.params, info, own.step)


def accuracy(record: Record) -> float:
  """Returns the greedy accuracy of a rung on the digits that were new to it."""
  return float(record.longer['greedy'].mean())


def ladder_results(plan: Plan, study: Study, kept: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Returns what the climbs say.

  Args:
    plan: knows the runs.
    study: the ladder.
    kept: of the `top` of each climb, by the name of its run, rows of `evaluate.accuracy_table`.

  Returns:
    `question`, `counterpart`, `note`, `rungs` at most, `num_missing` (climbs that are not at their end); `arms`, of
    each label its `seeds`, `reached`, the digits of the highest rung with an accuracy of `LEAST` (`seed_statistics`),
    `retained`, the mean accuracy on the lengths that the first reference knew, and `climbs`, of each seed rows with
    `digits`, `accuracy` and `accuracy_known`; `contrasts`, each with `seeds` and the paired `difference` in digits, and
    `rungs`, for each that some seed took in both arms its `digits`, those `seeds` and the `difference` in accuracy.
  """
  arms, reached, rewards, commits, seconds = {}, {}, {}, set(), 0.0
  for arm in study.arms:
    climbs, retained = {}, []
    for seed in plan.seeds(study):
      rungs = climb(plan, study, arm, seed)
      records = [record for _, record in rungs if record is not None]
      if not records:
        continue
      first = records[0].known_digits
      climbs[seed] = [{'digits': one.known_digits + plan.base.extra_digits, 'accuracy': accuracy(one),
                       'accuracy_known': float(one.test['N']['greedy'].mean()), 'name': one.name} for one in records]
      tops = [row['digits'] for row in climbs[seed] if row['accuracy'] >= LEAST]
      reached.setdefault(arm.label, {})[seed] = max(tops, default=first)
      for row, one in zip(climbs[seed], records):
        rewards.setdefault(row['digits'], {})[arm.label, seed] = one.longer['greedy']
      known = [row['accuracy'] for row in kept.get(top(rungs).name, []) if row['digits'] <= first]
      retained += [float(np.mean(known))] if known else []
      commits |= {one.about['commit'] for one in records}
      seconds += sum(one.about['seconds'] + one.about['test_seconds'] for one in records)
    if climbs:
      arms[arm.label] = {'seeds': list(climbs), 'climbs': climbs,
                         'reached': seed_statistics(np.array(list(reached[arm.label].values()), float))['mean'],
                         'retained': seed_statistics(np.array(retained))['mean'] if retained else None}
  contrasts = []
  for one, two in study.contrasts:
    seeds = [seed for seed in reached.get(one, {}) if seed in reached.get(two, {})]
    if seeds:
      pair = [np.array([reached[label][seed] for seed in seeds], float) for label in (one, two)]
      contrasts.append({'arm': one, 'against': two, 'seeds': seeds, **paired_statistics(*pair),
                        'rungs': _compare_rungs(one, two, seeds, rewards)})
  return {'study': study.name, 'rungs': study.rungs, 'question': study.question, 'counterpart': study.counterpart,
          'note': study.note, 'extra_digits': plan.base.extra_digits, 'num_missing': len(missing_rungs(plan, study)),
          'arms': arms, 'contrasts': contrasts, 'commits': sorted(commits), 'seconds': seconds}


def _compare_rungs(one, two, seeds, rewards):
  """Returns how the accuracy of two arms differs on each rung that some of the seeds took in both."""
  rows = []
  for digits, own in sorted(rewards.items()):
    shared = [seed for seed in seeds if (one, seed) in own and (two, seed) in own]
    if shared:
      pair = [np.array([own[label, seed] for seed in shared], float) for label in (one, two)]
      rows.append({'digits': digits, 'seeds': shared, 'difference': paired_statistics(*pair)['difference']})
  return rows
