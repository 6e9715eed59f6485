"""Disks that are full, and files that cannot be written: one sentence, and the last whole checkpoint goes on."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from critkl_jax.runtime import checkpoint
from experiments import flags

ROOT = pathlib.Path(__file__).parents[2]


def fill(workdir, steps, kilobytes, limit=0):
  """Returns exit code, standard output and standard error of a run; see `filler`."""
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'faults' / 'filler.py', *map(str, (workdir, steps, kilobytes, limit))],
      capture_output=True, text=True, timeout=300, check=False,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)})
  return done.returncode, done.stdout, done.stderr


def said(err):
  """Returns the one line of an error, of which nothing else is said."""
  lines = [line for line in err.replace('\r', '\n').splitlines() if line.strip() and '|' not in line]
  assert len(lines) == 1, err
  assert 'Traceback' not in err
  return lines[0]


def test_the_sentence_needs_no_standard_output():
  code = ('import os, sys; from experiments import exits; reading, writing = os.pipe(); os.close(reading); '
          'sys.stdout = os.fdopen(writing, "w"); print("a line"); exits.end_now("error: Broken pipe.")')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (1, '\nerror: Broken pipe.\n')


def test_what_cannot_be_written_is_one_sentence():
  error = OSError(errno.ENOSPC, 'No space left on device', 'a/b')
  error.add_note('the last whole checkpoint in a is step 3')
  assert flags.sentence_of(error) == (
      'error: No space left on device: a/b; the last whole checkpoint in a is step 3; free some space and give the '
      'same command again.')
  assert flags.sentence_of(PermissionError(errno.EACCES, 'Permission denied', 'c')) == (
      'error: Permission denied: c; fix that and give the same command again.')


@pytest.mark.slow
def test_a_file_that_may_not_be_longer(tmp_path):
  code, _, err = fill(tmp_path / 'run', 2, 500, limit=300)
  assert code == 1
  assert said(err) == (f'error: File too large: {tmp_path}/run/checkpoints; no checkpoint is in {tmp_path}/run yet; '
                       'free some space and give the same command again.')
  code, out, _ = fill(tmp_path / 'run', 2, 500)
  assert code == 0
  assert 'finished 2' in out


@pytest.fixture
def disk(tmp_path):
  """A disk of 4 MB."""
  place = tmp_path / 'disk'
  place.mkdir()
  if not sys.platform.startswith('linux') or os.geteuid() or subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', place], check=False).returncode:
    pytest.skip('cannot mount a disk')
  yield place
  subprocess.run(['umount', '-l', place], check=True)


@pytest.mark.slow
def test_a_full_disk(disk):
  code, _, err = fill(disk / 'run', 60, 500)
  assert code == 1
  steps = checkpoint.steps_in(disk / 'run' / 'checkpoints')
  assert len(steps) > 2
  assert f'No space left on device: {disk}/run' in said(err)
  assert f'the last whole checkpoint in {disk}/run is step {steps[-1]}; free some space' in said(err)
  code, _, err = fill(disk / 'run', 60, 500)  # nothing was freed but what was half written
  assert code == 1
  assert said(err).startswith('error: No space left on device: ')
  assert checkpoint.steps_in(disk / 'run' / 'checkpoints')[-1] >= steps[-1]
  for step in steps[:2]:
    subprocess.run(['rm', '-r', disk / 'run' / 'checkpoints' / str(step)], check=True)
  code, out, _ = fill(disk / 'run', steps[-1] + 1, 500)
  assert code == 0
  assert f'Resuming from step {steps[-1]} ' in out
  assert f'finished {steps[-1] + 1}' in out
