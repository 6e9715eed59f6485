"""The ladder: a policy that has learned N + k digits becomes the reference for learning N + 2k digits, and so on.

A rung is a number of digits, and each run is a try at a rung; its result is the reference of the next run. If it
answers at least `LEAST` of the rung's problems, the next run tries the next rung, else the same one again. The
climb ends with the first try that neither reaches its rung nor gains `GAIN`.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from critkl_jax.analysis.intervals import of_difference, of_share
from critkl_jax.analysis.statistics import paired_statistics, seed_statistics
from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.checkpoint import CheckpointError, CheckpointInfo
from critkl_jax.studies.catalog import Arm, Study, arm_config, reference_name
from critkl_jax.studies.plan import Plan
from critkl_jax.studies.records import Record
from critkl_jax.studies.references import references_path
from critkl_jax.studies.results import run_signatures
from critkl_jax.studies.study_runs import run_path
from critkl_jax.training.config import FinetuneConfig

LEAST = 0.5  # greedy accuracy on N + k digits at which a rung is reached
GAIN = 0.05  # accuracy that a try must gain over the try before it (over 0 for the first) to be followed by another


def climb(plan: Plan, study: Study, arm: Arm, seed: int) -> list[tuple[FinetuneConfig, Record | None]]:
  """Returns the runs of one climb in order, each with its record; the last record is None if that run is missing."""
  runs, name, rung, tries, before = [], reference_name(arm.pretraining), 1, 0, 0.0
  while rung <= study.rungs:
    config = arm_config(plan.base, arm, seed, reference=name)
    record = plan.find(config)
    runs.append((config, record))
    if record is None or (not reached(record) and accuracy(record) < before + GAIN):
      break
    name = f'{study.name}-{arm.label.replace(" ", "_")}-seed={seed}-rung={rung}'
    if reached(record):
      rung, tries, before = rung + 1, 0, 0.0
    else:
      tries, before = tries + 1, accuracy(record)
      name += f'-try={tries}'
  return runs


def missing_runs(plan: Plan, study: Study) -> list[FinetuneConfig]:
  """Returns the config of the run that each unfinished climb needs now.

  That is its next run; or, if the parameters of its reference are gone (records outlive them), the highest earlier run
  that can start.
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


def top(runs: list[tuple[FinetuneConfig, Record | None]]) -> Record | None:
  """Returns the record of the run that reached a climb's highest rung, or of its first run; None without runs."""
  records = [record for _, record in runs if record is not None]
  return next((one for one in reversed(records) if reached(one)), records[0] if records else None)


def promote(plan: Plan, study: Study, name: str) -> None:
  """Saves the result of a finished run as the next run's reference; it knows k digits more if its rung was reached.

  Args:
    plan: plan of the runs.
    study: the ladder.
    name: name of the needed reference; nothing happens if no climb has it.

  Raises:
    CheckpointError: if the parameters of a finished run are gone.
  """
  for seed in plan.seeds(study):
    for arm in study.arms:
      runs = climb(plan, study, arm, seed)
      for (_, record), (config, _) in itertools.pairwise(runs):
        if config.reference == name:
          _promote(plan, record, references_path(plan.workdir, name) / 'reference')


def _promote(plan, record, home):
  if checkpoint.latest(home) is not None:
    return
  source = run_path(plan.workdir, record.name)
  if not source.is_dir():
    raise CheckpointError(f'{source}: the parameters of a run are gone; it has to be run again.')
  own = checkpoint.load_checkpoint(source)
  known = record.known + (plan.base.addition.extra_digits if reached(record) else 0)
  task = dataclasses.replace(own.info.task, known_digits=known)
  info = CheckpointInfo(own.info.model, task, own.info.training)
  checkpoint.save_params(home, own.params, info, own.step)


def accuracy(record: Record) -> float:
  """Returns the greedy accuracy of a run on its rung's number of digits."""
  return float(record.longer['greedy'].mean())


def reached(record: Record) -> bool:
  """Tells whether a run reached its rung."""
  return accuracy(record) >= LEAST


