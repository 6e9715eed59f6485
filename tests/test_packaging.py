"""The package as people install it: archives, the console command; and warnings, which are errors only in CI."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

from experiments import __main__ as console

ROOT = pathlib.Path(__file__).parents[1]
# What lies in a checkout and is no part of the project, and results, of which no archive needs the megabytes.
LEFT_OUT = shutil.ignore_patterns('.*_cache', '.git', '.venv', 'venv', '__pycache__', '*.egg-info', 'build', 'dist',
                                  'runs', 'results')


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Returns the folder of the sdist of this checkout, and the wheel that is built from what the sdist holds."""
  pytest.importorskip('setuptools', '77')  # builds wheels alone, and knows licenses by name
  folder = tmp_path_factory.mktemp('archives')
  checkout = shutil.copytree(ROOT, folder / 'checkout', ignore=LEFT_OUT)
  (checkout / 'docs' / 'results').mkdir(parents=True)
  (checkout / 'docs' / 'results' / 'README.md').touch()

  def build(source, what):
    code = f'import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])'
    subprocess.run([sys.executable, '-c', code, folder], cwd=source, check=True, capture_output=True)

  build(checkout, 'sdist')
  (sdist,) = folder.glob('*.tar.gz')
  with tarfile.open(sdist) as archive:
    archive.extractall(folder, filter='data')
  unpacked = folder / sdist.name.removesuffix('.tar.gz')
  build(unpacked, 'wheel')
  (wheel,) = folder.glob('*.whl')
  return unpacked, wheel


def files_of(folder, *patterns):
  return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)
          if path.is_file() and '__pycache__' not in path.parts}


def test_the_loss_needs_jax_chex_and_numpy_alone():
  """Every name of the loss loads, and a loss is computed, where no other package of setup.py can be imported."""
  code = """
    import sys

    class Missing:
      def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('flax', 'optax', 'orbax', 'etils', 'tensorstore', 'matplotlib', 'tqdm'):
          raise ImportError(name)

    sys.meta_path.insert(0, Missing())
    import jax.numpy as jnp
    import critkl_jax
    for name, home in critkl_jax._HOMES.items():
      if home.startswith(('rl.', 'ops.', 'records')):
        getattr(critkl_jax, name)
    batch = critkl_jax.Batch(actions=jnp.zeros((2, 3), int), mask=jnp.ones((2, 3), bool), advantages=jnp.ones(2))
    logits = jnp.ones((2, 3, 5)).at[..., 0].set(2.0)
    print(critkl_jax.ppo_loss(logits, None, 2 * logits, batch)[0])
    """
  done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 0


def test_an_sdist_holds_binaries_tests_and_benchmarks_but_no_results(archives):
  unpacked, _ = archives
  wanted = files_of(ROOT, '*.md', '*.py', '*.toml', 'LICENSE', '.ci/run', 'critkl_jax/**/*', 'experiments/**/*',
                    'tests/**/*', 'benchmarks/**/*', 'docs/*.md', 'examples/**/*')
  assert wanted <= files_of(unpacked, '*', '**/*', '.ci/*')
  assert not files_of(unpacked, 'results/**/*')


def test_a_wheel_has_all_of_the_package_and_one_name_at_the_top(archives, tmp_path):
  _, wheel = archives
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path)
  wanted = files_of(ROOT, 'critkl_jax/**/*') | {f'critkl_jax/{x}' for x in files_of(ROOT, 'experiments/**/*')}
  assert files_of(tmp_path, 'critkl_jax/**/*') == wanted
  assert {'critkl_jax/py.typed', 'critkl_jax/experiments/finetune.py'} <= wanted
  assert [x.name for x in tmp_path.iterdir() if not x.name.endswith('.dist-info')] == ['critkl_jax']
  (entry,) = tmp_path.glob('*.dist-info/entry_points.txt')
  assert 'critkl = critkl_jax.experiments.__main__:main' in entry.read_text()

  def started(*arguments):
    code = ('import sys; sys.argv[0] = "critkl"; from critkl_jax.experiments import __main__ as console; '
            'print(console.__file__); console.main()')
    return subprocess.run([sys.executable, '-c', code, *arguments], cwd=(tmp_path / 'empty'), text=True,
                          capture_output=True, env=os.environ | {'PYTHONPATH': str(tmp_path)})

  (tmp_path / 'empty').mkdir()
  help_of_one = started('finetune', '--help')
  assert help_of_one.stdout.startswith(str(tmp_path))  # what is installed runs, not the checkout
  assert '--preset' in help_of_one.stdout
  refused = started('finetune', '--preset=smal')
  assert refused.returncode == 2
  assert refused.stderr.startswith('error: --preset=smal: expected one of smoke, ')


def test_the_lower_bounds_are_what_was_tried():
  """Everything that is installed without an accelerator has the bound of oldest.txt, but for linters and trackers."""
  tried = dict(line.split('==') for line in (ROOT / 'tests' / 'oldest.txt').read_text().splitlines() if '==' in line)
  bounds = dict(re.findall(r"'([\w-]+)(?:\[\w+\])?>=([\d.]+)'", (ROOT / 'setup.py').read_text()))
  others = {'ruff', 'setuptools', 'wandb', 'nvidia-cuda-nvcc', 'nvidia-nvvm'}
  assert {name: bound for name, bound in bounds.items() if name not in others} == {
      name: version for name, version in tried.items() if name != 'jaxlib'}


def test_the_console_command_lists_programs_and_imports_none():
  code = ("import sys; sys.argv = ['critkl']; from experiments.__main__ import main; main(); "
          "assert not {'jax', 'absl', 'critkl_jax'} & set(sys.modules)")
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, text=True, capture_output=True).stdout
  assert max(map(len, out.splitlines())) < 80
  assert re.search(r'^  finetune +Fine-tunes ', out, re.MULTILINE)
  programs = {path.stem for path in (ROOT / 'experiments').glob('*.py') if 'def main(' in path.read_text()}
  assert set(re.findall(r'^  (\w+) ', out, re.MULTILINE)) == set(console.programs()) == programs - {'__main__'}
  assert all(re.fullmatch(r'[A-Z].*[^.]\.', says) for says in console.programs().values())


def test_an_unknown_program_is_refused_in_one_line_with_the_nearest(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['critkl', 'finetun'])
  with pytest.raises(SystemExit) as stop:
    console.main()
  assert stop.value.code == 2
  said = capsys.readouterr()
  assert said.err == "critkl: there is no program 'finetun'; the nearest is 'finetune', and --help lists all.\n"
  assert not said.out


@pytest.mark.parametrize(('strict', 'outcome'), [('', '2 passed'), ('1', '1 failed, 1 passed')])
def test_warnings_are_errors_where_ci_says_so_and_exceptions_hold(strict, outcome, tmp_path):
  path = tmp_path / 'test_warnings.py'
  path.write_text('import warnings\nimport pytest\n\n'
                  'def test_unknown():\n  warnings.warn("a package of next year")\n\n'
                  'def test_known():\n  warnings.warn(pytest.PytestUnraisableExceptionWarning('
                  '"Exception ignored in: <coroutine object _read_array_index at 0x1>"))\n')
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-p', 'conftest', '-c',
       ROOT / 'pyproject.toml', f'--rootdir={tmp_path}', path],
      text=True, capture_output=True, env=os.environ | {
          'WARNINGS_ARE_ERRORS': strict, 'PYTHONPATH': os.pathsep.join([str(ROOT / 'tests'), str(ROOT)])})
  assert outcome in done.stdout.splitlines()[-1], done.stdout
