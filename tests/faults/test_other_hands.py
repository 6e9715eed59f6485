"""Workdirs that others use or change at the same time: nothing is lost, and each refusal is one sentence."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import finish, metrics, refused, run, start

from critkl_jax.runtime import checkpoint, locks

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def references(tmp_path_factory):
  """Two pre-trained references of the same step."""
  home = tmp_path_factory.mktemp('pretrained')
  for seed in (0, 1):
    run('pretrain', '--preset=smoke', '--eval_problems=0', f'--seed={seed}', f'--workdir={home / str(seed)}')
  return home / '0' / 'reference', home / '1' / 'reference'


def finetune(reference, workdir, *flags):
  return '--preset=smoke', f'--reference={reference}', f'--workdir={workdir}', '--eval_problems=2', *flags


def contents(directory):
  return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob('*'))
          if path.is_file()}


def until(condition, process, seconds=200):
  for _ in range(10 * seconds):
    if condition():
      return
    assert process.poll() is None, process.communicate()
    time.sleep(0.1)
  raise AssertionError('it did not come to that')


def test_the_only_copy_of_a_reference_is_used_in_place(references, tmp_path):
  for binary, *flags in (('finetune',), ('sweep', '--seeds=1', '--certainty_exponents=0')):
    workdir = tmp_path / binary
    shutil.copytree(references[0], workdir / 'reference')
    before = contents(workdir / 'reference')
    run(binary, *finetune(workdir / 'reference', workdir, *flags))
    assert contents(workdir / 'reference') == before
  run('finetune', *finetune(tmp_path / 'finetune' / 'reference', tmp_path / 'finetune', '--num_iterations=3'))


@pytest.mark.parametrize('binary', ['finetune', 'sweep'])
def test_a_folder_of_that_name_is_kept_and_refused(references, tmp_path, binary):
  (tmp_path / 'reference').mkdir()
  (tmp_path / 'reference' / 'notes.txt').write_text('mine')
  line = refused(binary, *finetune(references[0], tmp_path))
  assert f'{tmp_path / "reference"} exists, and this run did not make it: it is kept.' in line
  assert contents(tmp_path) == {'reference/notes.txt': b'mine'}


@pytest.mark.parametrize(('binary', 'flags', 'name'), [
    ('finetune', ('--preset=smoke',), 'metrics.jsonl'), ('pretrain', ('--preset=smoke',), 'checkpoints/model.pt'),
    ('sweep', ('--preset=smoke',), 'results.csv'), ('reproduce', ('--preset=smoke',), 'README.md'),
    ('analyze', (), 'tokens.csv')])
def test_files_of_others_are_kept_and_refused(tmp_path, binary, flags, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text('mine')
  assert str(tmp_path / pathlib.Path(name).parts[0]) in refused(binary, *flags, f'--workdir={tmp_path}')
  assert contents(tmp_path) == {name: b'mine'}


def test_a_table_is_not_written_over_a_file_of_others(tmp_path):
  (tmp_path / 'table.json').write_text('mine')
  assert 'did not write it' in refused('evaluate', f'--json={tmp_path / "table.json"}')
  assert contents(tmp_path) == {'table.json': b'mine'}


def test_a_second_run_is_refused_while_the_first_lives(references, tmp_path):
  workdir = tmp_path / 'run'
  flags = finetune(references[0], workdir, '--num_iterations=100000', '--save_every=1')
  first = start('finetune', *flags)
  until(lambda: checkpoint.latest(workdir / 'checkpoints') is not None, first)
  for binary, second in (('finetune', ('--seed=1',)), ('finetune', ('--kl=standard',)), ('sweep', ())):
    line = refused(binary, *flags, *second)
    assert f'{workdir} is in use: process {first.pid} on ' in line
  assert f'{workdir} is in use: process {first.pid}' in refused('analyze', f'--workdir={workdir}')
  first.send_signal(signal.SIGTERM)
  assert finish(first)[0] == 75
  rows = metrics(workdir)
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))
  again = start('finetune', *flags)
  until(lambda: len(metrics(workdir)) > len(rows), again)
  again.kill()  # a lock does not survive its process
  again.communicate()
  assert json.loads((workdir / locks.LOCK).read_text())['pid'] == again.pid
  step = int(checkpoint.latest(workdir / 'checkpoints').name)
  run('finetune', *finetune(references[0], workdir, f'--num_iterations={step + 1}', '--save_every=1'))
  assert [row['step'] for row in metrics(workdir)] == list(range(1, step + 2))


def test_both_hosts_end_where_the_first_one_is_refused(references, tmp_path):
  holder = subprocess.Popen(
      [sys.executable, '-c', 'import sys; from critkl_jax.runtime import locks\nwith locks.hold(sys.argv[1]):\n'
       '  print(1, flush=True); sys.stdin.read()', str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  holder.stdout.readline()
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'--coordinator_address=localhost:{free.getsockname()[1]}'
  ended = [finish(process) for process in [
      start('finetune', *finetune(references[0], tmp_path, '--episodes=8'), address, '--num_processes=2',
            f'--process_id={i}', '--host_timeout=20') for i in range(2)]]
  holder.communicate()
  assert [code for code, _, _ in ended] == [2, 2], ended
  assert 'is in use' in ended[0][2]
  assert 'refused by the first host' in ended[1][2]


def test_another_pretraining_does_not_pass_for_the_first(tmp_path):
  flags = '--preset=smoke', '--eval_problems=0', f'--workdir={tmp_path}'
  run('pretrain', *flags)
  before = contents(tmp_path / 'reference')
  shutil.rmtree(tmp_path / 'checkpoints')
  assert 'seed: 0 then, 1 now' in refused('pretrain', *flags, '--seed=1')
  assert contents(tmp_path / 'reference') == before
  run('pretrain', *flags)  # the same one comes to the same parameters
  assert contents(tmp_path / 'reference') == before


def test_refusals_leave_no_half_made_workdir(references, tmp_path):
  workdir = tmp_path / 'new' / 'run'
  for binary, *flags in (
      ('finetune', '--preset=smoke', f'--reference={references[0]}', '--extra_digits=30'),
      ('finetune', '--preset=smoke', f'--reference={tmp_path}/none'),
      ('finetune', '--preset=smoke', f'--reference={references[0]}', f'--certainty_ensemble={tmp_path}/none'),
      ('sweep', '--preset=smoke', f'--reference={references[0]}', '--extra_digits=30'),
      ('sweep', '--preset=smoke', f'--reference={references[0]}', f'--certainty_ensemble={tmp_path}/none'),
      ('analyze', f'--checkpoints={tmp_path}/none'), ('analyze', '--digits=99'),
      ('compare_checkpoints', references[0], tmp_path / 'none'),
      ('compare_checkpoints', references[0], references[1], '--digits=99')):
    refused(binary, *flags, f'--workdir={workdir}')
    assert not workdir.parent.exists(), (binary, flags)


@pytest.mark.parametrize('damage', [b'\xff\xfe\n', None])  # other kinds: tests/test_metrics.py
def test_metrics_are_restored_from_the_checkpoint(references, tmp_path, damage):
  run('finetune', *finetune(references[0], tmp_path))
  file = tmp_path / 'metrics.jsonl'
  before = file.read_text()
  file.unlink()
  if damage is not None:
    file.write_bytes(damage)
  out = run('finetune', *finetune(references[0], tmp_path, '--num_iterations=3'))
  assert f'{file}: lines were missing or had been changed; restored from the checkpoint of step 2.' in out
  assert file.read_text().startswith(before)
  assert [row['step'] for row in metrics(tmp_path)] == [1, 2, 3]


def test_damaged_files_of_a_run_are_named(references, tmp_path):
  run('sweep', *finetune(references[0], tmp_path / 'sweep', '--seeds=1'))
  (tmp_path / 'sweep' / 'members.json').write_text('["')
  assert 'members.json is damaged (line 1 is not JSON)' in refused(
      'sweep', *finetune(references[0], tmp_path / 'sweep', '--seeds=1'))
  (tmp_path / 'sweep' / 'members.json').unlink()
  (tmp_path / 'sweep' / 'before.json').write_text('')
  out = run('sweep', *finetune(references[0], tmp_path / 'sweep', '--seeds=1'))
  assert 'before.json is damaged (line 1 is empty); the reference is tested again' in out
  for text in ('', '[]', '{"preset"', '\xff'):
    (tmp_path / 'studies.json').write_text(text, encoding='latin-1')
    line = refused('reproduce', '--preset=smoke', f'--workdir={tmp_path}')
    assert 'studies.json is damaged (line 1' in line
    assert 'restore it, or remove it' in line
  (tmp_path / 'analysis.json').write_text('{')
  assert 'analysis.json is damaged' in refused('analyze', f'--workdir={tmp_path}')


@pytest.mark.parametrize('binary', ['finetune', 'pretrain', 'sweep', 'reproduce', 'analyze'])
def test_where_nothing_can_be_written_is_said_at_once(tmp_path, binary):
  (tmp_path / 'file').write_text('mine')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'below', tmp_path / ('x' * 300), '/proc/run'):
    assert f'--workdir: {str(workdir)[:200]} cannot be written: ' in refused(binary, f'--workdir={workdir}')
