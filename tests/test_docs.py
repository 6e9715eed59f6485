"""Every code block of README and docs runs, every command line parses, and every link leads somewhere."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest
import yaml
from compilation import QUICK

from critkl_jax import FinetuneConfig, half_weight_entropy
from critkl_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
HISTORY = ROOT / 'docs' / 'log.md'  # its commands are those of their days
SMOKE = '--preset=smoke'


class Block(NamedTuple):
  """A fenced code block: its language, its text, where it stands, and the text between it and the block before it."""

  language: str
  text: str
  place: str
  between: str


def blocks_of(page):
  text = page.read_text()
  end = 0
  for match in re.finditer(r'^```([^\n]*)\n(.*?)^```$', text, re.S | re.M):
    place = f'{page.relative_to(ROOT)}:{text[:match.start()].count(chr(10)) + 1}'
    yield Block(match[1], match[2], place, text[end:match.start()])
    end = match.end()


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_kind(language):
  return [pytest.param(block, id=block.place) for block in BLOCKS if block.language == language]


# Commands.


def commands_of(text):
  """Yields the words of each command of a shell script, those of a remote command among them."""
  text = re.sub(r'(^|\s)#.*', r'\1', text).replace('\\\n', ' ')
  lexer = shlex.shlex(text, posix=True, punctuation_chars='\n;&|')
  lexer.whitespace, lexer.whitespace_split, lexer.commenters = ' \t', True, ''
  words = []
  for word in [*lexer, '\n']:
    if word.strip('\n;&|'):
      words.append(word)
    elif words:
      yield from remote(words)
      words = []


def remote(words):
  """Yields a command, or those that it starts elsewhere."""
  if words[0] == 'srun':
    yield words[1:]
  elif words[0] == 'gcloud':
    for word in words:
      if word.startswith('--command='):
        yield from commands_of(word.removeprefix('--command='))
  else:
    yield words


def kubernetes_commands(text):
  for document in yaml.safe_load_all(text):
    for container in document['spec'].get('template', {}).get('spec', {}).get('containers', []):
      assert container['command'] == ['sh', '-c']
      for line in container['args']:
        yield from commands_of(line)


def all_commands():
  """Returns `(place, words)` of every command of the pages."""
  readers = {'sh': commands_of, 'yaml': kubernetes_commands}
  return [(block.place, words) for block in BLOCKS if block.language in readers
          for words in readers[block.language](block.text)]


def variables_set(words):
  return [re.sub(r'\$\w+', '1', word) for word in words]


def started(words):
  """Returns the module that a command starts, and its flags; None for another command."""
  if words[:2] == ['python', '-m'] and words[2].split('.')[0] in ('experiments', 'benchmarks'):
    return words[2], variables_set(words[3:])
  if words[0] == 'critkl':
    return f'experiments.{words[1]}', variables_set(words[2:])
  return None


# Parses command lines given as {module: [flags, ...]}, and prints what is wrong with them and the flags there are.
PARSER = """
import importlib, json, sys
from absl import app, flags, logging
absl = set(flags.FLAGS)
from critkl_jax.training.presets import FINETUNE_PRESETS, PRETRAIN_PRESETS
from experiments.flags import read_config

POSITIONAL = {'experiments.compare_checkpoints': 2}
PACKAGES = {'benchmarks.accelerator': 'benchmarks.accelerator.__main__'}  # module -> where its flags are defined
PRESETS = {'experiments.pretrain': PRETRAIN_PRESETS, 'experiments.finetune': FINETUNE_PRESETS,
           'experiments.sweep': FINETUNE_PRESETS, 'experiments.compile_only': FINETUNE_PRESETS}
