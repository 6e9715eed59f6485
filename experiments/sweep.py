"""Fine-tunes a whole study in one program: every combination of seeds and numbers, and says what differs.

    python -m experiments.sweep --certainty_exponents=0,10,150,1000 --seeds=8 --workdir=runs/sweep

The lists vary fields that the single flags (`--certainty_exponent`, ...) set for all members. The same command goes on
where it was stopped. Writes results.json, results.csv and curves.png into the workdir, and for each member
`members/NAME`, a workdir as `experiments.finetune` writes it, for all that reads checkpoints.
"""

import contextlib
import csv
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

from critkl_jax import checkpoint, config, evaluate, hosts, population, resuming, runner, sharding, storage
from critkl_jax.config import FinetuneConfig
from critkl_jax.gpt2 import GPT2
from critkl_jax.presets import FINETUNE_PRESETS
from critkl_jax.tasks.task import Task

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
    take_cores,
)
from .groups import compare, groups_of
from .reference import (
    check_ensemble,
    find_reference,
    keep_reference,
    load_ensemble,
    load_reference,
    model_and_task,
    tested_before,
)
from .tables import command, share_text, study_rows
from .workdirs import claim, refuse_fewer_steps

WORKDIR = flags.DEFINE_string('workdir', 'runs/sweep', 'Directory of the study.')
SEEDS = flags.DEFINE_integer('seeds', 4, 'Number of seeds, from --seed on.', lower_bound=1)
PENALTIES = flags.DEFINE_list('penalties', None, 'Values of --kl to combine with the others.')
LISTS = {'certainty_exponent': 'certainty_exponents', 'kl_coefficient': 'kl_coefficients',
         'value_coefficient': 'value_coefficients', 'entropy_coefficient': 'entropy_coefficients',
         'learning_rate': 'learning_rates', 'temperature': 'temperatures'}
for _field, _flag in LISTS.items():
  flags.DEFINE_list(_flag, None, f'Values of --{_field} to combine with the others.')
MOST_MEMBERS = 4096
MAPPING = flags.DEFINE_enum('population_map', 'auto', ['auto', *population.MAPPINGS],
                            'How members are computed: side by side, one after another, or spread over the devices.')
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
  reference = find_reference(base, workdir)
  model, task = model_and_task(base, reference)
  check_ensemble(base, reference)
  return base, configs, workdir, tracks, model, task


def main(base: FinetuneConfig, configs: tuple[FinetuneConfig, ...], workdir: storage.Path, tracks: dict[str, Callable],
         model: GPT2, task: Task) -> None:
  """Tests the reference, advances all members, tests each, and compares the groups with the standard penalty."""
  start, names = time.monotonic(), population.names(configs)
  mesh = read_study_mesh(base, len(configs))
  check_attention(model.config)
  hosts.say(f'{len(configs)} members: {", ".join(names[:4])}{", ..." if len(names) > 4 else ""}; in {workdir}.')
  claim(workdir, 'sweep')
  hosts.first_does(lambda: resuming.check_members(workdir, list(names)),
                   checkpoint.CheckpointError, storage.WorkdirError)
  reference = load_reference(base, workdir, sharding.without_members(mesh))
  known = reference.info.known_digits
  infos = {name: checkpoint.CheckpointInfo(model=model.config, known_digits=known, training=member)
           for name, member in zip(names, configs)}
  for name, info in infos.items():
    resuming.check_workdir(workdir / 'members' / name, info)
  with hosts.waiting(f'Compiling the training step of {len(configs)} members (once, 20 to 90 s on a CPU).'):
    step, memory = compile_step(model, task, configs, mesh)
  one_mesh = sharding.without_members(mesh)
  ensemble = load_ensemble(base, one_mesh)
  keep_reference(workdir, reference)
  for name in names:
    link_reference(workdir, name)

  test = evaluate.make_test(model, known, base.extra_digits, base.eval_problems, mesh=one_mesh)
  said = (f'Testing the reference: greedy answers to 2 x {base.eval_problems} problems, {known} and '
          f'{known + base.extra_digits} digits (with its compilation 10 to 40 s on a CPU).')
  with hosts.waiting(said) if base.eval_problems else contextlib.nullcontext():
    before = tested_before(test, reference.params, base, workdir)
  state = population.init_population(model, configs, reference.params, mesh, ensemble)
  del reference  # the state has its own
  numbers = population.numbers_of(configs, mesh)
  state = runner.run_population(lambda state, _: step(state, *numbers), state, base.num_iterations, infos, workdir,
                                base.save_every, show=('accuracy', 'kl'),
                                track=lambda home, first: tracks[home.name](home, first),
                                damaged=flags.FLAGS.damaged)
  if base.eval_problems:
    hosts.say(f'Testing {len(configs)} members on the same problems.')
  tests = test_members(test, population.members_on_host(state.params), names, workdir, one_mesh)
  if hosts.is_first():
    report(base, configs, known, before, tests, memory, workdir, time.monotonic() - start)


