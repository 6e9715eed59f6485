"""Many iterations take no more memory than a few, and compile nothing anew."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from iterations import resident_bytes
from processes import ROOT, metrics

pytestmark = pytest.mark.skipif(not pathlib.Path('/proc/self/statm').is_file(), reason='asks Linux for memory')


def run_long(workdir, num_iterations, every, save_every=50):
  """Runs the smoke preset in a process of its own, compiled as users have it."""
  environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'faults' / 'iterations.py', workdir,
       *map(str, (num_iterations, every, save_every))], cwd=ROOT, text=True, capture_output=True,
      env=os.environ | environment)
  assert done.returncode == 0, done.stderr
  assert len(metrics(workdir)) == num_iterations
  return json.loads(done.stdout.splitlines()[-1])


def test_memory_that_is_held_is_seen():
  before = resident_bytes()
  held = np.ones(2**24)
  assert resident_bytes() - before > 0.9 * held.nbytes


@pytest.mark.slow
def test_iterations_leave_no_arrays_and_compile_nothing(tmp_path):
  found = run_long(tmp_path, 100, 25)
  assert len(found['arrays']) == 4
  assert len(set(found['arrays'])) == len(set(found['compilation_seconds'][2:])) == 1  # the first save compiles, too


@pytest.mark.long
@pytest.mark.parametrize('save_every', [2000, 50])
def test_two_thousand_iterations_hold_no_more_memory_than_two_hundred(tmp_path, save_every):
  """Orbax and TensorStore keep a little of every save, whatever its size: up to a MiB a checkpoint is theirs."""
  found = run_long(tmp_path, 2000, 100, save_every)
  memory = [value / 2**20 for value in found['memory'][1:]]
  print(f'{memory[0]:.1f} MiB after 200 iterations, {memory[-1]:.1f} after 2,000 ({memory[-1] / memory[0] - 1:+.2%}), '
        f'{min(memory):.1f} to {max(memory):.1f} on the way; {found["arrays"][-1]} arrays')
  assert len(set(found['arrays'])) == len(set(found['compilation_seconds'][1:])) == 1
  assert len(memory) == 19
  assert max(memory) < 1.02 * memory[0] + (2000 - 200) // save_every
