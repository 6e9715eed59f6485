"""Fine-tunes every combination of seeds and hyper-parameters in one program, and compares the results.

    python -m experiments.sweep --certainty_exponents=0,10,150,1000 --seeds=8 --workdir=runs/sweep

The lists vary fields that the single flags (`--certainty_exponent`, ...) set for all members. The same command resumes
a stopped sweep. Writes results.json, results.csv and curves.png into the workdir, and for each member `members/NAME`, a
workdir like those of `experiments.finetune`.
"""

import contextlib
import csv
import functools
import io
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh

from critkl_jax import config, sharding
from critkl_jax.analysis import evaluation
from critkl_jax.models.language_model import LanguageModel
from critkl_jax.runtime import checkpoint, hosts, loop, resuming, storage
from critkl_jax.tasks.known_tasks import known_task_of, to_json_object
from critkl_jax.tasks.task import Task
from critkl_jax.training import population
from critkl_jax.training.config import FinetuneConfig
from critkl_jax.training.memory import Memory, available_memory
from critkl_jax.training.presets import FINETUNE_PRESETS

from . import parsing, paths
from .exits import FAILED, end, refuse
from .flags import (
  check_attention,
  check_devices,
  define_config,
  define_devices,
  define_training,
  read_config,
  read_trackers,
  run,
  use_cores_as_devices,
)
from .groups import compare, groups_of
from .reference import (
  check_ensemble,
  keep_reference,
  load_ensemble,
  load_reference,
  locate_reference,
  model_and_task,
  task_settings,
  tested_before,
)
from .tables import command, share_text, size_of, study_rows
from .workdirs import claim, refuse_fewer_steps

WORKDIR = flags.DEFINE_string('workdir', 'runs/sweep', 'Directory of the sweep.')
SEEDS = flags.DEFINE_integer('seeds', 4, 'Number of seeds, starting at --seed.', lower_bound=1)
PENALTIES = flags.DEFINE_list('penalties', None, 'Values of --kl to combine with the others.')
LISTS = {'certainty_exponent': 'certainty_exponents', 'kl_coefficient': 'kl_coefficients',
         'value_coefficient': 'value_coefficients', 'entropy_coefficient': 'entropy_coefficients',
         'learning_rate': 'learning_rates', 'temperature': 'temperatures'}
for _field, _flag in LISTS.items():
  flags.DEFINE_list(_flag, None, f'Values of --{_field} to combine with the others.')
MOST_MEMBERS = 4096
MAPPING = flags.DEFINE_enum('population_map', 'auto', ['auto', *population.MAPPINGS],
                            'Mapping of the members: vectorized, one after another, or sharded over the devices.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')
define_devices()
define_training()


def check() -> tuple[Any, ...]:
  """Checks the flags and returns the arguments of `main`, or exits with one line."""
  base = read_config(FINETUNE_PRESETS)
  configs = read_members(base)
  tracks = {name: read_trackers(member) for name, member in zip(population.names(configs), configs)}
  check_devices()
  workdir = paths.read_workdir('workdir', WORKDIR.value)
  for name in tracks:
    refuse_fewer_steps(workdir / 'members' / name / 'checkpoints', base.num_iterations, 'num_iterations')
  reference = locate_reference(base, workdir)
  model, task = model_and_task(base, reference)
  if task.host:
    refuse('--reward: the members of a study are one program, which cannot wait for rewards in Python; run finetune '
           'for each of them.')
  check_ensemble(base, reference)
  return base, configs, workdir, tracks, model, task