def read_members(base: FinetuneConfig) -> tuple[FinetuneConfig, ...]:
  """Returns the members that the flags ask for, or exits with one line."""
  penalties = parsing.read_names(PENALTIES)
  if penalties and len(set(penalties)) < len(penalties):
    refuse(f'--penalties: expected none twice, got {",".join(penalties)}.')
  values: dict[str, Any] = {'kl': penalties} if penalties else {}
  for field, flag in LISTS.items():
    given = parsing.read_numbers(flag, flags.FLAGS[flag].value)
    values |= {field: given} if given else {}
  if 'certainty_exponent' in values and 'prioritized' not in values.get('kl', [base.loss.kl]):
    refuse('--certainty_exponents: only the prioritized penalty has an exponent; add it to --penalties, or leave the '
           'exponents out.')
  if not values:
    values = {'certainty_exponent': [0.0, base.loss.certainty_exponent]}
  number = math.prod(map(len, values.values())) * SEEDS.value
  if number > MOST_MEMBERS:
    refuse(f'--seeds: {number} members are more than a study takes, {MOST_MEMBERS}; give fewer seeds or values.')
  try:
    return population.product(base, **values, seed=range(base.seed, base.seed + SEEDS.value))
  except ValueError as error:
    field = str(error).partition(':')[0]
    own = {'kl': 'penalties', **LISTS} if field in values else {}
    refuse(f'--{own.get(field, field)}{str(error)[len(field):]}')