wrong, shared = [], set(flags.FLAGS) - absl
names = {'help'} | shared
for module, lines in json.load(sys.stdin).items():
  before = set(flags.FLAGS)
  try:
    imported = importlib.import_module(PACKAGES.get(module, module))
  except SystemExit as reason:
    if module == 'benchmarks.peers' and 'is not installed' in str(reason):
      continue  # packages of the extra `bench` define its flags only when they are there
    raise
  own = set(flags.FLAGS) - before
  names |= own
  for line in lines:
    flags.FLAGS.unparse_flags()
    for name in own | shared:
      flags.FLAGS[name].unparse()
    try:
      rest = flags.FLAGS([module, *line])[1:]
      if len(rest) != POSITIONAL.get(module, 0):
        wrong.append([module, line, f'arguments {rest}'])
      if module in PRESETS:
        read_config(PRESETS[module], without=getattr(imported, 'READ_HERE', ()))
    except (flags.Error, SystemExit) as error:
      wrong.append([module, line, str(error)])
  for name in own:
    delattr(flags.FLAGS, name)
print(json.dumps([wrong, sorted(names)]))
"""


def python(*arguments, **options):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': QUICK}
  return subprocess.run([sys.executable, *arguments], text=True, capture_output=True, env=environment, **options)


def parse(lines):
  """Parses command lines `{module: [flags]}`: their errors, and the names of the modules' flags."""
  done = python('-c', PARSER, input=json.dumps(lines), cwd=ROOT)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def binaries():
  return [f'{path.parent.name}.{path.stem}' for folder in ('experiments', 'benchmarks')
          for path in sorted((ROOT / folder).glob('*.py')) if "__name__ == '__main__'" in path.read_text()] + [
              f'{path.parent.parent.name}.{path.parent.name}' for path in sorted(ROOT.glob('benchmarks/*/__main__.py'))]


def test_every_block_is_run_or_marked_as_output():
  assert {block.language for block in BLOCKS} <= {'python', 'sh', 'yaml', 'text'}
  assert {'python', 'sh', 'yaml'} <= {block.language for block in BLOCKS}


def test_every_command_line_parses_and_every_named_flag_exists():
  lines = {module: [] for module in binaries()}
  for _, words in all_commands():
    if started(words):
      lines[started(words)[0]].append(started(words)[1])
  assert sum(map(len, lines.values())) > 30
  wrong, names = parse(lines)
  assert not wrong
  prose = {page: re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.S | re.M) for page in PAGES if page != HISTORY}
  named = {(page.name, name) for page, text in prose.items() for name in re.findall(r'`--(\w+)', text)}
  assert len(named) > 20
  assert not {(page, name) for page, name in named if not {name, name.removeprefix('no')} & set(names)}


def test_wrong_command_lines_are_seen():
  lines = {'experiments.finetune': [['--no_such_flag=1'], ['--kl=large'], ['--minibatches=7'], ['word'], []],
           'experiments.evaluate': [['--num_problems=x'], []]}
  wrong, _ = parse(lines)
  assert [line for _, line, _ in wrong] == [line for some in lines.values() for line in some if line]


def test_other_commands_are_known_and_their_extras_exist():
  (setup,) = (node for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
              if isinstance(node, ast.keyword) and node.arg == 'extras_require')
  extras = {key.value for key in setup.value.keys}
  for place, words in all_commands():
    if not started(words):
      assert words[0] in ('pip', 'pytest', 'cd'), (place, words)
  for page in PAGES:
    named = re.findall(r"(?:install|`)[^\n`]*?'?\.\[([\w,]+)\]", page.read_text())
    assert {name for some in named for name in some.split(',')} <= extras, page


