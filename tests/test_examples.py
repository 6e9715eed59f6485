"""Each program in `examples` runs as its first lines say, and what it prints shows that it does what it says."""

import ast
import importlib.util
import re
from typing import NamedTuple

import pytest
from processes import ROOT, finish, start


class Example(NamedTuple):
  """A program of `examples` and what shows that it works.

  Attributes:
    name: the file without its ending.
    pattern: what its output must contain.
    bounds: name in the output -> bounds of all numbers that follow it.
    packages: packages that it needs beside ours; without one of them it is skipped.
  """

  name: str
  pattern: str = ''
  bounds: dict[str, tuple[float, float]] = {}  # noqa: RUF012
  packages: tuple[str, ...] = ()


FAST = [
    Example('bare_loop', r'prioritized penalty\n(?s:.*)60 reward (0\.99|1\.00)(?s:.*)standard penalty'),
    Example('exponent_plot', bounds={'half_weight_entropy': (0.01, 0.06), 'exponent_for': (50, 170)}),
]
SLOW = [
    Example('nnx_llama', r'summed.* \d\.\de-0[5-9] from(?s:.*)30\.\.39: reward (0\.[789]|1\.0)'),
    Example('python_reward', r'80 reward (0\.[89]|1\.0)'),
    Example('torch_trl', bounds={'kl': (0, 1), 'kl_weight': (0.1, 0.9), 'gradient_difference': (0, 1e-5)},
            packages=('torch', 'trl')),
    Example('tunix_grpo', bounds={'kl': (0, 5), 'weight': (0.1, 0.9), 'loss': (-1, 1)}, packages=('tunix',)),
]
FILES = sorted((ROOT / 'examples').glob('*.py'))


def printed(out, name):
  """Returns the numbers that stand after a name."""
  return [float(number) for number in re.findall(rf'(?<!\S){name} +(\S+)', out)]


def test_every_example_is_run():
  assert {path.stem for path in FILES} == {example.name for example in (*FAST, *SLOW)}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_first_lines_say_how_an_example_is_run(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert f'python examples/{path.name}' in [line.strip() for line in docstring.splitlines()]


@pytest.mark.parametrize('example', [
    *(pytest.param(x, id=x.name) for x in FAST),
    *(pytest.param(x, id=x.name, marks=pytest.mark.slow) for x in SLOW)])
def test_an_example_runs(example, tmp_path):
  missing = [name for name in example.packages if importlib.util.find_spec(name) is None]
  if missing:
    pytest.skip(f'needs {missing}')
  code, out, err = finish(start('', command=[ROOT / 'examples' / f'{example.name}.py'], cwd=tmp_path))
  assert code == 0, err
  assert re.search(example.pattern, out), out
  for name, (low, high) in example.bounds.items():
    numbers = printed(out, name)
    assert numbers, (name, out)
    assert all(low <= number <= high for number in numbers), (name, out)
  assert not list(tmp_path.iterdir())
