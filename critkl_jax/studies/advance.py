"""From a list of configs to records: runs that share a program advance together, are tested, and leave their records.

    WORKDIR/runs/NAME.json          a finished run
    WORKDIR/references/NAME.json    what the same test says of a reference; what else was read of it is NAME.KIND.json
    WORKDIR/working/                parameters of runs and references, and what is under way; records do without it
"""

import dataclasses
import functools
import hashlib
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import tqdm

from critkl_jax import checkpoint, hosts, interruption, population, runner, storage
from critkl_jax.checkpoint import Checkpoint, CheckpointInfo
from critkl_jax.config import FinetuneConfig, flat_values, replace
from critkl_jax.evaluate import accuracies, accuracy_interval
from critkl_jax.gpt2 import GPT2, reference_config
from critkl_jax.studies.measures import make_probe, make_test
from critkl_jax.studies.records import Record, read_record, run_name, write_record
from critkl_jax.studies.references import references_path
from critkl_jax.tasks.addition import LENGTH_MARGIN, plus_task, prompt_length, solution_length


def record_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns where the record of a run is kept."""
  return workdir / 'runs' / f'{name}.json'


def run_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the workdir in which the last parameters of a run are kept."""
  return workdir / 'working' / 'runs' / name


def reading_path(workdir: pathlib.Path, name: str, kind: str) -> pathlib.Path:
  """Returns where what was read of a model, `base` if it has no name, is kept: its `levels` (accuracy by number of
  digits), its `certainty` or its `overconfidence`."""
  return workdir / 'references' / f'{name or "base"}.{kind}.json'


