"""Repeats the paper's experiments, and some that it lacks: runs what is missing, and writes what the runs say.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --study=prioritized_vs_standard --workdir=runs/studies

A run is made once, whatever studies ask for it; the same command goes on where it was stopped. Of each study
results.json, results.csv, pictures and a page, README.md, go to WORKDIR/studies/NAME.
"""

import pathlib
import sys
import time

import jax
from absl import flags

from critkl_jax import checkpoint
from critkl_jax.config import FINETUNE_PRESETS
from critkl_jax.studies import advance, catalog
from critkl_jax.studies.plan import Plan
from experiments.flags import run, take_cores

WORKDIR = flags.DEFINE_string('workdir', 'runs/studies', 'Directory of runs and studies; one for each preset.')
STUDY = flags.DEFINE_list('study', ['core'], 'Names of studies, or core, or all.')
PRESET = flags.DEFINE_enum('preset', 'tiny', list(FINETUNE_PRESETS), 'Settings from which the arms depart.')
LIST = flags.DEFINE_boolean('list', False, 'Name the studies, the runs they lack, and the time that these will take.')
SEEDS = flags.DEFINE_integer('seeds', None, "Seeds of each arm; each study's own number if not given.", lower_bound=1)
PROBLEMS = flags.DEFINE_integer('problems', 512, 'Problems of N and of N + k digits in the test of a run.', lower_bound=1)
MEMBERS = flags.DEFINE_integer('members', 16, 'Runs that advance together, at most.', lower_bound=1)
MINUTES = flags.DEFINE_float('minutes', None, 'Begin no runs after so many minutes.')


def main() -> None:
  """Makes the missing runs in groups, and writes the studies that they complete."""
  start, workdir = time.monotonic(), pathlib.Path(WORKDIR.value)
  plan = Plan(catalog.base_config(PRESET.value), workdir, SEEDS.value)
  studies = chosen(STUDY.value)
  if LIST.value:
    print(table_of(plan, catalog.STUDIES.values()))
    return
  take_cores(MEMBERS.value)
  reference = checkpoint.load_checkpoint()
  before = advance.reference_record(reference, plan.base, workdir, PROBLEMS.value)
  while missing := plan.missing(studies):
    if MINUTES.value is not None and time.monotonic() - start > 60 * MINUTES.value:
      print(f'{len(missing)} runs are left; the same command goes on with them.')
      break
    group = advance.next_group(missing, plan.base, workdir, MEMBERS.value, jax.device_count())
    print(f'{len(missing)} runs to make, {len(group)} of them now: {advance.run_name(group[0], plan.base)}, ...', flush=True)
    advance.advance(group, plan.base, reference, workdir, PROBLEMS.value)


def chosen(names: list[str]) -> list[catalog.Study]:
  """Returns the studies of these names, or exits with one line."""
  found = {}
  for name in names:
    some = {'core': catalog.CORE, 'all': tuple(catalog.STUDIES)}.get(name, (name,))
    if some[0] not in catalog.STUDIES:
      sys.exit(f'error: --study: expected core, all, or some of {", ".join(catalog.STUDIES)}; got {name!r}.')
    found |= {one: catalog.STUDIES[one] for one in some}
  return list(found.values())


if __name__ == '__main__':
  run(main)
