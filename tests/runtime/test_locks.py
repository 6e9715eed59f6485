"""One run at a time writes into a workdir, whatever another run does or leaves."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from critkl_jax.runtime import locks
from critkl_jax.runtime.storage import WorkdirError

HOLDS = '''
import sys, time
from critkl_jax.runtime import locks
with locks.hold(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
'''


@pytest.fixture
def other(tmp_path):
  """Starts another process that holds the workdir until its standard input is closed."""
  process = subprocess.Popen([sys.executable, '-c', HOLDS, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def left_by(host, pid, workdir):
  (workdir / locks.LOCK).write_text(json.dumps({'host': host, 'pid': pid, 'since': '2026-01-01 00:00:00'}))


def test_a_living_process_is_named_and_a_dead_one_is_in_nobodys_way(other, tmp_path):
  with (pytest.raises(WorkdirError, match=f'in use: process {other.pid} on {socket.gethostname()}, since 20'),
        locks.hold(tmp_path)):
    pass
  (tmp_path / 'written').touch()
  other.kill()
  other.wait()
  assert json.loads((tmp_path / locks.LOCK).read_text())['pid'] == other.pid
  with locks.hold(tmp_path) as known:
    assert known
    assert json.loads((tmp_path / locks.LOCK).read_text())['pid'] == os.getpid()
  assert 'pid' not in json.loads((tmp_path / locks.LOCK).read_text())


def test_the_same_thread_may_hold_twice_and_another_may_not(tmp_path):
  refusals = []

  def hold_too():
    try:
      with locks.hold(tmp_path):
        pass
    except WorkdirError as error:
      refusals.append(str(error))

  def in_a_thread():
    thread = threading.Thread(target=hold_too)
    thread.start()
    thread.join()

  with locks.hold(tmp_path), locks.hold(os.path.relpath(tmp_path)):
    in_a_thread()
  assert len(refusals) == 1
  assert 'another thread of this process writes into it' in refusals[0]
  in_a_thread()
  assert len(refusals) == 1


def test_what_only_looked_leaves_nothing(tmp_path):
  with locks.hold(tmp_path / 'new' / 'deep') as known:
    assert not known
  assert not (tmp_path / 'new').exists()
  (tmp_path / 'mine').touch()
  with locks.hold(tmp_path) as known:
    assert not known
  assert os.listdir(tmp_path) == ['mine']
  with locks.hold(tmp_path):
    (tmp_path / 'written').touch()
  with locks.hold(tmp_path) as known:
    assert known


@pytest.mark.parametrize('alive', [True, False])
def test_where_the_lock_does_not_reach_a_sign_of_life_decides(tmp_path, monkeypatch, alive, capsys):
  left_by('elsewhere', 7, tmp_path)
  monkeypatch.setattr(locks, 'PATIENCE', 0.5)
  over = threading.Event()

  def live():
    while not over.wait(0.05):
      os.utime(tmp_path / locks.LOCK)

  thread = threading.Thread(target=live)
  if alive:
    thread.start()
  try:
    if alive:
      with pytest.raises(WorkdirError, match='in use: process 7 on elsewhere'), locks.hold(tmp_path):
        pass
    else:
      with locks.hold(tmp_path) as known:
        assert known
  finally:
    over.set()
    if alive:
      thread.join()
  assert 'process 7 on elsewhere: waiting' in capsys.readouterr().out


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, 'BEAT', 0.02)
  with locks.hold(tmp_path):
    (tmp_path / 'written').touch()
    os.utime(tmp_path / locks.LOCK, (1, 1))
    for _ in range(200):
      if os.stat(tmp_path / locks.LOCK).st_mtime > 1:
        break
      threading.Event().wait(0.02)
    assert os.stat(tmp_path / locks.LOCK).st_mtime > 1


@pytest.mark.parametrize('alive', [True, False])
def test_a_file_system_without_locks(tmp_path, monkeypatch, alive):
  """Without `flock`, the holder counts as alive if its process runs."""
  def none(file, operation):
    raise OSError(95, 'Operation not supported')

  ended = subprocess.Popen(['true'])
  ended.wait()
  left_by(socket.gethostname(), os.getpid() if alive else ended.pid, tmp_path)
  monkeypatch.setattr(locks.fcntl, 'flock', none)
  monkeypatch.setattr(locks, 'PATIENCE', 0.5)
  monkeypatch.setattr(locks, '_modified', lambda path, times=[]: times.append(0) or (len(times) if alive else 0))
  if not alive:
    with locks.hold(tmp_path) as known:
      assert known
    return
  with pytest.raises(WorkdirError, match=f'in use: process {os.getpid()} on'), locks.hold(tmp_path):
    pass


@pytest.mark.filterwarnings('ignore')  # JAX and Python warn of forks
def test_a_forked_child_holds_nothing(tmp_path):
  """The child may outlive its parent, and is not part of the parent's run."""
  refused, released = os.pipe(), os.pipe()
  with locks.hold(tmp_path):
    (tmp_path / 'written').touch()
    child = os.fork()
    if not child:
      try:
        with locks.hold(tmp_path):
          os._exit(3)
      except WorkdirError:
        os.write(refused[1], b'.')
        os.read(released[0], 1)
        os._exit(0)
    os.close(refused[1])
    assert os.read(refused[0], 1) == b'.'
  with locks.hold(tmp_path):  # though the child lives
    os.write(released[1], b'.')
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
  for file in (refused[0], *released):
    os.close(file)


def test_a_member_is_held_with_its_study(tmp_path, other):
  member = tmp_path / 'members' / 'seed=0'
  with locks.hold(member):
    pass
  (tmp_path / 'members.json').write_text('[]')
  with pytest.raises(WorkdirError, match=f'{tmp_path} is in use'), locks.hold(member):
    pass


@pytest.mark.parametrize('name', ['file', 'file/below', 'x' * 300])
def test_where_nothing_can_be_written_is_said(tmp_path, name):
  (tmp_path / 'file').touch()
  with pytest.raises(WorkdirError, match='nothing can be written there'), locks.hold(tmp_path / name):
    pass


@pytest.mark.parametrize('text', ['', 'no JSON', '[]', '{"pid": 1}', '\xff'])
def test_a_lock_that_names_nobody_is_free(tmp_path, text):
  (tmp_path / locks.LOCK).write_text(text, encoding='latin-1')
  with locks.hold(tmp_path) as known:
    assert known


def test_a_bucket_is_said_to_have_no_lock(capsys):
  with locks.hold('gs://bucket/run'):
    pass
  assert 'gs://bucket/run cannot be locked' in capsys.readouterr().out
