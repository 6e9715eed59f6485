"""The binaries as a user starts them: in processes of their own, at the smoke preset."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import pytest
from checkpoints import SMOKE, write
from processes import finish, metrics, refused, run, start

from critkl_jax.models.gpt2 import gpt2
from critkl_jax.runtime.interruption import STOPPED


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pretrain')
  out = run('pretrain', '--preset=smoke', f'--workdir={workdir}')
  assert str(workdir / 'reference') in out
  return workdir / 'reference'


def finetune(reference, workdir, *flags):
  return '--preset=smoke', f'--reference={reference}', f'--workdir={workdir}', *flags


@pytest.mark.slow
def test_pretrain_writes_what_the_others_read(reference):
  rows = metrics(reference.parent)
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  summary = json.loads((reference.parent / 'summary.json').read_text())
  assert {(row['digits'], row['distribution']) for row in summary['accuracy']} == {
      (n, d) for n in (1, 2, 3) for d in ('identical', 'varying', 'plus')}


@pytest.mark.slow
def test_finetune_writes_everything_and_evaluate_reads_it(reference, tmp_path):
  out = run('finetune', *finetune(reference, tmp_path / 'run', '--kl=standard'))
  assert 'N + 1 = 2 digits (trained here)' in out
  assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 120
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert set(summary['accuracy']) == {'before', 'after'}
  for when in ('before', 'after'):
    assert set(summary['accuracy'][when]) == {'N', 'N+1'}
    assert all(0 <= value <= 1 for value in summary['accuracy'][when].values())
  seconds = summary['seconds']
  assert seconds['this_command'] > seconds['all_iterations'] > 0
  assert seconds['this_command'] > seconds['compilation_in_this_command'] > 0
  assert summary['config']['kl'] == 'standard'
  assert (tmp_path / 'run' / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert [row['step'] for row in metrics(tmp_path / 'run')] == [1, 2]
  assert list((tmp_path / 'run').glob('events.out.tfevents.*'))

  out = run('evaluate', f'--checkpoint={tmp_path / "run"}', '--digits=1,2', '--distribution=varying',
            '--num_problems=3', f'--json={tmp_path / "table.json"}')
  assert 'step 2, pre-trained on 1..1 digits' in out
  table = json.loads((tmp_path / 'table.json').read_text())
  assert [(row['digits'], row['num_problems']) for row in table['accuracy']] == [(1, 3), (2, 3)]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(reference, tmp_path):
  flags = ('--num_iterations=6', '--eval_problems=0', '--save_every=100')
  run('finetune', *finetune(reference, tmp_path / 'whole', *flags))
  process = start('finetune', *finetune(reference, tmp_path / 'parts', *flags))
  log = tmp_path / 'parts' / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not (log.is_file() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGTERM)
  code, _, err = finish(process)
  stopped = len(metrics(tmp_path / 'parts'))
  if stopped < 6:  # else the signal came after the last step
    assert code == STOPPED
    assert f'stopped by SIGTERM after step {stopped} of 6' in err
  run('finetune', *finetune(reference, tmp_path / 'parts', *flags))
  assert metrics(tmp_path / 'parts') == metrics(tmp_path / 'whole')
  assert len(metrics(tmp_path / 'whole')) == 6


def test_ctrl_c_is_answered_at_once_before_the_first_step(tmp_path):
  process = start('finetune', '--preset=smoke', '--eval_problems=0', '--episodes=6', f'--workdir={tmp_path}')
  said = [process.stdout.readline() for _ in range(3)]
  assert 'ompiling the training step' in said[-1]
  process.send_signal(signal.SIGINT)
  sent = time.monotonic()
  code, _, err = finish(process)
  assert time.monotonic() - sent < 3
  assert code == STOPPED
  assert 'Traceback' not in err
  assert 'Stopped by SIGINT' in err


@pytest.mark.slow
def test_what_a_user_can_mend_is_said_in_one_line(reference, tmp_path):
  processes = {
      'no such directory': start('evaluate', f'--checkpoint={tmp_path / "nowhere"}'),
      'no complete checkpoint': start('evaluate', f'--checkpoint={tmp_path}'),
  }
  for words, process in processes.items():
    code, _, err = finish(process)
    assert code == 2
    assert 'Traceback' not in err
    assert err.splitlines()[-1].startswith('error: ')
    assert words in err
  assert 'no such directory' in refused('finetune', *finetune(tmp_path / 'nowhere', tmp_path / 'a'))
  assert 'minibatches' in refused('finetune', *finetune(reference, tmp_path / 'b', '--minibatches=3'))
  assert '--extra_digits' in refused('finetune', *finetune(reference, tmp_path / 'c', '--extra_digits=30'))


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(reference, tmp_path):
  flags = finetune(reference, tmp_path, '--num_iterations=1', '--eval_problems=0')
  run('finetune', *flags)
  line = refused('finetune', *flags, '--num_iterations=2', '--kl=none')
  assert "kl: 'prioritized' then, 'none' now" in line


@pytest.mark.slow
def test_a_run_goes_on_with_settings_that_change_no_update(reference, tmp_path):
  run('finetune', *finetune(reference, tmp_path / 'run', '--num_iterations=1', '--eval_problems=3'))
  shutil.copytree(reference, tmp_path / 'moved')
  out = run('finetune', *finetune(tmp_path / 'moved', tmp_path / 'run', '--num_iterations=2', '--eval_problems=5',
                                  '--remat', '--scan_layers', '--window=8', '--attention=xla'))
  assert out.count('updates are the same up to rounding') == 1
  assert [row['step'] for row in metrics(tmp_path / 'run')] == [1, 2]
  accuracy = json.loads((tmp_path / 'run' / 'summary.json').read_text())['accuracy']
  assert all((5 * accuracy[when][digits]) % 1 == pytest.approx(0) for when in accuracy for digits in accuracy[when])
  assert json.loads((tmp_path / 'run' / 'before.json').read_text())['made_with']['eval_problems'] == 5


@pytest.mark.slow
def test_what_was_trained_with_an_attention_that_is_not_here_is_read_and_trained_with_another(tmp_path):
  model = dataclasses.replace(SMOKE.model, dtype='bfloat16', attention='cudnn')
  training = dataclasses.replace(SMOKE, model=model)
  write(tmp_path / 'reference', gpt2(SMOKE.model).init(jax.random.key(0)), 4, training, model)
  out = run('evaluate', f'--checkpoint={tmp_path / "reference"}', '--digits=1', '--num_problems=2')
  assert "'cudnn' needs an NVIDIA GPU" in out
  flags = finetune(tmp_path / 'reference', tmp_path / 'run', '--num_iterations=1', '--eval_problems=0')
  assert 'give --attention=auto' in refused('finetune', *flags)
  assert not (tmp_path / 'run').exists()
  run('finetune', *flags, '--attention=auto')
  assert len(metrics(tmp_path / 'run')) == 1


def test_help_names_every_field_with_its_default():
  process = start('finetune', '--help')
  out, _ = process.communicate(timeout=200)
  for words in ('--kl_coefficient', 'alpha, which multiplies the penalty. (tiny: 0.5)', '--certainty_exponent',
                '--preset'):
    assert words in ' '.join(out.split())


@pytest.mark.slow
def test_sweep_compares_groups_and_leaves_workdirs(reference, tmp_path):
  flags = ('--certainty_exponents=0,150', '--kl_coefficients=0.1,0.5', '--seeds=2')
  out = run('sweep', *finetune(reference, tmp_path, *flags))
  assert '8 members: ' in out
  assert out.count('kl_coefficient=0.5 certainty_exponent=150.0') == 2  # on N and on N+1
  result = json.loads((tmp_path / 'results.json').read_text())
  rows = {row['group']: row for row in result['comparison']['N+1']}
  assert len(rows) == 4
  assert rows['kl_coefficient=0.5 certainty_exponent=150.0']['baseline'] == 'kl_coefficient=0.5 certainty_exponent=0.0'
  assert 'difference' not in rows['kl_coefficient=0.1 certainty_exponent=0.0']
  assert all(row['members'] == 2 for row in rows.values())
  lines = (tmp_path / 'results.csv').read_text().splitlines()
  assert len(lines) == 9
  assert lines[0].startswith('name,kl_coefficient,certainty_exponent,seed,')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  member = tmp_path / 'members' / result['members'][0]['name']
  assert [row['step'] for row in metrics(member)] == [1, 2]
  assert 'step 2' in run('evaluate', f'--checkpoint={member}', '--digits=1', '--distribution=plus', '--num_problems=2')
  before = (tmp_path / 'results.json').read_text()
  run('sweep', *finetune(reference, tmp_path, *flags))  # nothing is left to do
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again['comparison'] == json.loads(before)['comparison']
  files = lambda: {path: path.read_bytes() for path in tmp_path.rglob('*')
                   if path.is_file() and path.name != 'run.lock'}
  before = files()
  assert 'made with other members' in refused('sweep', *finetune(reference, tmp_path, '--seeds=2'))
  assert files() == before


@pytest.mark.slow
def test_a_study_takes_every_core_and_a_process_without_others_is_refused(reference, tmp_path):
  run('sweep', *finetune(reference, tmp_path, '--seeds=1', '--eval_problems=0'), devices=None)
  result = json.loads((tmp_path / 'results.json').read_text())
  assert result['population_map'] == ('shard' if len(os.sched_getaffinity(0)) > 1 else 'scan')
  assert '--process_id: means nothing' in refused('finetune', f'--workdir={tmp_path}', '--process_id=1')


@pytest.mark.slow
def test_a_study_that_cannot_be_is_refused(reference, tmp_path):
  assert '--certainty_exponents: expected numbers' in refused(
      'sweep', *finetune(reference, tmp_path, '--certainty_exponents=0,x'))
  line = refused('sweep', *finetune(reference, tmp_path, '--episodes=4000000', '--minibatches=1', '--eval_problems=0'))
  assert 'GiB are free: about 0 would fit' in line
