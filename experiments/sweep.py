"""Fine-tunes a whole study in one program: every combination of seeds and numbers, and says what differs.

    python -m experiments.sweep --certainty_exponents=0,10,150,1000 --seeds=8 --workdir=runs/sweep

The lists vary fields that the single flags (`--certainty_exponent`, ...) set for all members. The same command goes on
where it was stopped. Writes results.json, results.csv and curves.png into the workdir, and for each member
`members/NAME`, a workdir as `experiments.finetune` writes it, for all that reads checkpoints.
"""

import contextlib
import csv
import io
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh

from critkl_jax import checkpoint, config, evaluate, hosts, population, runner, sharding, storage
from critkl_jax.analysis.curves import plot_study
from critkl_jax.config import FinetuneConfig
from critkl_jax.presets import FINETUNE_PRESETS

from .exits import refuse
from .flags import (
    define_config,
    define_damaged,
    define_devices,
    define_wandb,
    read_config,
    read_trackers,
    run,
    take_cores,
)
from .groups import compare, groups_of
from .reference import keep_reference, load_ensemble, load_reference, model_and_task, tested_before
from .tables import command, study_rows
from .workdirs import claim, refuse_fewer_steps

WORKDIR = flags.DEFINE_string('workdir', 'runs/sweep', 'Directory of the study.')
SEEDS = flags.DEFINE_integer('seeds', 4, 'Number of seeds, from --seed on.', lower_bound=1)
PENALTIES = flags.DEFINE_list('penalties', None, 'Values of --kl to combine with the others.')
LISTS = {'certainty_exponent': 'certainty_exponents', 'kl_coefficient': 'kl_coefficients',
         'value_coefficient': 'value_coefficients', 'entropy_coefficient': 'entropy_coefficients',
         'learning_rate': 'learning_rates', 'temperature': 'temperatures'}
for _field, _flag in LISTS.items():
  flags.DEFINE_list(_flag, None, f'Values of --{_field} to combine with the others.')
MAPPING = flags.DEFINE_enum('population_map', 'auto', ['auto', *population.MAPPINGS],
                            'How members are computed: side by side, one after another, or spread over the devices.')
define_config(FinetuneConfig, FINETUNE_PRESETS, 'tiny')
define_devices()
define_damaged()
define_wandb()


def main() -> None:
  """Tests the reference, advances all members, tests each, and compares the groups with the standard penalty."""
  start = time.monotonic()
  base, workdir = read_config(FINETUNE_PRESETS), storage.to_path(WORKDIR.value)
  configs = read_members(base)
  names, mesh = population.names(configs), read_study_mesh(base, len(configs))
  tracks = {name: read_trackers(member) for name, member in zip(names, configs)}
  hosts.say(f'{len(configs)} members: {", ".join(names[:4])}{", ..." if len(names) > 4 else ""}; in {workdir}.')
  check_workdir(workdir, base, names)
  reference = load_reference(base, workdir, sharding.without_members(mesh))
  known = reference.info.known_digits
  model, task = model_and_task(base, reference)
  infos = {name: checkpoint.CheckpointInfo(model=model.config, known_digits=known, training=member)
           for name, member in zip(names, configs)}
  for name, info in infos.items():
    runner.check_workdir(workdir / 'members' / name, info)
  with hosts.waiting(f'Compiling the training step of {len(configs)} members (once, 20 to 90 s on a CPU).'):
    step, memory = compile_step(model, task, configs, mesh)
  one_mesh = sharding.without_members(mesh)
  ensemble = load_ensemble(base, reference, one_mesh)
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


def check_workdir(workdir: pathlib.Path, base: FinetuneConfig, names: Sequence[str]) -> None:
  """Keeps other runs out of the workdir, and exits with one line if it holds something else than this study."""
  claim(workdir, 'sweep')
  hosts.first_does(lambda: runner.check_members(workdir, list(names)), ValueError)
  for name in names:
    refuse_fewer_steps(workdir / 'members' / name / 'checkpoints', base.num_iterations, 'num_iterations')


def read_members(base: FinetuneConfig) -> tuple[FinetuneConfig, ...]:
  """Returns the members that the flags ask for, or exits with one line."""
  values: dict[str, Any] = {'kl': PENALTIES.value} if PENALTIES.value else {}
  for field, flag in LISTS.items():
    given = flags.FLAGS[flag].value
    try:
      values |= {field: [float(x) for x in given]} if given else {}
    except ValueError:
      refuse(f'--{flag}: expected numbers, got {given}.')
  if not values:
    values = {'certainty_exponent': [0.0, base.loss.certainty_exponent]}
  try:
    return population.product(base, **values, seed=range(base.seed, base.seed + SEEDS.value))
  except ValueError as error:
    refuse(f'--{error}')


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
    low, high = evaluate.accuracy_interval(before[name], base.eval_problems)
    print(f'\nGreedy answers to {base.eval_problems} problems of {digits} digits ({name}: '
          f'{"as in pre-training" if name == "N" else "as in fine-tuning"}); right answers of the reference: '
          f'{100 * before[name]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]')
    print(study_rows(comparison[name]))
  some = ','.join(str(workdir / 'members' / names[group.members[0]]) for group in groups[:2])
  print(f'\n{seconds:.0f} s. In {workdir}: results.json, results.csv, curves.png, members/, reference/.\n'
        f'Next, token by token: {command("analyze", f"--checkpoints={some}", f"--workdir={workdir}/analysis")}')


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
  run(main)
