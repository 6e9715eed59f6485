"""Everything runs with `JAX_ENABLE_X64=1`: arrays keep their types, and numbers are those of a run without it."""

import json
import math

import jax
import numpy as np
import pytest
from checkpoints import finetuned_workdir
from processes import metrics, run

from critkl_jax.runtime import checkpoint
from critkl_jax.tasks.addition import plus_task

BINARIES = {
    'pretrain': ['--preset=smoke', '--num_steps=2', '--eval_problems=2'],
    'sweep': ['--preset=smoke', '--num_iterations=1', '--eval_problems=2', '--seeds=1', '--certainty_exponents=0,150'],
    'reproduce': ['--preset=smoke', '--study=certainty_gap', '--seeds=1', '--problems=2'],
}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp('home') / 'tuned'
  finetuned_workdir(home, steps=(2,))
  return home


def test_problems_and_solutions_are_the_same():
  task, found = plus_task(3, 1), []
  for on in (False, True):
    with jax.enable_x64(on):
      problem = task.sample(jax.random.key(5))
      found.append(jax.tree.map(np.asarray, (problem, task.prompt(problem), task.solution(problem))))
  for one, two in zip(*map(jax.tree.leaves, found), strict=True):
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one, two)


def finetune(home, workdir, iterations, *flags):
  run('finetune', '--preset=smoke', f'--reference={home / "reference"}', f'--num_iterations={iterations}',
      '--eval_problems=2', f'--workdir={workdir}', *flags)


def assert_alike(one, two):
  assert one.keys() == two.keys()
  for name, value in one.items():
    assert value == pytest.approx(two[name], rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on_without_it(home, tmp_path, monkeypatch):
  finetune(home, tmp_path / 'plain', 2)
  monkeypatch.setenv('JAX_ENABLE_X64', '1')
  finetune(home, tmp_path / 'x64', 1)
  config = json.loads((tmp_path / 'x64' / 'checkpoints' / '1' / 'config' / 'metadata').read_text())
  monkeypatch.delenv('JAX_ENABLE_X64')
  first = checkpoint.load_checkpoint(tmp_path / 'x64')  # its checksums are those of 32 bits
  assert {x.dtype for x in jax.tree.leaves(first.params)} == {np.dtype('float32')}
  assert set(config['checksums']) == {'params', 'opt_state', 'config'}
  finetune(home, tmp_path / 'x64', 2)
  for one, two in zip(metrics(tmp_path / 'plain'), metrics(tmp_path / 'x64'), strict=True):
    assert_alike(one, two)
  monkeypatch.setenv('JAX_ENABLE_X64', '1')
  finetune(home, tmp_path / 'plain', 3)  # and the reverse
  assert [row['step'] for row in metrics(tmp_path / 'plain')] == [1, 2, 3]


@pytest.mark.slow
def test_reading_is_the_same(home, tmp_path, monkeypatch):
  found = []
  for on in ('0', '1'):
    monkeypatch.setenv('JAX_ENABLE_X64', on)
    run('evaluate', f'--checkpoint={home}', '--digits=1', '--distribution=varying', '--num_problems=4',
        f'--json={tmp_path / f"table{on}.json"}')
    run('analyze', f'--checkpoints={home}', '--problems=2', '--digits=2', '--steps=0', '--responses=sampled',
        f'--workdir={tmp_path / on}', quick=True)
    run('compare_checkpoints', home / 'reference', home, '--problems=2', '--digits=1',
        f'--workdir={tmp_path / f"two{on}"}', quick=True)
    found.append([json.loads(path.read_text()) for path in (
        tmp_path / f'table{on}.json', tmp_path / on / 'summary.json', tmp_path / f'two{on}' / 'comparison.json')])
  for one, two in zip(*map(flat, found), strict=True):
    assert one == (pytest.approx(two, rel=1e-4, abs=1e-6) if isinstance(two, float) else two)


def flat(value):
  """Returns the numbers and texts of nested values in their order."""
  if isinstance(value, dict | list):
    return [x for inner in (value.values() if isinstance(value, dict) else value) for x in flat(inner)]
  return [value]


@pytest.mark.slow
@pytest.mark.parametrize('binary', BINARIES)
def test_other_binaries_run(binary, home, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_ENABLE_X64', '1')
  reference = [f'--reference={home / "reference"}'] if binary == 'sweep' else []
  run(binary, *BINARIES[binary], *reference, f'--workdir={tmp_path}')
  for path in tmp_path.rglob('checkpoints/*/config/metadata'):
    loaded = checkpoint.load_checkpoint(path.parents[1])
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype('float32')}
  rows = [row for file in tmp_path.rglob('metrics.jsonl') for row in metrics(file.parent)]
  assert all(math.isfinite(row['loss']) for row in rows)