def main(base: FinetuneConfig, configs: tuple[FinetuneConfig, ...], workdir: storage.Path, tracks: dict[str, Callable],
         model: LanguageModel, task: Task) -> None:
  """Tests the reference, trains all members, tests them, and compares the groups with the standard penalty."""
  start, names = time.monotonic(), population.names(configs)
  mesh = read_study_mesh(base, len(configs))
  check_attention(model.config)
  hosts.say(f'{len(configs)} members: {", ".join(names[:4])}{", ..." if len(names) > 4 else ""}; in {workdir}.')
  claim(workdir, 'sweep')
  hosts.first_does(lambda: resuming.check_members(workdir, list(names)),
                   checkpoint.CheckpointError, storage.WorkdirError)
  reference = load_reference(base, workdir, sharding.without_members(mesh))
  settings = task_settings(base, reference)
  known = known_task_of(settings)
  infos = {name: checkpoint.CheckpointInfo(model=model.config, task=settings, training=member,
                                            architecture=model.name)
           for name, member in zip(names, configs)}
  for name, info in infos.items():
    resuming.check_workdir(workdir / 'members' / name, info)
  with hosts.waiting(f'Compiling the training step of {len(configs)} members (once, 20 to 90 s on a CPU).'):
    step, memory = compile_step(model, task, configs, mesh)
  one_mesh = sharding.without_members(mesh)
  ensemble = load_ensemble(population.shared_config(configs), one_mesh)
  keep_reference(workdir, reference)
  for name in names:
    link_reference(workdir, name)

  draw = functools.partial(known.before_and_after, settings=settings, number=base.eval_problems)
  test = evaluation.make_test(model, task, draw, mesh=one_mesh)
  said = (f'Testing the reference: greedy answers to up to 2 x {base.eval_problems} problems (with its compilation 10 '
          'to 40 s on a CPU).')
  with hosts.waiting(said) if base.eval_problems else contextlib.nullcontext():
    before = tested_before(test, reference.params, base, settings, workdir)
  state = population.init_population(model, configs, reference.params, mesh, ensemble)
  del reference  # the state has its own
  numbers = population.numbers_of(configs, mesh)
  state = loop.run_population(lambda state, _: step(state, *numbers), state, base.num_iterations, infos, workdir,
                              base.save_every, show=('accuracy', 'kl'),
                              track=lambda home, first: tracks[home.name](home, first), damaged=flags.FLAGS.damaged)
  if base.eval_problems:
    hosts.say(f'Testing {len(configs)} members on the same problems.')
  members = (sharding.place(params, one_mesh, model.partition) for params in population.members_on_host(state.params))
  tests = test_members(test, members, names, workdir)
  if hosts.is_first():
    report(base, configs, settings, before, tests, memory, workdir, time.monotonic() - start)


def read_members(base: FinetuneConfig) -> tuple[FinetuneConfig, ...]:
  """Returns the configs of all members, or exits with one line."""
  penalties = parsing.read_names(PENALTIES)
  if penalties and len(set(penalties)) < len(penalties):
    refuse(f'--penalties: expected none twice, got {",".join(penalties)}.')
  values: dict[str, Any] = {'kl': penalties} if penalties else {}
  for field, flag in LISTS.items():
    given = parsing.read_numbers(flag, flags.FLAGS[flag].value)
    values |= {field: given} if given else {}
  if not values and 'certainty_exponent' in config.counting_values(base):
    values = {'certainty_exponent': [0.0, base.loss.certainty_exponent]}
  number = math.prod(map(len, values.values())) * SEEDS.value
  if number > MOST_MEMBERS:
    refuse(f'--seeds: {number} members are more than a study takes, {MOST_MEMBERS}; give fewer seeds or values.')
  try:
    members = population.product(base, **values, seed=range(base.seed, base.seed + SEEDS.value))
  except ValueError as error:
    field = str(error).partition(':')[0]
    own = {'kl': 'penalties', **LISTS} if field in values else {}
    refuse(f'--{own.get(field, field)}{str(error)[len(field):]}')
  count = {name for member in members for name in config.counting_values(member)}
  for name in config.flat_fields(FinetuneConfig):
    if flags.FLAGS[name].present and name not in count:
      refuse(f'--{name}: has no effect on any member; leave it out, or add the --penalties that read it.')
  return members