def read_study_mesh(base: FinetuneConfig, num_members: int) -> Mesh:
  """Returns the mesh that the flags ask for, or exits with one line; if none, one of members unless they are to be kept
  together."""
  text, together = flags.FLAGS.mesh, MAPPING.value in ('vmap', 'scan')
  if not (text or together or flags.FLAGS.multi_host or flags.FLAGS.coordinator_address):
    take_cores(num_members)
  try:
    if text or (together and jax.process_count() > 1):
      mesh = sharding.make_mesh(text)
      sharding.check_episodes(mesh, base.episodes // base.minibatches)
      return mesh
    return sharding.make_mesh('data:1') if together else population.members_mesh(num_members)
  except ValueError as error:
    refuse(f'--{error}')


def compile_step(model, task, configs: tuple[FinetuneConfig, ...], mesh: Mesh) -> tuple[Callable, population.Memory]:
  """Compiles the step of all members, or exits with one line if it cannot be or they do not fit into the memory."""
  parts = mesh.shape['member']
  limit = hosts.least((population.available_memory(mesh) or 0) // 2**20) * 2**20  # 0 where nobody knows
  try:
    step, memory = population.compile_step(model, task, configs, mesh, MAPPING.value)
  except ValueError as error:
    refuse(f'--{error}')
  except jax.errors.JaxRuntimeError as error:  # a compiler that knows the memory of its devices
    if 'RESOURCE_EXHAUSTED' not in str(error) or len(configs) == parts or not limit:
      raise
    _, few = population.compile_step(model, task, configs[:parts], mesh, MAPPING.value)
    memory = few.of(len(configs) // parts)
  if limit and memory.total > limit:
    refuse(
        f'{len(configs)} members need {memory.total / 2**30:.1f} GiB a device with --population_map='
        f'{memory.mapping}, and {limit / 2**30:.1f} GiB are free: some {memory.fitting(limit) * parts} would fit; take '
        'fewer --seeds or values.')
  return step, memory


def link_reference(workdir: storage.Path, name: str) -> None:
  """Lets a member's workdir show the study's reference as its own."""
  home = workdir / 'members' / name
  with storage.writing(home):
    home.mkdir(parents=True, exist_ok=True)
  if hosts.is_first() and not storage.is_remote(home) and not (home / 'reference').exists():  # else readers look above
    (home / 'reference').symlink_to(pathlib.Path('..', '..', 'reference'))


def test_members(test, params, names, workdir, mesh) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
  """Tests each member, and leaves the result in its workdir."""
  tests = []
  for name, own in zip(tqdm.tqdm(names, 'tests', unit='member', disable=not hosts.is_first()), params):
    tests.append(test(sharding.place(own, mesh)))
    storage.write_json(workdir / 'members' / name / 'after.json', tests[-1][0], indent=None)
  return tests


def report(base, configs, known, before, tests, memory, workdir, seconds) -> None:
  """Prints the table and writes results and pictures."""
  from critkl_jax.analysis.curves import plot_study  # draws, for which no wrong flag should wait

  names, groups = population.names(configs), groups_of(configs)
  curves = [runner.read_metrics(workdir / 'members' / name / 'metrics.jsonl') for name in names]
  plot_study({g.label: [curves[i] for i in g.members] for g in groups}, workdir / 'curves.png',
             f'{known} + {base.extra_digits} digits, {len(configs)} members',
             reference=before.get(f'N+{base.extra_digits}'))
  tested = ('N', f'N+{base.extra_digits}') if base.eval_problems else ()
  comparison = {name: compare(groups, tests, name) for name in tested}
  members = [{'name': name, **own, **tests[i][0], 'last_iteration': curves[i][-1] if curves[i] else {}}
             for i, (name, own) in enumerate(zip(names, population.differences(configs)))]
  result = {'before': before, 'comparison': comparison, 'members': members, 'wall_seconds': seconds,
            'population_map': memory.mapping, 'config': config.flat_values(base), 'known_digits': known,
            'device': jax.devices()[0].device_kind}
  storage.write_json(workdir / 'results.json', result)
  storage.write_text(workdir / 'results.csv', as_csv(members))
  for name in tested:
    digits = known if name == 'N' else known + base.extra_digits
    print(f'\nGreedy answers to {base.eval_problems} problems of {digits} digits ({name}: '
          f'{"as in pre-training" if name == "N" else "as in fine-tuning"}); right answers of the reference: '
          f'{share_text(before[name], base.eval_problems).strip()}')
    print(study_rows(comparison[name]))
  some = ','.join(str(workdir / 'members' / names[group.members[0]]) for group in groups[:2])
  refuse_idle(names, curves, base.num_updates)
  print(f'\n{seconds:.0f} s. In {workdir}: results.json, results.csv, curves.png, members/, reference/.\n'
        f'Next, token by token: {command("analyze", f"--checkpoints={some}", f"--workdir={workdir}/analysis")}')


def refuse_idle(names: Sequence[str], curves: list[list[dict[str, float]]], num_updates: int) -> None:
  """Exits with one line if members made no update in the last iteration, because something was not finite: their
  results are not those of a whole training."""
  idle = [name for name, rows in zip(names, curves) if rows and rows[-1].get('skipped_updates', 0) >= num_updates]
  if idle:
    end(FAILED, f'error: {", ".join(idle)}: no update in the last iteration, because something was not finite; the '
                'results of these members are not those of a whole training.')


def as_csv(members: list[dict[str, Any]]) -> str:
  """Returns a line for each member: what is its own, its test and its last metrics."""
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
