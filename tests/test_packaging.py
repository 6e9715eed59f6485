"""What is installed: the command, and what distributions hold."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from experiments.__main__ import programs

ROOT = pathlib.Path(__file__).parents[1]


def critkl(*arguments):
  return subprocess.run([sys.executable, '-m', 'experiments', *arguments], cwd=ROOT, text=True, capture_output=True)


def test_the_command_names_every_binary():
  out = critkl('--help').stdout
  assert set(programs()) == {'analyze', 'compare_checkpoints', 'compile_only', 'evaluate', 'finetune', 'pretrain',
                             'reproduce', 'sweep'}
  assert all(f'  {name} ' in out for name in programs())
  assert all(sentence in ' '.join(out.split()) for sentence in programs().values())


def test_an_unknown_command_gets_the_nearest_one():
  done = critkl('finetun')
  assert done.returncode == 2
  assert done.stderr == "critkl: there is no program 'finetun'; the nearest is 'finetune', and --help lists all.\n"


def test_the_command_starts_a_binary():
  out = critkl('evaluate', '--help').stdout
  assert out.startswith('Tests a checkpoint')
  assert '--num_problems' in out


@pytest.mark.slow
def test_distributions_hold_what_runs_and_nothing_at_the_top(tmp_path):
  source, built = tmp_path / 'source', tmp_path / 'built'
  shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
      '.git', 'results', 'runs', 'build', '*.egg-info', '__pycache__', '.venv'))
  build = 'from setuptools import build_meta; build_meta.build_{}({!r})'
  for kind in ('wheel', 'sdist'):
    subprocess.run([sys.executable, '-c', build.format(kind, str(built))], cwd=source, check=True)
  (wheel,), (sdist,) = built.glob('*.whl'), built.glob('*.tar.gz')
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.split('/')[0] for name in names} == {'critkl_jax', f'{wheel.name.split("-py3")[0]}.dist-info'}
  for wanted in ('py.typed', 'experiments/finetune.py', 'experiments/__main__.py', 'analysis/page.html',
                 'analysis/page.css', 'analysis/page.js', 'ops/weighted_kl/api.py'):
    assert f'critkl_jax/{wanted}' in names
  assert any(name.startswith('critkl_jax/checkpoints/addition_n5/') for name in names)
  with tarfile.open(sdist) as file:
    members = {name.partition('/')[2] for name in file.getnames()}
  for wanted in ('README.md', 'experiments/finetune.py', 'benchmarks/timing.py', 'tests/conftest.py',
                 'tests/test_gpt2.py', 'critkl_jax/analysis/page.js', 'docs/training.md'):
    assert wanted in members
  assert not any(name.startswith('docs/results/') for name in members)
