"""Two processes on the loopback interface train one model, as two hosts would."""

import json
import signal
import socket
import time

import numpy as np
import pytest
from processes import finish, metrics, refused, run, start

from critkl_jax.runtime import checkpoint
from critkl_jax.runtime.interruption import STOPPED

TIMEOUT = 20


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pretrain')
  run('pretrain', '--preset=smoke', '--eval_problems=0', f'--workdir={workdir}')
  return workdir / 'reference'


def start_hosts(binary, *flags, devices=2):
  """Starts two processes with several devices each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  return [start(binary, *flags, f'--coordinator_address={address}', '--num_processes=2', f'--process_id={i}',
                f'--host_timeout={TIMEOUT}', devices=devices) for i in range(2)]


def finetune(reference, workdir, *flags):
  return ('--preset=smoke', f'--reference={reference}', f'--workdir={workdir}', '--episodes=8', '--minibatches=2',
          '--extra_digits=0', '--rollout=cached', *flags)


@pytest.mark.slow
def test_two_hosts_train_what_one_does_and_one_reads_it(reference, tmp_path):
  run('finetune', *finetune(reference, tmp_path / 'one'))
  processes = start_hosts('finetune', *finetune(reference, tmp_path / 'two', '--mesh=data:2,model:2'))
  (code, out, err), (other_code, other_out, other_err) = map(finish, processes)
  assert (code, other_code) == (0, 0), (err, other_err)
  assert 'trained here' in out
  assert 'trained here' not in other_out
  one, two = (metrics(tmp_path / name) for name in ('one', 'two'))
  assert [row['step'] for row in two] == [1, 2]
  for wanted, got in zip(one, two):
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)
  summary = json.loads((tmp_path / 'two' / 'summary.json').read_text())
  assert summary['accuracy'] == json.loads((tmp_path / 'one' / 'summary.json').read_text())['accuracy']
  wanted, got = (checkpoint.load_checkpoint(tmp_path / name) for name in ('one', 'two'))
  for name, x in got.params['h_0']['mlp']['c_fc'].items():
    np.testing.assert_allclose(x, wanted.params['h_0']['mlp']['c_fc'][name], atol=2e-4)
  processes = start_hosts(
      'finetune', *finetune(reference, tmp_path / 'two', '--mesh=data:2,model:2', '--num_iterations=3'))
  assert [code for code, _, _ in map(finish, processes)] == [0, 0]
  assert [row['step'] for row in metrics(tmp_path / 'two')] == [1, 2, 3]


@pytest.mark.slow
def test_two_hosts_reward_their_own_responses_in_python(tmp_path):
  """Each host calls the reward functions for the responses of its devices; the run is that of one host."""
  flags = ('--preset=stories', '--asks=facts', '--extra_facts=1', '--num_iterations=2', '--episodes=8',
           '--minibatches=2', '--eval_problems=4', '--save_every=1', '--rollout=cached')
  run('finetune', *flags, f'--workdir={tmp_path / "one"}')
  processes = start_hosts('finetune', *flags, f'--workdir={tmp_path / "two"}', '--mesh=data:4')
  for code, _, err in map(finish, processes):
    assert code == 0, err
  one, two = (metrics(tmp_path / name) for name in ('one', 'two'))
  assert [row['step'] for row in two] == [1, 2]
  for wanted, got in zip(one, two):
    assert 0 < got['reward'] == pytest.approx(got['reward/rouge_l'])
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-3)
  samples = [json.loads(line) for line in (tmp_path / 'two' / 'samples.jsonl').read_text().splitlines()]
  assert {sample['step'] for sample in samples} == {1, 2}


@pytest.mark.slow
def test_two_hosts_share_the_members_of_a_study(reference, tmp_path):
  flags = ('--seeds=2', '--certainty_exponents=0,150')
  for name, launch in (('one', run), ('two', start_hosts)):
    found = launch('sweep', *finetune(reference, tmp_path / name, *flags), devices=1 if name == 'two' else None)
    if name == 'two':
      for code, _, err in map(finish, found):
        assert code == 0, err
  one, two = (json.loads((tmp_path / name / 'results.json').read_text()) for name in ('one', 'two'))
  assert two['population_map'] == 'shard'
  for wanted, got in zip(one['members'], two['members'], strict=True):
    last = {name: value for name, value in wanted['last_iteration'].items() if 'second' not in name}
    assert {name: got['last_iteration'][name] for name in last} == pytest.approx(last, rel=1e-4, abs=1e-4)


def wait_for_step(process, workdir, step):
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    if max(checkpoint.steps_in(workdir / 'checkpoints'), default=0) >= step:
      return
    time.sleep(0.05)
  process.kill()
  raise AssertionError(f'no checkpoint of step {step}: {finish(process)}')


@pytest.mark.parametrize('victim', [1, 0])
@pytest.mark.slow
def test_the_death_of_a_host_ends_the_others_with_a_whole_checkpoint(reference, tmp_path, victim):
  flags = finetune(reference, tmp_path, '--eval_problems=0', '--save_every=1')
  processes = start_hosts('finetune', *flags, '--num_iterations=100000')
  wait_for_step(processes[0], tmp_path, 2)
  processes[victim].kill()
  killed = time.monotonic()
  code, _, err = finish(processes[1 - victim])
  assert time.monotonic() - killed < 6 * TIMEOUT
  assert code != 0
  assert err.count('error: another host was lost') == 1
  assert f'What was saved in {tmp_path} is whole' in err
  finish(processes[victim])
  last = checkpoint.steps_in(tmp_path / 'checkpoints')[-1]
  checkpoint.load_checkpoint(tmp_path)
  run('finetune', *flags, f'--num_iterations={last + 1}')
  assert [row['step'] for row in metrics(tmp_path)] == list(range(1, last + 2))


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_at_the_same_step(reference, tmp_path):
  flags = finetune(reference, tmp_path, '--eval_problems=0', '--save_every=100000')
  processes = start_hosts('finetune', *flags, '--num_iterations=100000')
  log = tmp_path / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not (log.is_file() and log.read_text()) and processes[0].poll() is None and time.monotonic() < deadline:
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  ended = list(map(finish, processes))
  (step,) = checkpoint.steps_in(tmp_path / 'checkpoints')
  for code, _, err in ended:
    assert code == STOPPED
    assert f'stopped by SIGTERM after step {step} of 100000' in err


@pytest.mark.slow
def test_a_study_on_two_hosts_stops_goes_on_and_survives_a_death(reference, tmp_path):
  flags = finetune(reference, tmp_path, '--seeds=2', '--certainty_exponents=150', '--eval_problems=0', '--save_every=2',
                   '--num_iterations=100000')
  members = [tmp_path / 'members' / f'seed={seed}' for seed in (0, 1)]
  steps_of = lambda: [checkpoint.steps_in(home / 'checkpoints') for home in members]
  processes = start_hosts('sweep', *flags, devices=1)
  wait_for_step(processes[0], members[1], 2)
  processes[1].send_signal(signal.SIGTERM)
  for code, _, err in map(finish, processes):
    assert code == STOPPED
    assert 'stopped by SIGTERM after step' in err
  stopped = steps_of()
  assert stopped[0] == stopped[1]

  processes = start_hosts('sweep', *flags, devices=1)
  wait_for_step(processes[0], members[1], stopped[0][-1] + 4)
  processes[1].kill()
  code, _, err = finish(processes[0])
  assert code != 0
  assert err.count('error: another host was lost') == 1
  finish(processes[1])
  both = set.intersection(*map(set, steps_of()))
  assert max(both) > stopped[0][-1]
  for home in members:
    assert [row['step'] for row in metrics(home)][:max(both)] == list(range(1, max(both) + 1))
    checkpoint.load_checkpoint(home / 'checkpoints' / str(max(both)))


def test_hosts_that_do_not_know_of_each_other_are_told_what_to_give(tmp_path):
  assert '--coordinator_address' in refused('finetune', '--multi_host', f'--workdir={tmp_path}')
