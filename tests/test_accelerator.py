"""The command for accelerators: whole at its smallest size, and what it does with parts that fail, hang or end."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from compilation import QUICK

ROOT = pathlib.Path(__file__).parents[1]
FAULTY = '''
import json
import os
import subprocess
import sys
import time

def raises(report):
  report.add('before', number=1.5)
  raise RuntimeError('a planted error')

def hangs(report):
  child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  report.add('before', child=child.pid)
  print('waiting')
  time.sleep(600)

def dies(report):
  os.abort()

def works(report):
  report.add('row', not_finite=float('nan'), infinite=float('inf'), earlier=report.earlier['raises']['before'],
             left=report.seconds_left())
'''


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
  """The module that runs parts; those of `FAULTY` can be named."""
  monkeypatch.syspath_prepend(ROOT)
  monkeypatch.chdir(ROOT)
  (tmp_path / 'faulty.py').write_text(FAULTY)
  monkeypatch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{tmp_path}')
  from benchmarks.accelerator import parts
  return parts


def read_strictly(path):
  def refuse(name):
    raise AssertionError(f'{path} holds {name}')

  return json.loads(path.read_text(), parse_constant=refuse)


def faulty(accelerator, *names):
  return [accelerator.Part(name, f'faulty:{name}', 1.0) for name in names]


def running(pid):
  status = pathlib.Path(f'/proc/{pid}/stat')
  return status.is_file() and status.read_text().split()[2] != 'Z'


@pytest.mark.slow
def test_parts_that_fail_hang_or_die_are_reported_and_the_next_one_runs(accelerator, tmp_path, capsys):
  path, start = tmp_path / 'found.json', time.monotonic()
  found = accelerator.run_parts(faulty(accelerator, 'raises', 'hangs', 'dies', 'works'), path, 25 / 60, 'smoke')
  assert time.monotonic() - start < 25
  assert read_strictly(path) == json.loads(json.dumps(accelerator.strict(found)))
  parts = found['parts']
  assert [parts[name]['status'] for name in ('raises', 'hangs', 'dies', 'works')] == [
      'failed', 'stopped', 'failed', 'done']
  assert parts['raises']['results'] == {'before': {'number': 1.5}}
  assert parts['raises']['error'][-1] == 'RuntimeError: a planted error'
  assert 'stopped at its limit' in parts['hangs']['error'][-1]
  assert not running(parts['hangs']['results']['before']['child'])
  assert parts['dies']['error'][-1] == 'ended by SIGABRT'
  row = parts['works']['results']['row']
  assert (row['not_finite'], row['infinite'], row['earlier']) == (None, None, {'number': 1.5})
  assert row['left'] > 6  # its own share are 5 s, and others have left some
  shown = capsys.readouterr().out
  assert '] raises: RuntimeError: a planted error' in shown
  assert 'RuntimeError: a planted error' in accelerator.table(found)


def test_a_part_without_the_time_that_it_needs_is_skipped_and_others_are_kept(accelerator, tmp_path):
  path = tmp_path / 'found.json'
  accelerator.run_parts(faulty(accelerator, 'raises'), path, 0.5, 'smoke')
  part = accelerator.Part('works', 'faulty:works', 1.0, least=1000.0)
  found = accelerator.run_parts([part], path, 0.5, 'full')
  assert found['parts']['works']['status'] == 'skipped'
  assert found['parts']['raises']['status'] == 'failed'


def test_the_parent_asks_for_no_device(accelerator):
  code = ('import sys, benchmarks.accelerator.__main__, benchmarks.accelerator.finetuning\n'
          "assert not {'jax', 'torch', 'critkl_jax'} & set(sys.modules)")
  subprocess.run([sys.executable, '-c', code], check=True)


def test_float64_is_the_gradient_of_the_loss(accelerator):
  from benchmarks import float64
  from benchmarks.losses import ALPHA, BONUS
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=shape) for shape in ((3, 4), (6, 4), (3, 4), (6, 4))]
  arrays[3] *= 9.0  # a reference that is certain of some tokens
  fixed = rng.integers(0, 6, 3), rng.normal(size=3)

  def loss(hidden, embedding):
    found = float64.weighted_kl_truth(hidden, embedding, *arrays[2:], *fixed)
    return np.sum(-found['log_prob'] * fixed[1] + ALPHA * found['weight'] * found['kl'] - BONUS * found['entropy'])

  truth = float64.weighted_kl_truth(*arrays, *fixed)
  for i, name in enumerate(('hidden', 'embedding')):
    direction = rng.normal(size=arrays[i].shape)
    ends = [loss(*(x + sign * 1e-6 * direction if j == i else x for j, x in enumerate(arrays[:2]))) for sign in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, np.sum(truth[name] * direction), rtol=1e-6)


def rows_of(part, begin):
  return {name: row for name, row in part['results'].items() if name.startswith(begin)}


@pytest.mark.slow
def test_the_whole_command(tmp_path):
  path = tmp_path / 'accelerator.json'
  done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.accelerator', '--preset=smoke', '--minutes=24', f'--json={path}'], cwd=ROOT,
      text=True, capture_output=True, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK})
  parts = read_strictly(path)['parts']
  assert list(parts) == ['device', 'operation', 'rollouts', 'generate', 'train_step', 'finetune', 'paper']
  problems = {name: part.get('error') for name, part in parts.items() if part['status'] != 'done'}
  if any('No module named' in line for line in problems.get('generate') or ()):
    del problems['generate']  # without PyTorch and transformers, which is said
  else:
    assert all(row['tokens_per_second'] > 0 for row in rows_of(parts['generate'], 'tiny 2').values())
  assert not problems, done.stdout[-5000:]
  assert parts['device']['results']['matrix_product']['bfloat16_tera_flops'] > 0
  errors = rows_of(parts['operation'], 'error ')
  assert len(errors) == 24
  assert all(row['agrees'] for row in errors.values())
  assert sum('seconds' in row for row in rows_of(parts['operation'], 'N=').values()) == 2 * 5
  speeds = [row['tokens_per_second'] for row in rows_of(parts['rollouts'], 'tiny ').values() if 'programs' not in row]
  assert len(speeds) == 6
  assert min(speeds) > 0
  assert {'tiny rollout', 'tiny reference', 'tiny update', 'tiny whole', 'tiny pretrain'} <= {
      name for name, row in parts['train_step']['results'].items() if row.get('fraction', 0) > 0}
  assert {'before', 'after'} == parts['finetune']['results']['accuracy'].keys()
  curves = parts['paper']['results']['curves']
  assert [len(curves[f'accuracy_{name}']) for name in ('prioritized', 'standard', 'none')] == [2, 2, 2]
  assert all('N+1' in row for row in rows_of(parts['paper'], 'after ').values())
