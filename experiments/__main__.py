"""Starts a program of this folder by its name: `critkl finetune --preset=smoke` if the package is installed.

In a checkout `python -m experiments finetune --preset=smoke` does the same.
"""

import ast
import difflib
import pathlib
import runpy
import sys
import textwrap


def main() -> None:
  """Runs the program that the first argument names, with the other arguments; exits with status 2 if it is unknown."""
  name, found = (sys.argv[1:] or ['--help'])[0], programs()
  if name in found:
    from critkl_jax.runtime import interruption  # here, so that the list of programs is printed at once

    interruption.watch_process()  # before the imports of the program, which take seconds
    del sys.argv[1]
    runpy.run_module(f'{__package__}.{name}', run_name='__main__', alter_sys=True)
  elif name in ('-h', '--help', '--helpfull', 'help'):
    lines = (textwrap.fill(f'  {name:<20} {says}', 79, subsequent_indent=' ' * 23) for name, says in found.items())
    print('usage: critkl NAME [FLAGS]', '', *lines, '', 'critkl NAME --help lists the flags of a program.', sep='\n')
  else:
    nearest = difflib.get_close_matches(name, found, 1, 0.0)[0]
    print(f'critkl: there is no program {name!r}; the nearest is {nearest!r}, and --help lists all.', file=sys.stderr)
    sys.exit(2)


def programs() -> dict[str, str]:
  """Returns each program's name and the first sentence of its docstring, without importing it."""
  found = {}
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    source = path.read_text()
    if path.stem != '__main__' and "\nif __name__ == '__main__'" in source:
      text = ' '.join(ast.get_docstring(ast.parse(source)).partition('\n\n')[0].split())
      found[path.stem] = text.partition('. ')[0].removesuffix('.') + '.'
  return found


if __name__ == '__main__':
  main()
