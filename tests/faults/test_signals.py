"""A signal ends every binary with a sentence and the status of what was stopped, whatever it is at."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import finetuned_workdir
from processes import ROOT, catches, finish, run, start

from critkl_jax.runtime.interruption import STOPPED
from experiments.__main__ import programs

pytestmark = pytest.mark.skipif(not pathlib.Path('/proc/self/status').is_file(), reason='asks Linux for handlers')
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Runs a binary that stays where it calls a function for the n-th time, or has called it, until a signal comes.
STAYS = '''
import ctypes, importlib, runpy, sys
from critkl_jax.runtime import interruption

def stay():
  print('stays', file=sys.stderr, flush=True)
  for _ in range(60000):
    ctypes.CDLL(None).usleep(1000)  # outside of Python, as the compiler is
    if interruption._current.caught:
      return

def staying(*arguments, **named):
  global left
  left -= 1
  if left == 0 and when == 'in':
    stay()
  result = function(*arguments, **named)
  if left == 0 and when == 'after':
    stay()
  return result

binary, when, left, place = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split(':')
module = importlib.import_module(place[0])
function = getattr(module, place[1])
setattr(module, place[1], staying)
sys.argv = [binary, *sys.argv[5:]]
runpy.run_module('experiments.' + binary, run_name='__main__', alter_sys=True)
'''


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  home = tmp_path_factory.mktemp('runs') / 'some'
  finetuned_workdir(home, steps=(2,))
  return home


def wait_for_handlers(process):
  while not catches(process, signal.SIGTERM):  # SIGINT has one of Python's own before
    assert process.poll() is None
    time.sleep(0.002)


def stopped_where_it_stays(number, binary, flags, *place):
  process = start(binary, binary, *place, *flags, command=('-c', STAYS))
  said = ''
  while 'stays' not in said:
    said = process.stderr.readline()
    assert said or process.poll() is None, process.stdout.read()
  process.send_signal(number)
  sent = time.monotonic()
  code, _, err = finish(process)
  assert time.monotonic() - sent < 30
  assert code == STOPPED, err
  assert 'Traceback' not in err
  return ' '.join(err.split())


@pytest.mark.parametrize('binary', programs())
def test_a_binary_is_answerable_before_its_slow_imports(binary):
  number = SIGNALS[len(binary) % 2]
  process = start(binary, '--help')
  wait_for_handlers(process)
  assert 'jaxlib' not in pathlib.Path(f'/proc/{process.pid}/maps').read_text()  # which is most of the imports
  process.send_signal(number)
  code, out, err = finish(process)
  assert (code, out) == (STOPPED, '')
  assert err == f'\nStopped by {number.name} before anything had to be saved; every file that was written is whole.\n'


def test_the_command_of_the_package_is_answerable_too():
  code = 'import sys; sys.argv = ["critkl", "finetune", "--help"]; from experiments.__main__ import main; main()'
  process = start('', command=('-c', code))
  wait_for_handlers(process)
  process.send_signal(signal.SIGTERM)
  code, _, err = finish(process)
  assert code == STOPPED
  assert 'Stopped by SIGTERM' in err


def test_who_imports_the_binaries_keeps_their_own_handlers():
  code = ('import signal\n'
          'before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n'
          'import experiments.flags\n'
          'assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n'
          'assert signal.set_wakeup_fd(-1) == -1')
  assert finish(start('', command=('-c', code)))[0] == 0


BEFORE = 'before anything had to be saved'
STAGES = {
    'reading flags': (signal.SIGINT, ('in', 1, 'experiments.flags:read_config'), BEFORE),
    'saving the reference': (signal.SIGTERM, ('in', 1, 'critkl_jax.runtime.checkpoint:save'), BEFORE),
    'before the step is compiled': (signal.SIGINT, ('in', 1, 'critkl_jax.training.train_step:make_train_step'), BEFORE),
    'before the first step': (signal.SIGTERM, ('after', 1, 'critkl_jax.runtime.loop:resume'), BEFORE),
    'saving a step': (signal.SIGINT, ('in', 2, 'critkl_jax.runtime.checkpoint:save'), 'of 2; step 1 is saved in'),
    'saving the last step': (signal.SIGTERM, ('in', 3, 'critkl_jax.runtime.checkpoint:save'),
                             'of 2; step 2 is saved in'),
    'before the last test': (signal.SIGINT, ('after', 1, 'critkl_jax.runtime.loop:run'), '; step 2 is saved in'),
    'drawing': (signal.SIGTERM, ('in', 1, 'critkl_jax.analysis.curves:plot_learning_curves'), '; step 2 is saved in'),
}


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_finetune_is_stopped_with_a_sentence(workdir, tmp_path, stage):
  number, place, says = STAGES[stage]
  flags = ('--preset=smoke', f'--reference={workdir / "reference"}', '--eval_problems=2', f'--workdir={tmp_path}')
  err = stopped_where_it_stays(number, 'finetune', flags, *place)
  assert f'topped by {number.name}' in err
  assert says in err
  assert not (tmp_path / 'summary.json').exists()
  if stage == 'saving the last step':
    run('finetune', *flags)
    assert json.loads((tmp_path / 'summary.json').read_text())['last_iteration']['step'] == 2


@pytest.mark.slow
@pytest.mark.parametrize(('binary', 'flags', 'place'), [
    ('pretrain', ('--preset=smoke', '--workdir={home}'), ('after', 1, 'critkl_jax.runtime.pretraining:pretrain')),
    ('sweep', ('--preset=smoke', '--seeds=1', '--reference={workdir}/reference', '--eval_problems=2',
               '--workdir={home}'), ('after', 1, 'critkl_jax.runtime.loop:run_population')),
    ('reproduce', ('--preset=smoke', '--workdir={home}'), ('in', 2, 'critkl_jax.runtime.checkpoint:save')),
    ('evaluate', ('--checkpoint={workdir}',), ('after', 1, 'critkl_jax.runtime.checkpoint:load_checkpoint')),
    ('analyze', ('--checkpoints={workdir}', '--workdir={home}'),
     ('after', 1, 'critkl_jax.runtime.checkpoint:load_checkpoint')),
    ('compare_checkpoints', ('{workdir}', '{workdir}/reference'),
     ('after', 1, 'critkl_jax.runtime.checkpoint:load_checkpoint')),
], ids=lambda value: value if isinstance(value, str) else '')
def test_the_other_binaries_are_stopped_with_a_sentence(workdir, tmp_path, binary, flags, place):
  number = SIGNALS[len(binary) % 2]
  flags = [flag.format(workdir=workdir, home=tmp_path / 'run') for flag in flags]
  assert f'topped by {number.name}' in stopped_where_it_stays(number, binary, flags, *place)


@pytest.mark.parametrize('number', SIGNALS)
def test_the_command_for_accelerators_ends_with_its_part(tmp_path, number):
  process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.accelerator', '--preset=smoke', f'--json={tmp_path / "found.json"}'], cwd=ROOT,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert 'device: begins' in process.stdout.readline()
  children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  while not (part := children.read_text()):
    time.sleep(0.01)
  process.send_signal(number)
  code, _, err = finish(process)
  assert code == STOPPED
  assert err == f'\nStopped by {number.name}; the parts that ended before are in the file.\n'
  deadline = time.monotonic() + 20
  while pathlib.Path(f'/proc/{part.strip()}').exists():  # it sees the end of its parent once it has started itself
    assert time.monotonic() < deadline
    time.sleep(0.01)
