"""The binaries on a bucket: what they write is there, and they read it back."""

import json
import os
import pathlib
import subprocess
import sys

import buckets
import pytest
from checkpoints import finetuned_workdir
from compilation import QUICK
from processes import refused

ROOT = pathlib.Path(__file__).parents[2]
# Starts a binary with the buckets of a folder registered; TensorStore's server is in the process of the test.
START = ('import runpy, sys; import buckets; root, binary, *flags = sys.argv[1:]; buckets.register(root); '
         'sys.argv = [binary, *flags]; runpy.run_module(f"experiments.{binary}", run_name="__main__")')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('buckets')
  (root / 'bucket').mkdir()
  with buckets.open_buckets(root):
    finetuned_workdir(root / 'bucket' / 'given', steps=(2,))
    yield root


def test_an_unknown_scheme_is_refused():
  assert 'foo://bucket/run: expected a path on this machine, or of a bucket' in refused(
      'finetune', '--preset=smoke', '--workdir=foo://bucket/run')
  assert not (ROOT / 'foo:').exists()


def run(root, binary, *flags):
  variables = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}
  done = subprocess.run([sys.executable, '-c', START, root, binary, *map(str, flags)], cwd=ROOT, text=True,
                        capture_output=True, timeout=400, check=False, env=os.environ | variables)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_finetune_evaluate_and_analyze(root):
  given = root / 'bucket' / 'given' / 'reference'
  flags = ('--preset=smoke', f'--reference={given}', '--eval_problems=2', '--workdir=gs://bucket/run')
  assert 'cannot be locked' in run(root, 'finetune', *flags, '--num_iterations=1')
  assert 'Resuming from step 1 of 2 in gs://bucket/run.' in run(root, 'finetune', *flags, '--num_iterations=2')
  home = root / 'bucket' / 'run'
  assert [json.loads(line)['step'] for line in (home / 'metrics.jsonl').read_text().splitlines()] == [1, 2]
  assert (home / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert set(json.loads((home / 'summary.json').read_text())['accuracy']) == {'before', 'after'}

  run(root, 'evaluate', '--checkpoint=gs://bucket/run', '--digits=1', '--distribution=varying', '--num_problems=2',
      '--json=gs://bucket/table.json')
  assert json.loads((root / 'bucket' / 'table.json').read_text())['checkpoint'] == 'gs://bucket/run/checkpoints/2'
  run(root, 'analyze', '--checkpoints=gs://bucket/run', '--problems=1', '--digits=2', '--responses=solution',
      '--workdir=gs://bucket/analysis')
  assert (root / 'bucket' / 'analysis' / 'report.html').stat().st_size > 1000
  assert (root / 'bucket' / 'analysis' / 'tokens.csv').is_file()


@pytest.mark.slow
def test_sweep_and_its_members(root):
  given = root / 'bucket' / 'given' / 'reference'
  run(root, 'sweep', '--preset=smoke', f'--reference={given}', '--num_iterations=1', '--eval_problems=0', '--seeds=1',
      '--certainty_exponents=0,150', '--workdir=gs://bucket/sweep')
  home = root / 'bucket' / 'sweep'
  (first, *_) = json.loads((home / 'results.json').read_text())['members']
  assert not (home / 'members' / first['name'] / 'reference').exists()
  run(root, 'analyze', f'--checkpoints=gs://bucket/sweep/members/{first["name"]}', '--problems=1', '--digits=2',
      '--responses=solution', '--steps=0', '--workdir=gs://bucket/of_member')
  (found,) = json.loads((root / 'bucket' / 'of_member' / 'summary.json').read_text()).values()
  assert found['reference'].startswith('gs://bucket/sweep/reference/')
