"""A run that is killed at any moment goes on, and comes bit for bit to where it would have come without the kills."""

import contextlib
import pathlib
import random
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import finetuned_workdir, write
from processes import catches, finish, metrics, run, start

from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.interruption import STOPPED

pytestmark = pytest.mark.skipif(not pathlib.Path('/proc/self/status').is_file(), reason='asks Linux for handlers')
SAVE_EVERY = 2
FLAGS = ('--preset=smoke', '--eval_problems=0', f'--save_every={SAVE_EVERY}')
COMMANDS = {
    'finetune': ('--num_iterations=8', '--reference={}'),
    'pretrain': ('--num_steps=12',),
    'sweep': ('--num_iterations=6', '--seeds=1', '--certainty_exponents=0,150', '--reference={}'),
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Command:
  """A binary with its flags, how long it takes, and what it comes to."""

  def __init__(self, binary, home):
    finetuned_workdir(home / 'other', steps=())
    self.binary, self.flags = binary, [flag.format(home / 'other' / 'reference') for flag in COMMANDS[binary]]
    self.run(home / 'compiling')
    begun = time.monotonic()
    self.run(home / 'whole')
    self.seconds, self.wanted = time.monotonic() - begun, results(home / 'whole')

  def start(self, workdir):
    return start(self.binary, *FLAGS, *self.flags, f'--workdir={workdir}')

  def run(self, workdir):
    run(self.binary, *FLAGS, *self.flags, f'--workdir={workdir}')


@pytest.fixture(scope='module')
def command(request, tmp_path_factory):
  return Command(request.param, tmp_path_factory.mktemp(request.param))


def checkpoints_in(workdir):
  return [path.parent.parent for path in workdir.rglob('config/metadata') if path.parent.parent.name.isdigit()]


def results(workdir):
  """Everything that a run comes to: the arrays of its last checkpoints, and metrics but for times."""
  found = {}
  for path in {checkpoint.latest(path.parent) for path in checkpoints_in(workdir)}:
    for item in ('params', 'opt_state'):
      if (path / item).is_dir():
        found[path.relative_to(workdir) / item] = ocp.StandardCheckpointer().restore(path / item)
  for file in workdir.rglob('metrics.jsonl'):
    found[file.relative_to(workdir)] = metrics(file.parent)
  return found


def is_equal(one, other):
  return jax.tree.structure(one) == jax.tree.structure(other) and all(
      np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def lines(workdir):
  """Returns the number of steps of which there are metrics, the least of all members."""
  return min((file.read_text().count('}\n') for file in workdir.rglob('metrics.jsonl')), default=0)


def saved(workdir):
  """Returns the step up to which a run has been saved, the least of all members."""
  return min((max(checkpoint.steps_in(file.parent / 'checkpoints'), default=0)
              for file in workdir.rglob('metrics.jsonl')), default=0)


def is_writing(workdir, since):
  return any(path.stat().st_mtime >= since for path in workdir.rglob('*orbax-checkpoint-tmp*'))


def wait_for(moment, process, workdir, command, rng):
  """Returns at a random moment of a run: of all its time, once a checkpoint is being written, or in its steps."""
  since, before = time.time(), lines(workdir)
  reached = {'any': lambda: True, 'in a write': lambda: is_writing(workdir, since),
             'in the steps': lambda: lines(workdir) != before}[moment]

  def is_there():
    with contextlib.suppress(FileNotFoundError):  # files come and go while they are looked at
      return catches(process, signal.SIGTERM) and reached()
    return False

  while not is_there() and process.poll() is None:
    time.sleep(0.001)
  time.sleep(rng.uniform(0, command.seconds if moment == 'any' else 0.1))


def kill(command, workdir, moment, number, rng):
  """Starts the command and kills it; returns its exit code and the steps that are lost."""
  before, process = (lines(workdir), saved(workdir)), command.start(workdir)
  wait_for(moment, process, workdir, command, rng)
  process.send_signal(number)
  code, _, err = finish(process)
  after = lines(workdir), saved(workdir)
  assert after[1] >= before[1]
  assert code in (0, -number if number == signal.SIGKILL else STOPPED), err
  assert 'Traceback' not in err
  lost = 0 if after == before else max(after[0] - after[1], 0)
  if code == STOPPED:
    assert f'topped by {signal.Signals(number).name}' in err
    assert not lost
  assert lost <= SAVE_EVERY
  return code, lost


def kill_often(command, home, kills, seed):
  """Gives the command again after each kill until it has ended, in one workdir after another, until so many were
  killed."""
  rng, tried, writes, lost, equal, workdirs = random.Random(seed), 0, 0, 0, 0, 0
  while tried < kills:
    workdir, code = home / str(workdirs), None
    for _ in range(6):
      moment = rng.choice(['any', 'in a write', 'in the steps'])
      code, steps = kill(command, workdir, moment, rng.choice(SIGNALS), rng)
      if code == 0 or tried == kills:
        break
      tried, writes, lost = tried + 1, writes + (moment == 'in a write'), lost + steps
    command.run(workdir)
    workdirs, equal = workdirs + 1, equal + is_equal(results(workdir), command.wanted)
    assert not list(workdir.rglob('*orbax-checkpoint-tmp*'))
    print(f'{command.binary}: {tried} kills, {writes} of them in a write, {lost} steps made again, {equal} of '
          f'{workdirs} workdirs bit-equal', flush=True)
  assert equal == workdirs


def test_a_workdir_with_another_number_is_not_equal(tmp_path):
  for name, scale in (('one', 0.0), ('same', 0.0), ('other', 1e-6)):
    arrays = {'x': {'y': np.arange(5.0) + scale}}
    write(tmp_path / name / 'checkpoints', arrays, 3)
    (tmp_path / name / 'metrics.jsonl').write_text(f'{{"step": 3, "loss": 1.5, "seconds": {scale}}}\n')
  one, same, other = (results(tmp_path / name) for name in ('one', 'same', 'other'))
  assert len(one) == 2
  assert is_equal(one, same)
  assert not is_equal(one, other)
  (tmp_path / 'same' / 'metrics.jsonl').write_text('{"step": 3, "loss": 1.25}\n')
  assert not is_equal(one, results(tmp_path / 'same'))


@pytest.mark.slow
@pytest.mark.parametrize('command', ['pretrain'], indirect=True)
def test_a_killed_run_comes_to_the_same(command, tmp_path):
  kill_often(command, tmp_path, 2, seed=0)


@pytest.mark.long
@pytest.mark.parametrize('command', COMMANDS, indirect=True)
def test_a_run_that_is_killed_often_comes_to_the_same(command, tmp_path):
  kill_often(command, tmp_path, 17, seed=1)
