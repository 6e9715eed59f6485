"""Repeats the paper's experiments, and some that it lacks: runs what is missing, and writes what the runs say.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --study=prioritized_vs_standard --workdir=runs/studies

A run is made once, whatever studies ask for it; the same command goes on where it was stopped. Of each study
results.json, results.csv, pictures and a page, README.md, go to WORKDIR/studies/NAME, and WORKDIR/README.md says in
short what all of them found.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from critkl_jax import checkpoint, hosts, storage
from critkl_jax.analysis.reading import read_tokens
from critkl_jax.config import MOST_PROBLEMS, FinetuneConfig, flat_values
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.studies import advance, catalog, files, ladder, references
from critkl_jax.studies.certainty import certainty_results, overconfidence, with_exact_shares
from critkl_jax.studies.plan import SECONDS_PER_RUN, Plan
from critkl_jax.studies.records import run_name
from critkl_jax.studies.references import find_reference
from critkl_jax.studies.results import study_results

from . import parsing, paths
from .exits import refuse
from .flags import define_damaged, run, take_cores
from .tables import command
from .workdirs import claim


@dataclasses.dataclass(frozen=True)
class Defaults:
  """What is done at a preset where the flags do not say.

  Attributes:
    studies: names, or `core`, or `all`.
    seeds: of each arm; each study's own number if None.
    problems: of N and of N + k digits in the test of a run.
  """

  studies: tuple[str, ...] = ('core',)
  seeds: int | None = None
  problems: int = 512


DEFAULTS = {
    # That all of it works, in minutes: one group of runs, which three studies share.
    'smoke': Defaults(('certainty_gap', 'prioritized_vs_standard', 'drift'), seeds=2, problems=16),
    'tiny': Defaults(),
    'small': Defaults(),
    'paper': Defaults(),
}
WORKDIR = flags.DEFINE_string('workdir', 'runs/studies', 'Directory of runs and studies; one for each preset.')
STUDY = flags.DEFINE_list('study', None, 'Names of studies, or core, or all; core if not given, and '
                          f'{", ".join(DEFAULTS["smoke"].studies)} at preset smoke.')
PRESET = flags.DEFINE_enum('preset', 'tiny', list(DEFAULTS),
                           'Settings of reference and runs, from which the arms depart.')
LIST = flags.DEFINE_boolean('list', False, 'Name the studies, the runs they lack, and the time that these will take.')
SEEDS = flags.DEFINE_integer('seeds', None, "Seeds of each arm; each study's own number if not given, and "
                             f'{DEFAULTS["smoke"].seeds} at preset smoke.', 1, 10_000)
PROBLEMS = flags.DEFINE_integer('problems', None, 'Problems of N and of N + k digits in the test of a run; '
                                f'{DEFAULTS["tiny"].problems} if not given, and {DEFAULTS["smoke"].problems} at preset '
                                'smoke.', 1, MOST_PROBLEMS)
MEMBERS = flags.DEFINE_integer('members', 16, 'Runs that advance together, at most.', lower_bound=1)
MINUTES = flags.DEFINE_float('minutes', None, 'Begin no runs after so many minutes.', lower_bound=0)
define_damaged()
GENERATIONS = 64  # in a set of the study of certainty; the paper has 50


def check() -> tuple[Plan, list[catalog.Study]]:
  """Returns the plan and the studies that the flags ask for, or exits with one line."""
  usual = DEFAULTS[PRESET.value]
  studies = chosen(parsing.read_names(STUDY) or usual.studies)
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  if storage.is_remote(workdir):
    refuse(f'--workdir: {workdir}: studies are kept on this machine; give a directory here, and copy it afterwards.')
  plan = Plan(FINETUNE_PRESETS[PRESET.value], workdir, SEEDS.value or usual.seeds)
  if not LIST.value:
    check_workdir(workdir, plan)
  return plan, studies


def main(plan: Plan, studies: list[catalog.Study]) -> None:
  """Makes the missing runs in groups, and writes the studies that they complete."""
  start, workdir = time.monotonic(), plan.workdir
  if LIST.value:
    print(table_of(plan, chosen(['all'])))
    return
  take_cores(MEMBERS.value)
  hosts.say(f'{len(studies)} studies at preset {PRESET.value}, in {workdir}: '
            f'{", ".join(study.name for study in studies)}.')
  claim(workdir, 'reproduce')
  check_workdir(workdir, plan)
  storage.write_json(workdir / 'studies.json', settings_of(plan), indent=1)
  while missing := all_missing(plan, studies):
    if MINUTES.value is not None and time.monotonic() - start > 60 * MINUTES.value:
      print(f'{len(missing)} runs are left; the same command goes on with them.')
      break
    group = advance.next_group(missing, plan.base, workdir, MEMBERS.value, jax.device_count())
    hosts.say(f'{len(missing)} runs to make, {len(group)} now: {run_name(group[0], plan.base)}, ...')
    for study in studies:
      if study.reads == 'ladder':
        ladder.promote(plan, study, group[0].reference)
    ensemble = [reference_of(name, plan) for name in group[0].ensemble_paths]
    advance.advance(group, plan.base, reference_of(group[0].reference, plan), workdir, problems(), ensemble,
                    flags.FLAGS.damaged)
  for study in studies:
    if study.reads == 'tokens':
      read_certainty(study, plan, reference_of('', plan))
    elif study.reads == 'ladder':
      report_ladder(study, plan)
    else:
      report(study, plan)
  files.write_index(workdir)
  hosts.say(f'\n{time.monotonic() - start:.0f} s. In {workdir}: README.md (what all studies found), studies/ (a page '
            f'of each), runs/.\nNext, {next_command(plan, studies)}')


def problems() -> int:
  """Returns the number of problems of each test."""
  return PROBLEMS.value or DEFAULTS[PRESET.value].problems


def next_command(plan: Plan, studies: Sequence[catalog.Study]) -> str:
  """Names the next step and its command."""
  if PRESET.value == 'smoke':
    return f'what the studies take at preset tiny: {command("reproduce", "--list", f"--workdir={plan.workdir}-tiny")}'
  if all_missing(plan, studies):
    return 'the runs that are left: the same command.'
  again = command('reproduce', f'--preset={PRESET.value}', f'--workdir={plan.workdir}', '--list')
  return f'studies and runs that are left: {again}'


def settings_of(plan: Plan) -> dict[str, Any]:
  """Returns the settings that all records of a workdir share."""
  return {'preset': PRESET.value, 'problems': problems(), 'base': flat_values(plan.base)}


def check_workdir(workdir: storage.Path, plan: Plan) -> None:
  """Exits with one line if the records in the workdir were made with other settings; changes nothing."""
  file = workdir / 'studies.json'
  found = wanted = settings_of(plan)
  if file.is_file():
    found = storage.read_json(file, advice='restore it, or remove it if the records were made with this preset')
  for name in ('preset', 'problems'):
    if found.get(name) != wanted[name]:
      refuse(f'--{name}: the records in {workdir} were made with {found.get(name)!r}, not {wanted[name]!r}; '
               'give the same, or another --workdir.')
  old, new = flat_values(FinetuneConfig()) | (found.get('base') or {}), wanted['base']  # older ones had fewer fields
  different = [f'{name}: {old.get(name)!r} then, {new.get(name)!r} now' for name in sorted(old | new)
               if old.get(name) != new.get(name)]
  if different:
    refuse(f'--preset: the records in {workdir} were made when preset {PRESET.value} was another '
             f'({"; ".join(different)}); give another --workdir.')


def all_missing(plan: Plan, studies: Sequence[catalog.Study]) -> list[FinetuneConfig]:
  """Returns the configs of the runs that can be made now, those of ladders among them."""
  found = plan.missing(studies)
  for study in studies:
    if study.reads == 'ladder':
      found += ladder.missing_runs(plan, study)
  return list({run_name(config, plan.base): config for config in found}.values())


@functools.cache
def reference_of(name: str, plan: Plan) -> checkpoint.Checkpoint:
  """Returns a reference of the studies by its name, pre-trained first if it is not there; those of ladders are."""
  return find_reference(PRESET.value, name, catalog.all_references().get(name, {}), plan.workdir, flags.FLAGS.damaged)


def read_certainty(study: catalog.Study, plan: Plan, reference: checkpoint.Checkpoint) -> None:
  """Makes the study of certainty, unless it is there, and prints what it says."""
  from critkl_jax.studies import certainty_page  # draws, for which no wrong flag should wait

  if not plan.number_missing(study):
    print(f'\n{study.name}: is there, {plan.workdir / "studies" / study.name / "README.md"}')
    return
  start, known = time.monotonic(), reference.info.known_digits
  tokens = read_generations(study, plan, reference)
  about = {name: advance.describe_machine()[name] for name in ('commit', 'device')}
  results = certainty_page.write_certainty(study, plan, tokens, known, about | {'seconds': time.monotonic() - start})
  print(f'\n{study.name}: {study.question} {plan.workdir / "studies" / study.name / "README.md"}')
  for sentence in certainty_page.certainty_verdicts(results):
    print(f'  {sentence.replace("**", "")}')


def read_generations(study: catalog.Study, plan: Plan, reference: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
  """Reads sampled answers of a reference, those of a set at a time."""
  known, number = reference.info.known_digits, len(plan.seeds(study)) * GENERATIONS
  hosts.say(f'Reading {number} sampled answers of the reference of N = {known} (two programs to compile, 5 to 40 s '
            'each on a CPU).')
  return read_tokens(reference, digits=[known + plan.base.extra_digits], num_problems=number, responses='sampled',
                     seed=plan.base.seed, batch_size=GENERATIONS, progress=hosts.is_first())


def report_ladder(study: catalog.Study, plan: Plan) -> None:
  """Writes the study of climbs as far as they go, and prints what they say."""
  from critkl_jax.studies import ladder_page  # draws, for which no wrong flag should wait

  kept = {}
  for arm in study.arms:
    for seed in plan.seeds(study):
      top = ladder.top(ladder.climb(plan, study, arm, seed))
      home = top and advance.run_path(plan.workdir, top.name)
      if top and (home.is_dir() or advance.reading_path(plan.workdir, top.name, 'levels').is_file()):
        load = functools.partial(checkpoint.load_checkpoint, home)
        kept[top.name] = advance.accuracy_by_digits(
            load, 1, top.known_digits + plan.base.extra_digits - 1, plan.workdir, problems(), top.name)
  results = ladder.ladder_results(plan, study, kept)
  home = ladder_page.write_ladder(study, plan, results)
  print(f'\n{study.name}: {study.question} {home / "README.md"}')
  for row in results['contrasts']:
    print(f'  {ladder_page.ladder_verdict(row).replace("**", "")}')


def read_overconfidence(study: catalog.Study, plan: Plan) -> dict[str, Any]:
  """Returns how often the references of a study are sure and wrong, on generations of its first one; read once for
  each number of seeds."""
  arm, num_problems = next(arm for arm in study.arms if arm.ensemble), len(plan.seeds(study)) * GENERATIONS
  names = [catalog.reference_name(changes) for changes in (arm.pretraining, *arm.ensemble)]
  file = advance.reading_path(plan.workdir, names[0], 'overconfidence')
  if not file.is_file() or storage.read_json(file).get('generations') != num_problems:
    several = [reference_of(name, plan) for name in names]
    digits = [several[0].info.known_digits + plan.base.extra_digits]
    hosts.say(f'Reading {num_problems} sampled answers with {len(several)} references.')
    readings = [read_tokens(several[0], one, digits=digits, responses='sampled', num_problems=num_problems,
                            seed=plan.base.seed, progress=hosts.is_first()) for one in several]
    about = advance.describe_machine() | {'references': [advance.describe_reference(one, plan.workdir, name)
                                                         for name, one in zip(names, several)]}
    files.write_json(file, overconfidence(readings) | {'about': about})
  return storage.read_json(file)


def read_levels(study: catalog.Study, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
  """Returns what references know by number of digits, and what their generations say of their certainty; read once."""
  levels, certainty, num_sets = {}, {}, len(plan.seeds(study))
  for name in names:
    load = functools.partial(reference_of, name, plan)
    levels[name] = advance.accuracy_by_digits(load, 0, 3, plan.workdir, problems(), name)
    file = advance.reading_path(plan.workdir, name, 'certainty')
    if not file.is_file() or storage.read_json(file).get('sets') != num_sets:
      files.write_json(file, {'known_digits': load().info.known_digits,
                              **certainty_results(read_generations(study, plan, load()), num_sets),
                              'about': advance.describe_machine()})
    certainty[name] = with_exact_shares(storage.read_json(file))
  return {'levels': levels, 'certainty': certainty}


def report(study: catalog.Study, plan: Plan) -> None:
  """Writes a study as far as its runs go, and prints what they say."""
  from critkl_jax.studies import page  # draws, for which no wrong flag should wait

  names = dict.fromkeys(catalog.reference_name(arm.pretraining) for arm in study.arms if plan.has_runs(study, arm))
  loads = {name: functools.partial(reference_of, name, plan) for name in names}
  records = {name: advance.reference_record(load, plan.base, plan.workdir, problems(), name)
             for name, load in loads.items()}
  results = study_results(study, plan, records)
  if study.beside == 'levels':
    results |= read_levels(study, plan, names)
  if study.beside == 'overconfidence' and any(plan.has_runs(study, arm) for arm in study.arms if arm.ensemble):
    results['overconfidence'] = read_overconfidence(study, plan)
  home = page.write_study(study, plan, results)
  print(f'\n{study.name}: {study.question} {home / "README.md"}')
  for sentence in page.verdicts(results):
    print(f'  {sentence.replace("**", "")}')


def chosen(names: Sequence[str]) -> list[catalog.Study]:
  """Returns the studies of these names, or exits with one line."""
  found = {}
  for name in names:
    some = {'core': catalog.CORE, 'all': tuple(catalog.STUDIES)}.get(name, (name,))
    parsing.check_known('study', some, ['core', 'all', *catalog.STUDIES])
    found |= {one: references.with_numbers(references.suited(catalog.STUDIES[one], PRESET.value), PRESET.value)
              for one in some}
  return list(found.values())


def table_of(plan: Plan, studies: Sequence[catalog.Study]) -> str:
  """Returns a line for each study: its runs, those that it lacks, and the time that they will take."""
  measured = plan.seconds_per_run()
  seconds = measured or (SECONDS_PER_RUN if PRESET.value == 'tiny' else None)
  lines = [f'{"study":<26}{"runs":>6}{"missing":>9}{"minutes":>9}  counterpart']
  for study in studies:
    number = len(study.arms) * len(plan.seeds(study)) or 1
    missing = len(ladder.missing_runs(plan, study)) if study.reads == 'ladder' else plan.number_missing(study)
    minutes = '?' if seconds is None and missing else f'{missing * (seconds or 0) / 60:.0f}'
    lines.append(f'{study.name:<26}{number:>6}{missing:>9}{minutes:>9}  {study.counterpart}')
  together = all_missing(plan, studies)
  names = {name for config in together for name in (config.reference, *config.ensemble_paths)
           if name in catalog.all_references() and (name or PRESET.value != references.SHIPPED_PRESET)}
  untrained = [name for name in names if not (references.references_path(plan.workdir, name) / 'reference').is_dir()]
  lines.append(f'{len(untrained)} references are to be pre-trained for them first, which is not in these minutes.')
  lines.append(f'{len(together)} runs can be made now: studies share theirs, of a climb it is the next rung. ' + (
      f'Minutes as the runs in {plan.workdir} took.' if measured else
      'Minutes on two CPU cores.' if seconds else 'How long one takes is known when the first is there.'))
  return '\n'.join(lines)


if __name__ == '__main__':
  run(main, check)
