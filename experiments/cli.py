"""The console command `critkl NAME FLAGS`: the binaries of this folder, wherever the package is installed."""

import ast
import difflib
import pathlib
import re
import runpy
import sys

HERE = pathlib.Path(__file__).parent


def binaries() -> dict[str, str]:
  """Returns the first sentence of each binary's docstring, by the binary's name."""
  found = {}
  for path in sorted(HERE.glob('*.py')):
    text = path.read_text()
    if re.search("^if __name__ == '__main__':", text, re.M):
      found[path.stem] = ' '.join((ast.get_docstring(ast.parse(text)) or '').split('\n\n')[0].split())
  return found


def main(argv: list[str] | None = None) -> None:
  """Runs the binary that the first argument names with the others; exits with status 2 if there is none such."""
  name, *others = (sys.argv[1:] if argv is None else argv) or ['--help']
  known = binaries()
  if name in ('-h', '-help', '--help', 'help'):
    width = max(map(len, known)) + 2
    print('usage: critkl NAME FLAGS; `critkl NAME --help` lists the flags.\n')
    print('\n'.join(f'  {own:<{width}}{sentence}' for own, sentence in known.items()))
    return
  if name not in known:
    near = difflib.get_close_matches(name, known, 1)
    hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(known)}.'
    print(f'error: critkl has no command {name!r}; {hint}', file=sys.stderr)
    sys.exit(2)
  sys.argv = [f'critkl {name}', *others]
  runpy.run_module(f'{__package__}.{name}', run_name='__main__', alter_sys=True)