def next_group(configs: Sequence[FinetuneConfig], base: FinetuneConfig, workdir: pathlib.Path, most: int,
               num_devices: int) -> list[FinetuneConfig]:
  """Returns those of the missing runs that are to advance next, together.

  That is a group which was stopped before, if one of them is in it; else the first run and up to `most` of those that
  share its program, as many as the devices can take equally.
  """
  named = {run_name(config, base): config for config in configs}
  for file in sorted((workdir / 'working' / 'groups').glob('*/members.json')):
    names = storage.read_json(file, list, f'remove {file.parent}, and its runs are made again')
    if named.keys().isdisjoint(names):
      continue
    group = [named.get(name) or _saved_config(file.parent / 'members' / name / 'checkpoints') for name in names]
    if None not in group:
      return group
  alike = [config for config in named.values() if _program(config) == _program(configs[0])][:most]
  return alike[:len(alike) // num_devices * num_devices] or alike


def _saved_config(directory):
  info = checkpoint.newest_info(directory)
  return info and info.training


def _program(config):
  """Returns what runs must share to advance together, and to be probed and tested alike."""
  usual = flat_values(FinetuneConfig())
  free = {name: usual[name] for name in population.VARIED if name != 'temperature'}
  shared = replace(config, **free)
  # Mixed penalties are one program; a certainty that no weight asks for is part of none.
  return shared if config.loss.kl == 'prioritized' else replace(shared, certainty=usual['certainty'])


def advance(configs: Sequence[FinetuneConfig], base: FinetuneConfig, reference: Checkpoint, workdir: pathlib.Path,
            num_problems: int, ensemble: Sequence[Checkpoint] = (), damaged: str = 'skip') -> list[Record]:
  """Trains and tests runs that share a program, from where they were stopped if they were, and keeps their records.

  Args:
    configs: of the runs.
    base: the config from which they are named.
    reference: the pre-trained model.
    workdir: of the studies.
    num_problems: of each test.
    ensemble: the further references of the configs.
    damaged: as in `runner.run`.

  Raises:
    CheckpointError, Interrupted: as `runner.run_population`.
  """
  names = [run_name(config, base) for config in configs]
  first, known = configs[0], reference.info.known_digits
  model, mesh = GPT2(first.model_of(reference.info.model)), population.members_mesh(len(configs))
  task, temperature = plus_task(known, first.extra_digits), first.loss.temperature
  needed = task.prompt_length + task.response_length
  if needed > model.config.context_length:
    raise checkpoint.CheckpointError(f'{reference.path}: {known} + {first.extra_digits} digits need a context of '
                                     f'{needed}, and this reference has {model.config.context_length}.')
  group = workdir / 'working' / 'groups' / hashlib.sha256('\n'.join(names).encode()).hexdigest()[:12]
  about = describe_machine()
  with hosts.waiting(f'Compiling the training step of {len(configs)} runs (once, 20 to 90 s on a CPU).'):
    state = population.init_population(model, configs, reference.params, mesh, [one.params for one in ensemble])
    probe = make_probe(model, jax.device_get(state.ref_params), known, first.extra_digits, temperature)
    step, _ = population.compile_step(model, task, configs, mesh, probe=probe)
  infos = {name: CheckpointInfo(model.config, known, config) for name, config in zip(names, configs)}
  numbers = population.numbers_of(configs, mesh)
  state = runner.run_population(
      lambda state, _: step(state, *numbers), state, first.num_iterations, infos, group, first.save_every,
      show=('accuracy', 'kl', 'critical_right', 'weight'), damaged=damaged)

  start = time.monotonic()
  say_testing(f'{len(configs)} runs', num_problems)
  test = make_test(model, known, first.extra_digits, num_problems, mesh, temperature, progress=hosts.is_first())
  tests = test(state.params, state.ref_params)
  test_seconds = (time.monotonic() - start) / len(configs)
  records = []
  for i, params in enumerate(population.members_on_host(state.params)):
    rows = runner.read_metrics(group / 'members' / names[i] / 'metrics.jsonl')
    own = {'seconds': round(sum(row['seconds'] for row in rows), 1), 'test_seconds': round(test_seconds, 1)}
    rows = [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_second')
             and not k.startswith('signature/')} for row in rows]
    records.append(Record(names[i], configs[i], known, rows, tests[i], own | about))
    _keep_params(workdir, infos[names[i]], names[i], params)
  for record in records:
    if not record_path(workdir, record.name).is_file():  # of a run that was made again for its parameters it is
      write_record(record_path(workdir, record.name), record)
  interruption.tell(f'; the runs that were finished are kept in {workdir}, and the same command goes on from there.')
  shutil.rmtree(group)
  return records


def say_testing(what: str, num_problems: int) -> None:
  """Says that a model, or several, are tested."""
  hosts.say(f'Testing {what}: greedy and sampled answers to 2 x {num_problems} problems (four programs to compile, 5 '
            'to 20 s each on a CPU).')


def _keep_params(workdir, info, name, params):
  """Leaves the last parameters of a run where all that reads workdirs finds them, with their reference."""
  home = run_path(workdir, name)
  unfinished = home / 'checkpoints.unfinished'
  shutil.rmtree(unfinished, ignore_errors=True)  # of a process that ended in here
  checkpoint.save_params(unfinished, params, info, info.training.num_iterations)
  storage.replace_directory(unfinished, home / 'checkpoints')  # of a run that is made again they are there
  own = references_path(workdir, info.training.reference) / 'reference'
  if own.is_dir() and not (home / 'reference').exists():  # the one in the package is found without
    (home / 'reference').symlink_to(pathlib.Path('..', '..', own.relative_to(workdir / 'working')))


