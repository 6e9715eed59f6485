"""Trains and tests the runs of studies and writes their records; runs that share a program form one population.

    WORKDIR/runs/NAME.json          record of a finished run
    WORKDIR/references/NAME.json    record of a reference, from the same test; further measurements are NAME.KIND.json
    WORKDIR/working/                parameters of runs and references, and unfinished runs; records do not need it
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

from critkl_jax.analysis.evaluation import accuracies, accuracy_interval
from critkl_jax.config import flat_values, reset
from critkl_jax.models.architectures import make_model, reference_config
from critkl_jax.records import TrainState
from critkl_jax.runtime import checkpoint, hosts, interruption, loop, storage
from critkl_jax.runtime.checkpoint import Checkpoint, CheckpointInfo
from critkl_jax.studies.measures import make_members_test, make_probe
from critkl_jax.studies.records import Record, read_record, run_name, write_record
from critkl_jax.studies.references import references_path
from critkl_jax.tasks.addition import LENGTH_MARGIN, by_digits_and_distribution, prompt_length, solution_length
from critkl_jax.tasks.known_tasks import known_task_of
from critkl_jax.tasks.rewards import RewardPool
from critkl_jax.tasks.task import ProblemSet
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.host_step import make_host_step
from critkl_jax.training.initial_state import Hyperparameters, finetuning_keys, init_finetuning


def record_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of a run's record."""
  return workdir / 'runs' / f'{name}.json'


def run_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the directory of a run's last parameters."""
  return workdir / 'working' / 'runs' / name


def reading_path(workdir: pathlib.Path, name: str, kind: str) -> pathlib.Path:
  """Returns the path of a model's further measurements; an empty name means `base`.

  `kind` is `levels` (accuracy by size of problem), `certainty` or `overconfidence`.
  """
  return workdir / 'references' / f'{name or "base"}.{kind}.json'


def next_group(configs: Sequence[FinetuneConfig], base: FinetuneConfig, workdir: pathlib.Path, most: int,
               num_devices: int) -> list[FinetuneConfig]:
  """Picks the missing runs that are trained next, as one population.

  A group that was interrupted before is resumed if it contains a missing run. Otherwise the group consists of the first
  run and the runs that share its program: at most `most`, and a multiple of `num_devices` if there are enough. A run
  with rewards in Python is a group of its own.
  """
  named = {run_name(config, base): config for config in configs}
  for file in sorted((workdir / 'working' / 'groups').glob('*/members.json')):
    names = storage.read_json(file, list, f'remove {file.parent}, and its runs are made again')
    if named.keys().isdisjoint(names):
      continue
    group = [named.get(name) or _saved_config(file.parent / 'members' / name / 'checkpoints') for name in names]
    if None not in group:
      return group
  if configs[0].rewards_in_python:
    return configs[:1]
  alike = [config for config in named.values() if _program(config) == _program(configs[0])][:most]
  return alike[:len(alike) // num_devices * num_devices] or alike


def _saved_config(directory):
  info = checkpoint.newest_info(directory)
  return info and info.training


def _program(config):
  """Returns the part of a config that the runs of one population must share, temperature included."""
  return reset(config, *(name for name in population.VARIED if name != 'temperature'))


def run_members(configs: Sequence[FinetuneConfig], base: FinetuneConfig, reference: Checkpoint, workdir: pathlib.Path,
                num_problems: int, ensemble: Sequence[Checkpoint] = (), damaged: str = 'skip') -> list[Record]:
  """Trains and tests runs that share a program, resuming if they were interrupted, and writes their records.

  Args:
    configs: configs of the runs.
    base: config that the runs' names are relative to.
    reference: the pre-trained model.
    workdir: directory of the studies.
    num_problems: problems of each test.
    ensemble: further references for the certainty.
    damaged: as in `loop.run`.

  Raises:
    CheckpointError, Interrupted: as `loop.run_population`.
  """
  names = [run_name(config, base) for config in configs]
  first = configs[0]
  model, mesh = make_model(first.model_of(reference.info.model)), population.members_mesh(len(configs))
  settings = settings_of(reference, first)
  (known, extra), unit = known_task_of(settings).sizes(settings), known_task_of(settings).unit
  task, temperature = known_task_of(settings).make(settings), first.loss.temperature
  needed = task.prompt_length + task.response_length
  if needed > model.context_length:
    raise checkpoint.CheckpointError(f'{reference.path}: {known} + {extra} {unit} need a context of {needed}, and this '
                                     f'reference has {model.context_length}.')
  group = workdir / 'working' / 'groups' / hashlib.sha256('\n'.join(names).encode()).hexdigest()[:12]
  about = describe_machine()
  infos = {name: CheckpointInfo(model.config, settings, config, model.name) for name, config in zip(names, configs)}
  train = _train_on_host if task.host else _train
  state = train(model, task, configs, mesh, reference, ensemble, infos, group, damaged)

  start = time.monotonic()
  say_testing(f'{len(configs)} runs', num_problems)
  test = make_members_test(model, settings, num_problems, mesh, temperature, progress=hosts.is_first())
  tests = test(state.params, state.ref_params)
  test_seconds = (time.monotonic() - start) / len(configs)
  records = []
  for i, params in enumerate(population.members_on_host(state.params)):
    rows = loop.read_metrics(group / 'members' / names[i] / 'metrics.jsonl')
    own = {'seconds': round(sum(row['seconds'] for row in rows), 1), 'test_seconds': round(test_seconds, 1)}
    rows = [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_second')
             and not k.startswith('signature/')} for row in rows]
    records.append(Record(names[i], configs[i], known, rows, tests[i], own | about))
    _keep_params(workdir, infos[names[i]], names[i], params)
  for record in records:
    if not record_path(workdir, record.name).is_file():  # it exists if the run was repeated for its parameters
      write_record(record_path(workdir, record.name), record)
  interruption.tell(f'; the runs that were finished are kept in {workdir}, and the same command goes on from there.')
  shutil.rmtree(group)
  return records