@pytest.mark.parametrize('block', of_kind('sh'))
def test_shell_blocks_are_shell(block):
  done = subprocess.run(['bash', '-n'], input=block.text, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  assert list(commands_of(block.text))


@pytest.mark.slow
@pytest.mark.parametrize('block', [x for x in of_kind('sh') if SMOKE in x.values[0].text])
def test_small_commands_run(block, tmp_path):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': QUICK}
  environment['PATH'] = f'{pathlib.Path(sys.executable).parent}:{environment["PATH"]}'
  done = subprocess.run(['bash', '-e'], input=block.text, text=True, capture_output=True, cwd=tmp_path, env=environment)
  assert done.returncode == 0, done.stderr
  assert list(tmp_path.glob('runs/*/checkpoints'))


# Programs.


@pytest.fixture(scope='module')
def with_runs(tmp_path_factory):
  """A directory as the README's first command leaves it: a fine-tuned policy and its reference under runs/finetune."""
  home = tmp_path_factory.mktemp('docs')
  shipped = checkpoint.load_checkpoint()
  moved = jax.tree.map(lambda x: 1.01 * x, shipped.params)
  info = checkpoint.CheckpointInfo(shipped.info.model, shipped.info.task, FinetuneConfig())
  checkpoint.save_params(home / 'runs' / 'finetune' / 'checkpoints', moved, info, step=12)
  checkpoint.save_params(home / 'runs' / 'finetune' / 'reference', shipped.params, shipped.info, step=shipped.step)
  return home


def programs():
  """Returns the Python blocks; those of the README are in the fast tier."""
  return [pytest.param(*x.values, id=x.id, marks=[pytest.mark.slow] * (not x.values[0].place.startswith('README')))
          for x in of_kind('python')]


def output_of(block):
  """Returns the text block that follows a program with nothing between them, which is its output; None without one."""
  after = BLOCKS[BLOCKS.index(block) + 1:][:1]
  return after[0].text if after and after[0].language == 'text' and not after[0].between.strip() else None


def test_the_readme_shows_what_its_program_prints():
  assert [x for x in BLOCKS if x.language == 'python' and x.place.startswith('README') and output_of(x)]


@pytest.mark.parametrize('block', programs())
def test_programs_run(block, with_runs):
  done = python('-c', block.text, cwd=with_runs)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()
  if (printed := output_of(block)) is not None:
    assert done.stdout == printed


# Pages.


def anchors_of(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.S | re.M)
  titles = re.findall(r'^#+ (.*)$', text, re.M)
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'BUILD_NOTES.md', ROOT / 'CHANGELOG.md'], ids=lambda page: page.name)
def test_links_lead_somewhere_and_lines_are_short(page):
  text = page.read_text()
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'https?://', target):
      continue
    path, _, anchor = target.partition('#')
    where = (page.parent / path).resolve() if path else page
    assert where.exists(), target
    assert not anchor or anchor in anchors_of(where), target
  loose = re.sub(r'^(\||!\[|```).*$', '', text, flags=re.M)  # rows of tables and pictures are one line
  assert [line for line in loose.splitlines() if len(line) > 120] == []


def rows_of_metrics():
  """Returns the rows of the tables of metrics."""
  rows = re.findall(r'^\| (`.*) \|$', (ROOT / 'docs' / 'metrics.md').read_text(), re.M)
  return [re.split(r'(?<!\\) \| ', row) for row in rows if not row.startswith('`metrics.jsonl`')]


def test_every_metric_of_a_run_is_described():
  described = {name for row in rows_of_metrics() for name in re.findall(r'`([\w/]+)`', row[0])}
  records = [json.loads(path.read_text()) for path in ROOT.glob('results/tiny/runs/*.json')]
  measured = {name for record in records for name in record['metrics']} - {'step'}
  assert len(measured) > 20
  assert not {name for name in measured if not name.startswith('signature/')} - described


def test_grouped_names_of_metrics_are_those_of_the_trackers():
  trackers = pytest.importorskip('critkl_jax.runtime.trackers')
  assert {row[0].strip('`'): row[1].strip('`') for row in rows_of_metrics() if len(row) == 3} == trackers.GROUPED


def test_entropies_of_exponents_are_computed():
  text = (ROOT / 'docs' / 'trainers.md').read_text()
  rows = re.findall(r'^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$', text, re.M)
  assert rows
  for exponent, *entropies in rows:
    assert entropies == [f'{half_weight_entropy(float(exponent), size):.3f}' for size in (41, 32_000, 151_936)]


def test_readme_is_short_and_begins_with_the_two_commands():
  assert len(README.read_text().splitlines()) < 150
  first, second, *_ = blocks_of(README)
  assert (first.language, first.text.splitlines()) == (
      'sh', ['pip install -e . && python -m experiments.finetune', "pip install -e '.[test]' && pytest"])
  assert second.language == 'text'
