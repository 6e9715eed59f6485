"""Checks many command lines of one binary in one process, with the binary's own `check`.

    python command_lines.py finetune 500    # 500 lines that Hypothesis generates
    python command_lines.py finetune        # lines from the standard input, a JSON list of lists

Prints JSON: for each line its words, the exit code (0 if it passed), what was printed, an exception that was no exit,
the seconds, and the files that it left.
"""

import contextlib
import io
import json
import os
import pathlib
import runpy
import sys
import tempfile
import time

import jax
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments import flags as flags_lib  # noqa: E402
from experiments import parsing  # noqa: E402


def load(binary):
  """Loads a binary and returns its `check`, its positional arguments, and the names of its flags."""
  found, shared = [], set(flags.FLAGS)
  flags_lib.run = lambda main, check, *arguments: found.append((check, arguments))
  sys.argv = [str(ROOT / 'experiments' / f'{binary}.py')]
  runpy.run_module(f'experiments.{binary}', run_name='__main__', alter_sys=True)
  own = sorted(set(flags.FLAGS) - shared) + ['compilation_cache']
  return *found[0], own


def tried(check, arguments, line, folder):
  """Checks one command line and returns the outcome."""
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  before, start = set(folder.rglob('*')), time.monotonic()
  out, code, raised = io.StringIO(), 0, ''
  with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
    try:
      flags_lib.checked_line(check, arguments, parsing.parse([sys.argv[0], *line]))
    except SystemExit as stop:
      code = stop.code
    except Exception as error:
      raised = f'{type(error).__name__}: {error}'[:300]
  return {'line': line, 'code': code, 'said': out.getvalue(), 'raised': raised, 'seconds': time.monotonic() - start,
          'folder': str(folder), 'left': [str(path) for path in set(folder.rglob('*')) - before],
          'devices': jax._src.xla_bridge.backends_are_initialized()}


SHIPPED = str(ROOT / 'critkl_jax' / 'checkpoints' / 'addition_n5')
WORDS = st.one_of(
    st.just(SHIPPED),
    st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=6),
    st.sampled_from(['', ',', ',,,', 'a', '²', '1,1.0,1e0', 'nan', 'inf', '-inf', '1e400', '1e-320', '1e9', '2.5', '-1',
                     '0', '1', '3', '0.5', '1e-3', '9' * 30, '1' + '0' * 400, '1099511627776', '1000000000', '0x10',
                     'true', 'maybe', 'data:²', 'data:1', 'data:-1', 'data:2,data:2', 'member:3', 'mesh:1', 'localhost',
                     'localhost:99999', '[::1]:1', 'a b:1', 'standard', 'standard,standard', 'prioritised', 'core',
                     'drift,drif', 'x' * 300, '5,6', '5,5', '/proc/none', '/dev/null', '~', '\n', 'a\nb', '%s',
                     'FOLDER/broken',
                     'FOLDER/new', 'FOLDER/file', 'FOLDER/file/under', 'FOLDER/link', 'FOLDER', 'FOLDER/nowhere/deep',
                     'FOLDER/' + 'y' * 300, 'FOLDER' + '/z' * 3000]),
    st.integers().map(str), st.integers(-1, 40).map(str), st.floats().map(str), st.floats(0, 1).map(str))


def lines_of(own, arguments):
  """Returns a strategy of command lines: the binary's flags with words as values, misspelt flags, and arguments."""
  name = st.one_of(st.sampled_from(own), st.sampled_from(own), st.sampled_from(own), st.text('abcdelr_', max_size=8),
                   st.sampled_from(own).map(lambda x: x[:-1]), st.sampled_from(own).map('no{}'.format))
  valued = st.builds('--{}={}'.format, name, WORDS)
  enums = [x for x in own if hasattr(flags.FLAGS[x].parser, 'enum_values')]
  known = st.sampled_from(enums).flatmap(lambda x: st.sampled_from(list(flags.FLAGS[x].parser.enum_values)).map(
      f'--{x}={{}}'.format)) if enums else valued
  boolean = st.sampled_from([f'--{no}{x}' for x in own for no in ('', 'no')])
  positional = st.lists(WORDS, min_size=len(arguments), max_size=len(arguments)) if arguments else st.just([])
  return st.builds(lambda some, rest: some + [word for word in rest if not word.startswith('-')],
                   st.lists(st.one_of(valued, valued, valued, known, boolean), min_size=1, max_size=3), positional)


def main(binary, number=0):
  check, arguments, own = load(binary)
  results = []
  with tempfile.TemporaryDirectory() as home:
    folder = pathlib.Path(home)
    (folder / 'file').write_text('notes')
    (folder / 'link').symlink_to(folder / 'nothing')
    (folder / 'broken').mkdir()
    for name in ('analysis.json', 'comparison.json', 'studies.json'):
      (folder / 'broken' / name).write_text('{')
    os.chdir(folder)

    def one(line):
      line = [word.replace('FOLDER', home) for word in line]
      results.append(tried(check, arguments, line, folder))

    if number:
      made = given(lines_of(own, arguments))(one)
      settings(max_examples=number, derandomize=True, database=None, deadline=None,
               suppress_health_check=list(HealthCheck))(made)()
    else:
      for line in json.load(sys.stdin):
        one(line)
  json.dump(results, sys.__stdout__)


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:]))
