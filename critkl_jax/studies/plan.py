"""What studies lack: the runs they ask for, those that are recorded, and the time that the others will take."""

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np

from critkl_jax import storage
from critkl_jax.config import FinetuneConfig
from critkl_jax.studies.advance import record_path
from critkl_jax.studies.catalog import STANDARD, Arm, Study, arm_config
from critkl_jax.studies.records import Record, RecordError, read_record, run_name

SECONDS_PER_RUN = 80.0  # of `tiny`, on two CPU cores (docs/log.md)


def matched_scale(found: Record, standard: Record | None, by: str) -> float:
  """Returns by what the coefficient of a uniform penalty is multiplied to equal that of a weighted one.

  `weight`: by the mean weight. The weight is lowest where the KL is greatest, so that what is paid falls by much more;
  `penalty`: by the sum over iterations of the weighted KL over that of the exact KL, and this divided by the same of
  the standard penalty, where it tells of the estimator alone.

  Args:
    found: record of the weighted penalty's run.
    standard: that of the standard penalty's, of the same seed; only `penalty` needs it.
    by: `weight` or `penalty`.

  Returns:
    The factor; no finite number if a policy never left its reference.
  """
  if by == 'weight':
    return float(np.mean(found.column('weight')))
  with np.errstate(divide='ignore', invalid='ignore'):
    return float(np.divide(found.paid, standard.paid))


@dataclasses.dataclass(frozen=True)
class Plan:
  """The runs of some studies under one workdir.

  Attributes:
    base: the config from which the arms depart.
    workdir: of runs and studies.
    num_seeds: seeds of each arm; each study's own number if None.
  """

  base: FinetuneConfig
  workdir: pathlib.Path
  num_seeds: int | None = None

  def seeds(self, study: Study) -> range:
    """Returns the seeds of a study's arms."""
    return range(self.base.seed, self.base.seed + (self.num_seeds or study.num_seeds))

  def record(self, study: Study, arm: Arm, seed: int) -> Record | None:
    """Returns the record of a run, None if there is none yet.

    Raises:
      RecordError: if the file of that name is damaged or of another run.
    """
    config = self.config(study, arm, seed)
    return None if config is None else self.find(config)

  def find(self, config: FinetuneConfig) -> Record | None:
    """Returns the record of the run of a config, None if there is none yet; raises as `record` does."""
    path = record_path(self.workdir, run_name(config, self.base))
    if not path.is_file():
      return None
    found = read_record(path)
    if run_name(found.config, self.base) != path.stem:
      raise RecordError(f'{path}: of another run ({run_name(found.config, self.base)}).')
    return found

  def config(self, study: Study, arm: Arm, seed: int) -> FinetuneConfig | None:
    """Returns the config of a run; None if it follows from a run that is not there yet, or one that paid no penalty."""
    if not arm.matches:
      return arm_config(self.base, arm, seed)
    matched = next(other for other in study.arms if other.label == arm.matches)
    standard = next(other for other in study.arms if other.label == STANDARD)
    found, plain = self.record(study, matched, seed), self.record(study, standard, seed)
    if found is None or (arm.by == 'penalty' and plain is None):
      return None
    scale = matched_scale(found, plain, arm.by)
    return arm_config(self.base, arm, seed, scale) if np.isfinite(scale) else None

  def records(self, study: Study) -> dict[str, dict[int, Record]]:
    """Returns label -> seed -> record of the runs that are there."""
    found = {arm.label: {seed: self.record(study, arm, seed) for seed in self.seeds(study)} for arm in study.arms}
    return {label: {seed: one for seed, one in own.items() if one is not None} for label, own in found.items()}

  def has_runs(self, study: Study, arm: Arm) -> bool:
    """Returns whether there is a record of an arm."""
    return any(self.record(study, arm, seed) is not None for seed in self.seeds(study))

  def missing(self, studies: Iterable[Study]) -> list[FinetuneConfig]:
    """Returns the configs of the runs that can be made now, each once, those of one seed side by side; those of ladders
    are `ladder.missing_runs`."""
    wanted = {}
    for study in (study for study in studies if study.reads == 'runs'):
      for seed in self.seeds(study):
        for arm in study.arms:
          config = self.config(study, arm, seed)
          if config is not None and not record_path(self.workdir, run_name(config, self.base)).is_file():
            wanted.setdefault(run_name(config, self.base), config)
    return list(wanted.values())

  def number_missing(self, study: Study) -> int:
    """Returns how many runs a study lacks, those among them that follow from others; a study of tokens is one run."""
    if study.reads == 'tokens':
      file = self.workdir / 'studies' / study.name / 'results.json'
      return int(not file.is_file() or storage.read_json(file).get('sets') != len(self.seeds(study)))
    return sum(self.record(study, arm, seed) is None for arm in study.arms for seed in self.seeds(study))

  def seconds_per_run(self) -> float | None:
    """Returns the mean time of some runs under the workdir; None if there is none."""
    found = [read_record(path).about for path in sorted((self.workdir / 'runs').glob('*.json'))[:32]]
    return float(np.mean([one['seconds'] + one['test_seconds'] for one in found])) if found else None