def settings_of(reference: Checkpoint, config: FinetuneConfig) -> Any:
  """Returns the settings of the task on which a config fine-tunes a reference."""
  return known_task_of(reference.info.task).finetuned(reference.info.task, config)


def _train(model, task, configs, mesh, reference, ensemble, infos, group, damaged) -> TrainState:
  """Trains runs that share a program as one population, and returns its last state."""
  first = configs[0]
  with hosts.waiting(f'Compiling the training step of {len(configs)} runs (once, 20 to 90 s on a CPU).'):
    state = population.init_population(model, configs, reference.params, mesh, [one.params for one in ensemble])
    probe = make_probe(model, jax.device_get(state.ref_params), next(iter(infos.values())).task, first.loss.temperature)
    step, _ = population.compile_step(model, task, configs, mesh, probe=probe)
  numbers = population.numbers_of(configs, mesh)
  return loop.run_population(
      lambda state, _: step(state, *numbers), state, first.num_iterations, infos, group, first.save_every,
      show=('accuracy', 'kl', 'critical_right', 'weight'), damaged=damaged)


def _train_on_host(model, task, configs, mesh, reference, ensemble, infos, group, damaged) -> TrainState:
  """Trains a run with rewards in Python, and returns its last state as that of a population of one."""
  del mesh
  (config,), ((name, info),) = configs, infos.items()
  state = init_finetuning(model, config, reference.params, None, [one.params for one in ensemble])
  probe = jax.jit(make_probe(model, jax.device_get(state.ref_params), info.task, config.loss.temperature))
  key, numbers = finetuning_keys(config)[1], Hyperparameters.of(config)
  with RewardPool(config.reward_workers, config.reward_seconds) as pool:
    step = make_host_step(model, task, config, None, pool)

    def advance(state, number):
      probed = probe(state.params)  # before the update, as in a population
      state, metrics = step(state, key, numbers, number)
      return state, metrics | probed

    state = loop.run(advance, state, config.num_iterations, info, group / 'members' / name, config.save_every,
                     show=('accuracy', 'reward', 'kl', 'weight'), damaged=damaged)
  return state.replace(params=jax.tree.map(lambda x: x[None], state.params))


def say_testing(what: str, num_problems: int) -> None:
  """Prints that a test begins."""
  hosts.say(f'Testing {what}: greedy and sampled answers to 2 x {num_problems} problems (four programs to compile, 5 '
            'to 20 s each on a CPU).')


def _keep_params(workdir, info, name, params):
  """Saves the last parameters of a run as a workdir, with a link to their reference."""
  home = run_path(workdir, name)
  unfinished = home / 'checkpoints.unfinished'
  shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed here
  checkpoint.save_params(unfinished, params, info, info.training.num_iterations)
  storage.replace_directory(unfinished, home / 'checkpoints')  # exists if the run is repeated
  own = references_path(workdir, info.training.reference) / 'reference'
  if own.is_dir() and not (home / 'reference').exists():  # the shipped reference needs no link
    (home / 'reference').symlink_to(pathlib.Path('..', '..', own.relative_to(workdir / 'working')))


