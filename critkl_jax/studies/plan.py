"""The runs that studies need: which are recorded, which are missing, and how long they take."""

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np

from critkl_jax.runtime import storage
from critkl_jax.studies.catalog import Arm, Study, arm_config
from critkl_jax.studies.records import Record, RecordError, read_record, run_name
from critkl_jax.studies.study_runs import record_path
from critkl_jax.tasks.known_tasks import KNOWN_TASKS
from critkl_jax.training.config import FinetuneConfig

SECONDS_PER_RUN = 80.0  # for `tiny` on two CPU cores (docs/log.md)


def matched_scale(found: Record, standard: Record | None, by: str) -> float:
  """Computes the factor of the KL coefficient that matches a uniform penalty to a weighted one.

  `weight` matches the mean weight. `penalty` matches the effective coefficient: the weighted KL over the exact KL, both
  summed over iterations. It is divided by the same ratio of the standard penalty, which corrects for the estimator.
  The effective coefficient is much lower than the mean weight, since weights are lowest where the KL is greatest.

  Args:
    found: record of the weighted penalty's run.
    standard: record of the standard penalty's run with the same seed; only `penalty` needs it.
    by: `weight` or `penalty`.

  Returns:
    The factor; not finite if a policy never left its reference.
  """
  if by == 'weight':
    return float(np.mean(found.column('weight')))
  with np.errstate(divide='ignore', invalid='ignore'):
    return float(np.divide(found.paid, standard.paid))


@dataclasses.dataclass(frozen=True)
class Plan:
  """The runs of studies under one workdir.

  Attributes:
    base: the config to which the arms' changes are applied.
    workdir: directory of runs and studies.
    num_seeds: seeds of each arm; each study's own number if None.
  """

  base: FinetuneConfig
  workdir: pathlib.Path
  num_seeds: int | None = None

  @property
  def unit(self) -> str:
    """What the size of a problem counts: `digits` or `facts`."""
    return KNOWN_TASKS[self.base.task].unit

  @property
  def extra(self) -> int:
    """k: by how much the problems of training exceed the greatest size known from pre-training."""
    return self.base.stories.extra_facts if self.base.task == 'stories' else self.base.addition.extra_digits

  def seeds(self, study: Study) -> range:
    """Returns the seeds of a study's arms."""
    return range(self.base.seed, self.base.seed + (self.num_seeds or study.num_seeds))

  def record(self, study: Study, arm: Arm, seed: int) -> Record | None:
    """Returns the record of a run, or None if the run is missing.

    Raises:
      RecordError: if the file of that name is damaged or belongs to another run.
    """
    config = self.config(study, arm, seed)
    return None if config is None else self.find(config)

  def find(self, config: FinetuneConfig) -> Record | None:
    """Returns the record of a config's run, or None if the run is missing; raises as `record` does."""
    path = record_path(self.workdir, run_name(config, self.base))
    if not path.is_file():
      return None
    found = read_record(path)
    if run_name(found.config, self.base) != path.stem:
      raise RecordError(f'{path}: of another run ({run_name(found.config, self.base)}).')
    return found

  def config(self, study: Study, arm: Arm, seed: int) -> FinetuneConfig | None:
    """Returns the config of a run; None if its arm matches a run that is missing or has a penalty of 0."""
    if not arm.matches:
      return arm_config(self.base, arm, seed)
    matched = next(other for other in study.arms if other.label == arm.matches)
    standard = next((one for one in study.arms if one.changes == arm.changes and not one.matches), None)
    found, plain = self.record(study, matched, seed), standard and self.record(study, standard, seed)
    if found is None or (arm.by == 'penalty' and plain is None):
      return None
    scale = matched_scale(found, plain, arm.by)
    return arm_config(self.base, arm, seed, scale) if np.isfinite(scale) else None

  def records(self, study: Study) -> dict[str, dict[int, Record]]:
    """Returns the records that exist, label -> seed -> record."""
    found = {arm.label: {seed: self.record(study, arm, seed) for seed in self.seeds(study)} for arm in study.arms}
    return {label: {seed: one for seed, one in own.items() if one is not None} for label, own in found.items()}

  def has_runs(self, study: Study, arm: Arm) -> bool:
    """Tells whether an arm has at least one record."""
    return any(self.record(study, arm, seed) is not None for seed in self.seeds(study))

  def missing(self, studies: Iterable[Study]) -> list[FinetuneConfig]:
    """Returns the configs of the missing runs that can start now, without duplicates, seed by seed.

    Runs of ladders are in `ladder.missing_runs`.
    """
    wanted = {}
    for study in (study for study in studies if study.reads == 'runs'):
      for seed in self.seeds(study):
        for arm in study.arms:
          config = self.config(study, arm, seed)
          if config is not None and not record_path(self.workdir, run_name(config, self.base)).is_file():
            wanted.setdefault(run_name(config, self.base), config)
    return list(wanted.values())

  def number_missing(self, study: Study) -> int:
    """Counts the missing runs of a study, including runs that cannot start yet; a study of tokens counts as one."""
    if study.reads == 'tokens':
      file = self.workdir / 'studies' / study.name / 'results.json'
      return int(not file.is_file() or storage.read_json(file).get('sets') != len(self.seeds(study)))
    return sum(self.record(study, arm, seed) is None for arm in study.arms for seed in self.seeds(study))

  def seconds_per_run(self) -> float | None:
    """Returns the mean time of up to 32 runs under the workdir; None if there is none."""
    found = [read_record(path).about for path in sorted((self.workdir / 'runs').glob('*.json'))[:32]]
    return float(np.mean([one['seconds'] + one['test_seconds'] for one in found])) if found else None
