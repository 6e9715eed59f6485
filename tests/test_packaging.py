"""What is installed: the command, and what distributions hold."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from experiments import cli

ROOT = pathlib.Path(__file__).parents[1]


def test_the_command_names_every_binary(capsys):
  cli.main(['--help'])
  out = capsys.readouterr().out
  assert set(cli.binaries()) == {'analyze', 'compare_checkpoints', 'compile_only', 'evaluate', 'finetune', 'pretrain',
                                 'reproduce', 'sweep'}
  assert all(f'  {name} ' in out and sentence in out for name, sentence in cli.binaries().items())


def test_an_unknown_command_gets_the_nearest_one(capsys):
  with pytest.raises(SystemExit) as error:
    cli.main(['finetun'])
  assert error.value.code == 2
  assert capsys.readouterr().err == "error: critkl has no command 'finetun'; did you mean finetune?\n"


def test_the_command_starts_a_binary():
  command = 'from experiments import cli; cli.main()'
  out = subprocess.run([sys.executable, '-c', command, 'evaluate', '--help'], cwd=ROOT, text=True, capture_output=True,
                       check=True).stdout
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
  for wanted in ('py.typed', 'experiments/finetune.py', 'experiments/cli.py', 'analysis/page.html', 'analysis/page.css',
                 'analysis/page.js', 'ops/weighted_kl/api.py'):
    assert f'critkl_jax/{wanted}' in names
  assert any(name.startswith('critkl_jax/checkpoints/addition_n5/') for name in names)
  with tarfile.open(sdist) as file:
    members = {name.partition('/')[2] for name in file.getnames()}
  for wanted in ('README.md', 'experiments/finetune.py', 'benchmarks/timing.py', 'tests/conftest.py',
                 'tests/test_gpt2.py', 'critkl_jax/analysis/page.js', 'docs/training.md'):
    assert wanted in members
  assert not any(name.startswith('docs/results/') for name in members)
