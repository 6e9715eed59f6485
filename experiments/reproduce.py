"""Repeats the paper's experiments and adds further ones: makes the missing runs, and writes a page for each study.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --study=prioritized_vs_standard --workdir=runs/studies

Studies share their runs, and the same command resumes. WORKDIR/studies/NAME takes the results.json, results.csv,
pictures and page, README.md, of each study; WORKDIR/README.md summarizes all studies.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from critkl_jax.analysis.reading import read_tokens
from critkl_jax.config import flat_values, replace
from critkl_jax.runtime import checkpoint, hosts, storage
from critkl_jax.studies import catalog, files, ladder, references, study_runs
from critkl_jax.studies.certainty_gap import (
  certainty_results,
  least_certain_words,
  overconfidence,
  with_exact_shares,
)
from critkl_jax.studies.plan import SECONDS_PER_RUN, Plan
from critkl_jax.studies.records import run_name
from critkl_jax.studies.references import find_reference
from critkl_jax.studies.results import study_results
from critkl_jax.tasks.known_tasks import known_task_of
from critkl_jax.training.config import MOST_PROBLEMS, FinetuneConfig
from critkl_jax.training.presets import FINETUNE_PRESETS

from . import parsing, paths
from .exits import refuse
from .flags import define_damaged, run, use_cores_as_devices
from .tables import command
from .workdirs import claim


@dataclasses.dataclass(frozen=True)
class Defaults:
  """Defaults of the flags at a preset.

  Attributes:
    studies: names of studies, or `core`, or `all`.
    seeds: number of seeds of each arm; each study's own number if None.
    problems: number of test problems of N, and of N + k.
  """

  studies: tuple[str, ...] = ('core',)
  seeds: int | None = None
  problems: int = 512


DEFAULTS = {
    # A quick check in minutes: one group of runs, which three studies share.
    'smoke': Defaults(('certainty_gap', 'prioritized_vs_standard', 'drift'), seeds=2, problems=16),
    'tiny': Defaults(),
    'stories': Defaults(('natural_language',)),
    'small': Defaults(),
    'paper': Defaults(),
}
WORKDIR = flags.DEFINE_string('workdir', 'runs/studies', 'Directory of runs and studies; each preset needs its own.')
STUDY = flags.DEFINE_list('study', None, 'Names of studies, or core, or all; core if not given, '
                          'natural_language at preset stories, and '
                          f'{", ".join(DEFAULTS["smoke"].studies)} at preset smoke.')
PRESET = flags.DEFINE_enum('preset', 'tiny', list(DEFAULTS),
                           'Settings of reference and runs, which the arms change.')
LIST = flags.DEFINE_boolean('list', False, 'Print the studies, their missing runs, and the time that these will take.')
SEEDS = flags.DEFINE_integer('seeds', None, "Seeds of each arm; each study's own number if not given, and "
                             f'{DEFAULTS["smoke"].seeds} at preset smoke.', 1, 10_000)
PROBLEMS = flags.DEFINE_integer('problems', None, 'Test problems of N, and of N + k; '
                                f'{DEFAULTS["tiny"].problems} if not given, and {DEFAULTS["smoke"].problems} at preset '
                                'smoke.', 1, MOST_PROBLEMS)
MEMBERS = flags.DEFINE_integer('members', 16, 'Most runs that train together.', lower_bound=1)
MINUTES = flags.DEFINE_float('minutes', None, 'Minutes after which no new runs begin.', lower_bound=0)
define_damaged()
GENERATIONS = 64  # generations for each seed in the study of certainty; the paper has 50


def check() -> tuple[Plan, list[catalog.Study]]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  usual = DEFAULTS[PRESET.value]
  studies = read_studies(parsing.read_names(STUDY) or usual.studies)
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  if storage.is_remote(workdir):
    refuse(f'--workdir: {workdir}: studies are kept on this machine; give a directory here, and copy it afterwards.')
  plan = Plan(FINETUNE_PRESETS[PRESET.value], workdir, SEEDS.value or usual.seeds)
  if not LIST.value:
    check_workdir(workdir, plan)
  return plan, studies


def main(plan: Plan, studies: list[catalog.Study]) -> None:
  """Makes the missing runs in groups, and writes the pages of the studies."""
  start, workdir = time.monotonic(), plan.workdir
  if LIST.value:
    print(format_table(plan, read_studies(['all'])))
    return
  use_cores_as_devices(MEMBERS.value)
  hosts.say(f'{len(studies)} studies at preset {PRESET.value}, in {workdir}: '
            f'{", ".join(study.name for study in studies)}.')
  claim(workdir, 'reproduce')
  check_workdir(workdir, plan)
  storage.write_json(workdir / 'studies.json', settings_of(plan))
  while missing := all_missing(plan, studies):
    if MINUTES.value is not None and time.monotonic() - start > 60 * MINUTES.value:
      print(f'{len(missing)} runs are left; the same command makes them.')
      break
    group = study_runs.next_group(missing, plan.base, workdir, MEMBERS.value, jax.device_count())
    hosts.say(f'{len(missing)} runs to make, {len(group)} now: {run_name(group[0], plan.base)}, ...')
    for study in studies:
      if study.reads == 'ladder':
        ladder.promote(plan, study, group[0].reference)
    ensemble = [reference_of(name, plan) for name in group[0].ensemble_paths]
    study_runs.run_members(group, plan.base, reference_of(group[0].reference, plan), workdir, problems_per_test(),
                           ensemble, flags.FLAGS.damaged)
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


def problems_per_test() -> int:
  """Returns the number of test problems of each length."""
  return PROBLEMS.value or DEFAULTS[PRESET.value].problems


def next_command(plan: Plan, studies: Sequence[catalog.Study]) -> str:
  """Describes the next step and its command."""
  if PRESET.value == 'smoke':
    return f'the time of the studies at preset tiny: {command("reproduce", "--list", f"--workdir={plan.workdir}-tiny")}'
  if all_missing(plan, studies):
    return 'the runs that are left: the same command.'
  again = command('reproduce', f'--preset={PRESET.value}', f'--workdir={plan.workdir}', '--list')
  return f'studies and runs that are left: {again}'


def settings_of(plan: Plan) -> dict[str, Any]:
  """Returns the settings that all records of a workdir share."""
  return {'preset': PRESET.value, 'problems': problems_per_test(), 'base': flat_values(plan.base)}


def check_workdir(workdir: storage.Path, plan: Plan) -> None:
  """Exits with one line if the records in the workdir were made with other settings; writes nothing."""
  file = workdir / 'studies.json'
  found = wanted = settings_of(plan)
  if file.is_file():
    found = storage.read_json(file, advice='restore it, or remove it if the records were made with this preset')
  for name in ('preset', 'problems'):
    if found.get(name) != wanted[name]:
      refuse(f'--{name}: the records in {workdir} were made with {found.get(name)!r}, not {wanted[name]!r}; '
             'give the same, or another --workdir.')
  old, new = flat_values(FinetuneConfig()) | (found.get('base') or {}), wanted['base']  # older ones lack fields
  different = [f'{name}: {old.get(name)!r} then, {new.get(name)!r} now' for name in sorted(old | new)
               if old.get(name) != new.get(name)]
  if different:
    refuse(f'--preset: the records in {workdir} were made when preset {PRESET.value} was another '
             f'({"; ".join(different)}); give another --workdir.')


def all_missing(plan: Plan, studies: Sequence[catalog.Study]) -> list[FinetuneConfig]:
  """Returns the configs of the runs that can be made now, including ladders."""
  found = plan.missing(studies)
  for study in studies:
    if study.reads == 'ladder':
      found += ladder.missing_runs(plan, study)
  return list({run_name(config, plan.base): config for config in found}.values())


@functools.cache
def reference_of(name: str, plan: Plan) -> checkpoint.Checkpoint:
  """Returns a reference of the studies by its name, and pre-trains it if needed; those of ladders exist already."""
  return find_reference(PRESET.value, name, catalog.all_references().get(name, {}), plan.workdir, flags.FLAGS.damaged)


def read_certainty(study: catalog.Study, plan: Plan, reference: checkpoint.Checkpoint) -> None:
  """Makes the study of certainty, unless it exists, and prints its verdicts."""
  from critkl_jax.studies import certainty_gap_page  # slow import, not needed to check flags

  if not plan.number_missing(study):
    print(f'\n{study.name}: already made, {plan.workdir / "studies" / study.name / "README.md"}')
    return
  start, known = time.monotonic(), reference.info.task.known_digits
  tokens = read_generations(study, plan, reference, plan.base)
  about = {name: study_runs.describe_machine()[name] for name in ('commit', 'device')}
  about |= {'seconds': time.monotonic() - start}
  results = certainty_gap_page.write_certainty(study, plan, tokens, known, about)
  print(f'\n{study.name}: {study.question} {plan.workdir / "studies" / study.name / "README.md"}')
  for sentence in certainty_gap_page.certainty_verdicts(results):
    print(f'  {sentence.replace("**", "")}')


def read_generations(study: catalog.Study, plan: Plan, reference: checkpoint.Checkpoint, config: FinetuneConfig
                     ) -> dict[str, np.ndarray]:
  """Samples answers of a reference, a set at a time, and returns the readings of their tokens.

  Args:
    study: gives the number of sets.
    plan: gives the seed.
    reference: the reference.
    config: a run on it, of whose problems it answers those of N + k.
  """
  settings = study_runs.settings_of(reference, config)
  (known, extra), number = known_task_of(settings).sizes(settings), len(plan.seeds(study)) * GENERATIONS
  hosts.say(f'Reading {number} sampled answers of the reference of N = {known} (two programs to compile, 5 to 40 s '
            'each on a CPU).')
  asked = dataclasses.replace(reference, info=dataclasses.replace(reference.info, task=settings))
  return read_tokens(asked, asked, sets=[known + extra], num_problems=number, responses='sampled', seed=plan.base.seed,
                     batch_size=GENERATIONS, progress=hosts.is_first())


def report_ladder(study: catalog.Study, plan: Plan) -> None:
  """Writes the study of ladders from the runs made so far, and prints its verdicts."""
  from critkl_jax.studies import ladder_page  # slow import, not needed to check flags

  kept = {}
  for arm in study.arms:
    for seed in plan.seeds(study):
      top = ladder.top(ladder.climb(plan, study, arm, seed))
      home = top and study_runs.run_path(plan.workdir, top.name)
      if top and (home.is_dir() or study_runs.reading_path(plan.workdir, top.name, 'levels').is_file()):
        load = functools.partial(checkpoint.load_checkpoint, home)
        kept[top.name] = study_runs.accuracy_by_digits(
            load, 1, top.known + plan.base.addition.extra_digits - 1, plan.workdir, problems_per_test(),
            top.name)
  results = ladder.ladder_results(plan, study, kept)
  home = ladder_page.write_ladder(study, plan, results)
  print(f'\n{study.name}: {study.question} {home / "README.md"}')
  for row in results['contrasts']:
    print(f'  {ladder_page.ladder_verdict(row).replace("**", "")}')


def read_overconfidence(study: catalog.Study, plan: Plan) -> dict[str, Any]:
  """Measures how often the references of a study are certain and wrong, on generations of the first one.

  The result is saved, and measured again for another number of seeds.
  """
  arm, num_problems = next(arm for arm in study.arms if arm.ensemble), len(plan.seeds(study)) * GENERATIONS
  names = [catalog.reference_name(changes) for changes in (arm.pretraining, *arm.ensemble)]
  file = study_runs.reading_path(plan.workdir, names[0], 'overconfidence')
  if not file.is_file() or storage.read_json(file).get('generations') != num_problems:
    several = [reference_of(name, plan) for name in names]
    digits = [several[0].info.task.known_digits + plan.base.addition.extra_digits]
    hosts.say(f'Reading {num_problems} sampled answers with {len(several)} references.')
    readings = [read_tokens(several[0], one, sets=digits, responses='sampled', num_problems=num_problems,
                            seed=plan.base.seed, progress=hosts.is_first()) for one in several]
    about = study_runs.describe_machine() | {'references': [study_runs.describe_reference(one, plan.workdir, name)
                                                         for name, one in zip(names, several)]}
    files.write_json(file, overconfidence(readings) | {'about': about})
  return storage.read_json(file)


def read_levels(study: catalog.Study, plan: Plan, arms: dict[str, catalog.Arm]) -> dict[str, Any]:
  """Measures accuracy by the size of problems, and certainty on generations, of references; saves the results.

  Args:
    study: the study.
    plan: plan of its runs.
    arms: `catalog.reference_key` -> an arm with this reference.
  """
  levels, certainty, words, num_sets = {}, {}, {}, len(plan.seeds(study))
  for name, arm in arms.items():
    load = functools.partial(reference_of, catalog.reference_name(arm.pretraining), plan)
    config = replace(plan.base, **catalog.asked(arm))
    levels[name] = study_runs.accuracy_by_size(load, config, plan.workdir, problems_per_test(), name)
    file = study_runs.reading_path(plan.workdir, name, 'certainty')
    if not file.is_file() or storage.read_json(file).get('sets') != num_sets:
      tokens = read_generations(study, plan, load(), config)
      settings = study_runs.settings_of(load(), config)
      files.write_json(file, {'known': known_task_of(settings).sizes(settings)[0],
                              **certainty_results(tokens, num_sets),
                              **({} if plan.unit == 'digits' else {'words': least_certain_words(tokens)}),
                              'about': study_runs.describe_machine()})
    certainty[name] = with_exact_shares(storage.read_json(file))
    if 'words' in certainty[name]:
      words[name] = certainty[name]['words']
  return {'levels': levels, 'certainty': certainty, 'words': words}


def report(study: catalog.Study, plan: Plan) -> None:
  """Writes a study from the runs made so far, and prints its verdicts."""
  from critkl_jax.studies import page  # slow import, not needed to check flags

  arms = {}
  for arm in study.arms:
    if plan.has_runs(study, arm):
      arms.setdefault(catalog.reference_key(arm), arm)
  records = {name: study_runs.reference_record(
      functools.partial(reference_of, catalog.reference_name(arm.pretraining), plan),
      replace(plan.base, **catalog.asked(arm)), plan.workdir, problems_per_test(), name) for name, arm in arms.items()}
  results = study_results(study, plan, records)
  if study.beside == 'levels':
    results |= read_levels(study, plan, arms)
  if study.beside == 'overconfidence' and any(plan.has_runs(study, arm) for arm in study.arms if arm.ensemble):
    results['overconfidence'] = read_overconfidence(study, plan)
  home = page.write_study(study, plan, results)
  print(f'\n{study.name}: {study.question} {home / "README.md"}')
  for sentence in page.verdicts(results):
    print(f'  {sentence.replace("**", "")}')


def read_studies(names: Sequence[str]) -> list[catalog.Study]:
  """Returns the studies of the given names, or exits with one line."""
  found = {}
  for name in names:
    task = FINETUNE_PRESETS[PRESET.value].task
    fitting = tuple(study for study, own in catalog.STUDIES.items() if own.task == task)
    core = tuple(study for study in catalog.CORE if study in fitting) or fitting
    group = {'core': core, 'all': fitting}.get(name, (name,))
    parsing.check_known('study', group, ['core', 'all', *catalog.STUDIES])
    for study in set(group) - set(fitting):
      other = next(preset for preset in references.SHIPPED if references.SHIPPED[preset] == catalog.STUDIES[study].task)
      refuse(f"--study: {study} is on the task '{catalog.STUDIES[study].task}', and preset {PRESET.value} on '{task}'; "
             f'give --preset={other}, and a workdir of its own.')
    found |= {study: references.with_numbers(references.suited(catalog.STUDIES[study], PRESET.value), PRESET.value)
              for study in group}
  return list(found.values())


def format_table(plan: Plan, studies: Sequence[catalog.Study]) -> str:
  """Formats a line for each study: its runs, its missing runs, and the minutes that these will take."""
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
           if name in catalog.all_references() and (name or PRESET.value not in references.SHIPPED)}
  untrained = [name for name in names if not (references.references_path(plan.workdir, name) / 'reference').is_dir()]
  lines.append(f'{len(untrained)} references must be pre-trained first, which these minutes do not include.')
  lines.append(f'{len(together)} runs can be made now: studies share runs, and a ladder makes one rung at a time. ' + (
      f'Minutes by the runs in {plan.workdir}.' if measured else
      'Minutes on two CPU cores.' if seconds else 'Minutes are known after the first run.'))
  return '\n'.join(lines)


if __name__ == '__main__':
  run(main, check)
