"""The fast tier, which a bare `pytest` runs, keeps a test of every file and a run of every binary."""

import pathlib
import subprocess
import sys

import pytest

from experiments.__main__ import programs

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent


@pytest.fixture(scope='module')
def fast():
  """The tests that a bare `pytest` would run, as it names them."""
  done = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '-n', '0', '-p', 'no:cacheprovider'],
                        cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return [line for line in done.stdout.splitlines() if '::' in line]


def test_every_file_has_a_fast_test(fast):
  files = {path.relative_to(ROOT).as_posix() for path in TESTS.rglob('test_*.py')}
  whole = {f'tests/{name}' for name in (  # test_smoke.py runs their binaries
      'experiments/test_analyze.py', 'experiments/test_reproduce.py', 'faults/test_other_hands.py',
      'studies/test_measures.py')}
  assert whole < files
  assert {line.split('::')[0] for line in fast} >= files - whole


def test_every_binary_is_run(fast):
  binaries = set(programs())
  assert 'finetune' in binaries
  refused = {'compile_only'}  # a compiler is seldom installed: what the binary says without one is tested
  assert any(line.startswith('tests/experiments/test_compile_only.py::') for line in fast)
  smoke = {line.split('::test_')[1] for line in fast if line.startswith('tests/experiments/test_smoke.py::')}
  assert smoke == binaries - refused


@pytest.mark.parametrize('truth', [
    'ops/test_weighted_kl.py::test_linear_against_float64', 'ops/test_logits.py::test_logits_against_float64',
    'ops/test_pallas_gpu.py::test_against_float64', 'ops/test_pallas_tpu.py::test_values_and_gradients',
    'rl/test_losses.py::test_loss_against_loops_in_float64', 'models/test_gpt2.py::test_is_gpt2',
    'sampling/test_generation.py::test_recorded_log_probabilities_and_values_are_the_rescored_ones',
    'training/test_train_step.py::test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one',
    'training/test_population.py::test_members_are_single_runs',
    'test_sharding.py::test_any_mesh_gives_the_same_learning_curve'])
def test_each_layer_is_held_to_what_is_true(fast, truth):
  assert any(line.partition('[')[0] == f'tests/{truth}' for line in fast)