def reference_record(load: Callable[[], Checkpoint], config: FinetuneConfig, workdir: pathlib.Path, num_problems: int,
                     name: str = '') -> Record:
  """Returns the record of a reference; loads, tests and records it if it has none. An empty name means `base`.

  The record says how the reference was pre-trained, and how long it took if it was pre-trained under this workdir.

  Args:
    load: loads the reference.
    config: a run on it, whose problems are those of the test.
    workdir: directory of the studies.
    num_problems: problems of each test.
    name: name of the record.
  """
  name = name or 'base'
  path = workdir / 'references' / f'{name}.json'
  if path.is_file():
    return read_record(path)
  start, reference = time.monotonic(), load()
  settings = settings_of(reference, config)
  mesh = population.members_mesh(1)
  own = reference.info.model
  model = make_model(dataclasses.replace(reference_config(config.model_of(own), own), remat=False))  # as in its runs
  stacked = jax.tree.map(lambda x: x[None], reference.params)
  say_testing(f'the reference {name}', num_problems)
  test = make_members_test(model, settings, num_problems, mesh, config.loss.temperature, progress=hosts.is_first())
  tests = test(stacked, reference.params)
  about = {'test_seconds': round(time.monotonic() - start, 1), **describe_reference(reference, workdir, name),
           **describe_machine()}
  record = Record(name, None, known_task_of(settings).sizes(settings)[0], [], tests[0], about)
  write_record(path, record)
  return record


def describe_reference(reference: Checkpoint, workdir: pathlib.Path, name: str) -> dict[str, Any]:
  """Describes a reference's pre-training: config, `step` and, if it was under the workdir, the seconds."""
  training = reference.info.training
  rows = loop.read_metrics(references_path(workdir, name) / 'metrics.jsonl')
  return {'step': reference.step, 'pretraining': None if training is None else flat_values(training),
          **({'pretraining_seconds': round(sum(row['seconds'] for row in rows), 1)} if rows else {})}


def accuracy_by_digits(load: Callable[[], Checkpoint], first: int, most: int, workdir: pathlib.Path, num_problems: int,
                       name: str) -> list[dict[str, Any]]:
  """Returns the accuracy of a model by number of digits, for operands of identical and of varying length.

  The result is stored under `reading_path(workdir, name, 'levels')` and read from there the next time.

  Args:
    load: loads the model, if it was not tested before.
    first: first number of digits, 0 for the model's N.
    most: how many numbers of digits follow, as far as they fit into the context.
    workdir: directory of the studies.
    num_problems: problems of each number of digits and distribution of lengths.
    name: name of the model, `base` if empty.

  Returns:
    Rows of `evaluation.accuracies`.
  """
  path = reading_path(workdir, name, 'levels')
  if path.is_file():
    rows = storage.read_json(path).get('rows', [])  # older versions stored other intervals: computed anew
    return [row | dict(zip(('low', 'high'), accuracy_interval(row['accuracy'], row['num_problems']))) for row in rows]
  policy = load()
  hosts.say(f'Testing {name or "the reference base"} by number of digits.')
  first = first or policy.info.task.known_digits
  fitting = [n for n in range(first, first + most + 1)
             if prompt_length(n) + solution_length(n) + LENGTH_MARGIN <= policy.info.model.context_length]
  lengths = ['identical', 'varying']
  sets = by_digits_and_distribution(policy.info.task, fitting, lengths, num_problems, policy.info.model.context_length)
  cells = accuracies(make_model(dataclasses.replace(policy.info.model, remat=False)), policy.params, sets)
  rows = list(tqdm.tqdm(cells, 'tests', len(fitting) * len(lengths), unit='cell', disable=not hosts.is_first()))
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, {'rows': rows, 'about': describe_machine()})
  return rows


def accuracy_by_size(load: Callable[[], Checkpoint], config: FinetuneConfig, workdir: pathlib.Path, num_problems: int,
                     name: str) -> list[dict[str, Any]]:
  """Returns the accuracy of a reference by the size of problems from its N on, measured or read.

  Args:
    load: loads the reference, if it was not tested before.
    config: a run on it, whose problems are those of the test.
    workdir, num_problems, name: as in `accuracy_by_digits`.

  Returns:
    Rows of `evaluation.accuracies`, labelled with the unit of the size. Sizes are N to N + 3 of additions, else to
    N + k.
  """
  if config.task == 'addition':
    return accuracy_by_digits(load, 0, 3, workdir, num_problems, name)
  path = reading_path(workdir, name, 'levels')
  if path.is_file():
    return storage.read_json(path).get('rows', [])
  reference = load()
  settings = settings_of(reference, config)
  known, (least, extra) = known_task_of(settings), known_task_of(settings).sizes(settings)
  hosts.say(f'Testing {name or "the reference base"} by number of {known.unit}.')
  sizes = list(range(least, least + extra + 1))
  task, draw = known.tests(settings, sizes)
  problem_key, answer_key = jax.random.split(jax.random.key(0))
  sets = [ProblemSet(task, problems, answer_key, {known.unit: int(size)})
          for size, problems in draw(problem_key, num_problems).items()]
  rows = list(accuracies(make_model(dataclasses.replace(reference.info.model, remat=False)), reference.params, sets))
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, {'rows': rows, 'about': describe_machine()})
  return rows


@functools.cache
def describe_machine() -> dict[str, Any]:
  """Describes the code's commit (with `+` if files differ from it), the device and the versions of the libraries.

  Cached: a later call in the same process returns the same.
  """
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