def ladder_results(plan: Plan, study: Study, kept: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Computes the results of a ladder: digits reached by each arm, and contrasts between arms.

  Args:
    plan: plan of the runs.
    study: the ladder.
    kept: for the `top` run of each climb, by its name, rows of `evaluation.accuracies`.

  Returns:
    `question`, `counterpart`, `note`; `rungs`, the most there are; `num_missing`, the number of unfinished climbs.
    `arms`, for each label: `seeds`; `reached`, the digits of the highest rung with an accuracy of `LEAST`
    (`seed_statistics`); `retained`, the mean accuracy on the lengths that the first reference knew; `climbs`, seed ->
    a row for each run with `digits`, `accuracy`, `accuracy_known` and the failure `signatures`.
    `contrasts`: `seeds`; the paired `difference` in digits; `rungs`, a row for each rung that at least one seed tried
    in both arms, with its `digits`, these `seeds`, and the `difference` in accuracy of their last tries.
  """
  arms, highest, rewards, commits, seconds = {}, {}, {}, set(), 0.0
  for arm in study.arms:
    climbs, retained, numbers = {}, [], []
    for seed in plan.seeds(study):
      runs = climb(plan, study, arm, seed)
      records = [record for _, record in runs if record is not None]
      if not records:
        continue
      first = records[0].known
      climbs[seed] = [{'digits': one.known + plan.base.addition.extra_digits, 'accuracy': accuracy(one),
                       'accuracy_known': float(one.test['N']['greedy'].mean()), 'name': one.name,
                       'signatures': ' '.join(run_signatures(one, None))}
                      for one in records]
      tops = [row['digits'] for row in climbs[seed] if row['accuracy'] >= LEAST]
      highest.setdefault(arm.label, {})[seed] = max(tops, default=first)
      for row, one in zip(climbs[seed], records):  # the last try of a rung overwrites earlier ones
        rewards.setdefault(row['digits'], {})[arm.label, seed] = one.longer['greedy']
      known = [row for row in kept.get(top(runs).name, []) if row['digits'] <= first]
      retained += [float(np.mean([row['accuracy'] for row in known]))] if known else []
      numbers += [sum(row['num_problems'] for row in known)]
      commits |= {one.about['commit'] for one in records}
      seconds += sum(one.about['seconds'] + one.about['test_seconds'] for one in records)
    if climbs:
      arms[arm.label] = {'seeds': list(climbs), 'climbs': climbs,
                         'reached': seed_statistics(np.array(list(highest[arm.label].values()), float))['mean'],
                         'retained': of_share(seed_statistics(np.array(retained))['mean'], max(numbers))
                         if retained else None}
  contrasts = []
  for one, two in study.contrasts:
    seeds = [seed for seed in highest.get(one, {}) if seed in highest.get(two, {})]
    if seeds:
      pair = [np.array([highest[label][seed] for seed in seeds], float) for label in (one, two)]
      contrasts.append({'arm': one, 'against': two, 'seeds': seeds, **paired_statistics(*pair),
                        'rungs': _compare_rungs(one, two, seeds, rewards)})
  return {'study': study.name, 'rungs': study.rungs, 'question': study.question, 'counterpart': study.counterpart,
          'note': study.note, 'extra_digits': plan.base.addition.extra_digits,
          'num_missing': len(missing_runs(plan, study)), 'arms': arms, 'contrasts': contrasts,
          'commits': sorted(commits), 'seconds': seconds}


def _compare_rungs(one, two, seeds, rewards):
  """Compares the accuracy of two arms on each rung that at least one seed tried in both."""
  rows = []
  for digits, own in sorted(rewards.items()):
    shared = [seed for seed in seeds if (one, seed) in own and (two, seed) in own]
    if shared:
      pair = [np.array([own[label, seed] for seed in shared], float) for label in (one, two)]
      difference = of_difference(paired_statistics(*pair)['difference'], pair[0].shape[1])
      rows.append({'digits': digits, 'seeds': shared, 'difference': difference})
  return rows