def read_study_mesh(base: FinetuneConfig, num_members: int) -> Mesh:
  """Returns the mesh of the flags, or exits with one line; by default the members are divided among the devices."""
  text, together = flags.FLAGS.mesh, MAPPING.value in ('vmap', 'scan')
  if not (text or together or flags.FLAGS.multi_host or flags.FLAGS.coordinator_address):
    use_cores_as_devices(num_members)
  try:
    if text or (together and jax.process_count() > 1):
      mesh = sharding.make_mesh(text)
      sharding.check_episodes(mesh, base.episodes // base.minibatches)
      return mesh
    return sharding.make_mesh('data:1') if together else population.members_mesh(num_members)
  except ValueError as error:
    refuse(f'--{error}')


def compile_step(model, task, configs: tuple[FinetuneConfig, ...], mesh: Mesh) -> tuple[Callable, Memory]:
  """Compiles the step of all members, or exits with one line if the flags are wrong or memory does not suffice."""
  parts = mesh.shape['member']
  limit = hosts.least((available_memory(mesh) or 0) // 2**20) * 2**20  # 0 if unknown
  try:
    step, memory = population.compile_step(model, task, configs, mesh, MAPPING.value)
  except ValueError as error:
    refuse(f'--{error}')
  except jax.errors.JaxRuntimeError as error:  # compilers for accelerators check the memory
    if 'RESOURCE_EXHAUSTED' not in str(error) or len(configs) == parts or not limit:
      raise
    _, few = population.compile_step(model, task, configs[:parts], mesh, MAPPING.value)
    memory = few.of(len(configs) // parts)
  if limit and memory.total > limit:
    refuse(
        f'{len(configs)} members need {memory.total / 2**30:.1f} GiB a device with --population_map='
        f'{memory.mapping}, and {limit / 2**30:.1f} GiB are free: about {memory.fitting(limit) * parts} would fit; '
        'take fewer --seeds or values.')
  return step, memory


def link_reference(workdir: storage.Path, name: str) -> None:
  """Links the study's reference into the workdir of a member."""
  home = workdir / 'members' / name
  with storage.writing(home):
    home.mkdir(parents=True, exist_ok=True)
  # A bucket has no links: there the readers of checkpoints look in the study's workdir.
  if hosts.is_first() and not storage.is_remote(home) and not (home / 'reference').exists():
    (home / 'reference').symlink_to(pathlib.Path('..', '..', 'reference'))


def test_members(test, members, names, workdir) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
  """Tests each member, and saves the result in its workdir."""
  tests = []
  for name, own in zip(tqdm.tqdm(names, 'tests', unit='member', disable=not hosts.is_first()), members):
    tests.append(test(own))
    storage.write_json(workdir / 'members' / name / 'after.json', tests[-1][0])
  return tests


def report(base, configs, settings, before, tests, memory, workdir, seconds) -> None:
  """Prints the tables, and writes results and pictures."""
  from critkl_jax.analysis.curves import plot_study  # slow import, not needed to check flags

  names, groups = population.names(configs), groups_of(configs)
  sets = known_task_of(settings).named_sets(settings)
  curves = [loop.read_metrics(workdir / 'members' / name / 'metrics.jsonl') for name in names]
  plot_study({g.label: [curves[i] for i in g.members] for g in groups}, workdir / 'curves.png',
             f'{known_task_of(settings).title(settings)}, {len(configs)} members', reference=before.get(list(sets)[-1]))
  tested = tuple(sets) if base.eval_problems else ()
  comparison = {name: compare(groups, tests, name) for name in tested}
  members = [{'name': name, **own, **tests[i][0], 'last_iteration': curves[i][-1] if curves[i] else {}}
             for i, (name, own) in enumerate(zip(names, population.differences(configs)))]
  result = {'before': before, 'comparison': comparison, 'members': members, 'wall_seconds': seconds,
            'population_map': memory.mapping, 'config': config.flat_values(base), 'task': to_json_object(settings),
            'device': jax.devices()[0].device_kind}
  storage.write_json(workdir / 'results.json', result)
  storage.write_text(workdir / 'results.csv', as_csv(members))
  for name in tested:
    number = size_of(sets[name], base.eval_problems)
    print(f'\nGreedy answers to {number} problems, {sets[name].meaning}; right answers of the reference: '
          f'{share_text(before[name], number).strip()}')
    print(study_rows(comparison[name]))
  checkpoints = ','.join(str(workdir / 'members' / names[group.members[0]]) for group in groups[:2])
  refuse_idle(names, curves, base.num_updates)
  print(f'\n{seconds:.0f} s. In {workdir}: results.json, results.csv, curves.png, members/, reference/.\n'
        f'Next, token by token: {command("analyze", f"--checkpoints={checkpoints}", f"--workdir={workdir}/analysis")}')


def refuse_idle(names: Sequence[str], curves: list[list[dict[str, float]]], num_updates: int) -> None:
  """Exits with one line if members made no update in the last iteration, because a term was not finite."""
  idle = [name for name, rows in zip(names, curves) if rows and rows[-1].get('skipped_updates', 0) >= num_updates]
  if idle:
    end(FAILED, f'error: {", ".join(idle)}: no update in the last iteration, because a term was not finite; the '
                'results of these members are not those of a whole training.')


def as_csv(members: list[dict[str, Any]]) -> str:
  """Formats a CSV line for each member: its settings, its test and its last metrics."""
  rows = [{k: v for k, v in member.items() if not isinstance(v, dict)}
          | {f'tokens/{k}': v for k, v in (member.get('tokens') or {}).items()}
          | {f'last/{k}': v for k, v in member['last_iteration'].items()} for member in members]
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


if __name__ == '__main__':
  run(main, check)
