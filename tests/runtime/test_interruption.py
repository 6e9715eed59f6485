"""Signals are answered at once, whatever the main thread does."""

import concurrent.futures
import signal
import subprocess
import sys

import pytest

from critkl_jax.runtime import interruption

# The main thread waits outside of Python, as it does while a program is compiled.
WAITS = '''
import ctypes, sys, time
from critkl_jax.runtime import interruption
with interruption.watch(' before anything was saved.') as watch:
  watch.deferring = {deferring}
  print('ready', flush=True)
  libc = ctypes.CDLL(None)
  if watch.deferring:
    while not watch.caught:
      libc.usleep(1000)
    print('obeyed', flush=True)
    libc.sleep(60 * {wait})
  else:
    libc.sleep(60)
'''


def start(**values):
  process = subprocess.Popen([sys.executable, '-c', WAITS.format(**values)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
  assert process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_is_to_be_saved_the_process_ends_at_once(number):
  process = start(deferring=False, wait=0)
  process.send_signal(number)
  _, err = process.communicate(timeout=10)  # long before the sleep ends
  assert process.returncode == interruption.STOPPED
  assert err == f'\nStopped by {number.name} before anything was saved.\n'


def test_in_a_loop_the_first_signal_waits_for_the_step():
  process = start(deferring=True, wait=0)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=10)
  assert (process.returncode, out) == (0, 'obeyed\n')
  assert err == '\nStopping after this step; press again to quit now.\n'


def test_a_second_signal_does_not_wait():
  process = start(deferring=True, wait=1)
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'obeyed\n'
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=10)
  assert process.returncode == interruption.STOPPED
  assert err.endswith('Stopped by SIGINT before anything was saved.\n')


def test_a_process_whose_standard_error_is_closed_ends_all_the_same():
  process = start(deferring=False, wait=0)
  process.stderr.close()
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == interruption.STOPPED
  process.stdout.close()


def test_a_thread_has_a_watch_of_its_own_which_catches_nothing():
  before = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
  with interruption.watch(' in the main thread.') as own:
    handler = signal.getsignal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      other = threads.submit(enter, ' in a thread.').result()
    assert (own.text, own.deferring, other.text) == (' in the main thread.', False, ' in a thread.')
    assert signal.getsignal(signal.SIGTERM) == handler
    with interruption.watch(' within.') as within:
      assert within is own
    interruption.tell(' later.')
    assert own.text == ' later.'
  assert signal.getsignal(signal.SIGINT) is before
  assert signal.set_wakeup_fd(-1) == -1


def enter(text):
  with interruption.watch(text) as watch:
    watch.deferring = True
    interruption.tell(' not this one.')
    return watch


def test_handlers_that_a_library_put_in_their_place_are_replaced_by_a_watch_within():
  with interruption.watch() as own:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the runtime of several hosts does
    with interruption.watch():
      assert signal.getsignal(signal.SIGTERM) == own.handle


FORKS = '''
import os, signal, time
from critkl_jax.runtime import interruption
reading, writing = os.pipe()
with interruption.watch(' in the parent.'):
  children = [os.fork() or (os.write(writing, b'.'), time.sleep(60)) for _ in range(2)]
  os.read(reading, 1), os.read(reading, 1)  # both run
  os.kill(children[0], signal.SIGTERM)
  print(os.waitpid(children[0], 0)[1])
print('goes on', flush=True)  # with a child that still has the pipe
os.kill(children[1], signal.SIGKILL)
'''


def test_a_signal_to_a_forked_child_is_the_child_s_alone():
  ended = subprocess.run([sys.executable, '-W', 'ignore', '-c', FORKS], text=True, capture_output=True, timeout=20,
                         check=False)  # Python 3.12 warns of forks beside threads
  assert (ended.returncode, ended.stdout, ended.stderr) == (0, f'{int(signal.SIGTERM)}\ngoes on\n', '')
