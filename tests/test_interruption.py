"""Signals are answered at once, whatever the main thread does."""

import signal
import subprocess
import sys

import pytest

from critkl_jax import interruption

# The main thread waits outside of Python, as it does while a program is compiled.
WAITS = '''
import ctypes, sys, time
from critkl_jax import interruption
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