def reference_record(load: Callable[[], Checkpoint], base: FinetuneConfig, workdir: pathlib.Path, num_problems: int,
                     name: str = '') -> Record:
  """Returns the record of a reference, `base` if it has no name: loaded, tested and kept, unless it was before. It says
  how the reference was pre-trained, and how long that took if that was under this workdir."""
  name = name or 'base'
  path = workdir / 'references' / f'{name}.json'
  if path.is_file():
    return read_record(path)
  start, reference = time.monotonic(), load()
  known = reference.info.known_digits
  mesh = population.members_mesh(1)
  own = reference.info.model
  model = GPT2(dataclasses.replace(reference_config(base.model_of(own), own), remat=False))  # as its runs read it
  stacked = jax.tree.map(lambda x: x[None], reference.params)
  say_testing(f'the reference {name}', num_problems)
  test = make_test(model, known, base.extra_digits, num_problems, mesh, base.loss.temperature,
                   progress=hosts.is_first())
  tests = test(stacked, reference.params)
  about = {'test_seconds': round(time.monotonic() - start, 1), **describe_reference(reference, workdir, name),
           **describe_machine()}
  record = Record(name, None, known, [], tests[0], about)
  write_record(path, record)
  return record


def describe_reference(reference: Checkpoint, workdir: pathlib.Path, name: str) -> dict[str, Any]:
  """Returns how a reference was pre-trained, its `step`, and the seconds, if it was pre-trained under the workdir."""
  training = reference.info.training
  rows = runner.read_metrics(references_path(workdir, name) / 'metrics.jsonl')
  return {'step': reference.step, 'pretraining': None if training is None else flat_values(training),
          **({'pretraining_seconds': round(sum(row['seconds'] for row in rows), 1)} if rows else {})}


def accuracy_by_digits(load: Callable[[], Checkpoint], first: int, most: int, workdir: pathlib.Path, num_problems: int,
                       name: str) -> list[dict[str, Any]]:
  """Returns the accuracy of a model by number of digits, as far as its context goes, for operands of identical and of
  varying length: rows of `evaluate.accuracies`, kept by the name of the model beside the records of references.

  Args:
    load: gives the model, if it was not tested before.
    first: number of digits, 0 for its N.
    most: further numbers of digits.
    workdir: of the studies.
    num_problems: in a cell.
    name: of the model, `base` if empty.
  """
  path = reading_path(workdir, name, 'levels')
  if path.is_file():
    rows = storage.read_json(path).get('rows', [])  # of an older version they have other intervals
    return [row | dict(zip(('low', 'high'), accuracy_interval(row['accuracy'], row['num_problems']))) for row in rows]
  policy = load()
  hosts.say(f'Testing {name or "the reference base"} by number of digits.')
  first = first or policy.info.known_digits
  fitting = [n for n in range(first, first + most + 1)
             if prompt_length(n) + solution_length(n) + LENGTH_MARGIN <= policy.info.model.context_length]
  lengths = ['identical', 'varying']
  cells = accuracies(GPT2(dataclasses.replace(policy.info.model, remat=False)), policy.params,
                     policy.info.known_digits, fitting, lengths, num_problems)
  rows = list(tqdm.tqdm(cells, 'tests', len(fitting) * len(lengths), unit='cell', disable=not hosts.is_first()))
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, {'rows': rows, 'about': describe_machine()}, indent=1)
  return rows


@functools.cache
def describe_machine() -> dict[str, Any]:
  """Returns the code's commit, with `+` where files differ from it, the device and the versions of the libraries, as
  they were when the process asked first."""
  file = pathlib.Path(__file__)

  def git(*words):
    return subprocess.run(['git', '-C', str(file.parent), *words], capture_output=True, text=True, check=True).stdout

  try:
    git('ls-files', '--error-unmatch', file.name)
    changed = '+' if git('status', '--porcelain', '--untracked-files=no', '--', file.parents[1]) else ''
    commit = git('rev-parse', '--short=12', 'HEAD').strip() + changed
  except (OSError, subprocess.CalledProcessError):
    commit = 'none: not a checkout'
  devices = jax.devices()
  return {'commit': commit,
          'device': f'{len(devices)} x {devices[0].device_kind}',
          'versions': {'jax': jax.__version__, 'flax': flax.__version__, 'python': platform.python_version()}}
