"""Parses command lines, and refuses wrong ones in one line with the nearest known name.

Neither this module nor the `check` function of a binary starts a device or writes a file.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from critkl_jax.config import LARGEST_INT, LARGEST_SEED, nearest
from critkl_jax.tasks.addition.config import MOST_DIGITS

from .exits import refuse

# Names of flags in other projects and in papers -> names here.
_OTHER_NAMES = {'alpha': 'kl_coefficient', 'beta': 'certainty_exponent', 'gamma': 'discount', 'lambda': 'gae_lambda',
                'epsilon': 'clip_ratio', 'output': 'workdir', 'output_dir': 'workdir', 'out': 'workdir',
                'steps': 'num_iterations', 'iterations': 'num_iterations', 'batch_size': 'episodes'}
_EXPECTED = {'int': 'a whole number', 'float': 'a number', 'bool': 'true or false'}
_PORTS = range(1, 2**16)


def define_seed(name: str = 'seed', text: str = 'Seed of problems and samples.') -> flags.FlagHolder:
  """Defines a flag for a seed, 0 to `LARGEST_SEED`."""
  return flags.DEFINE_integer(name, 0, text, lower_bound=0, upper_bound=LARGEST_SEED)


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses a command line into the flags, or exits with one line; returns the program's name and other arguments."""
  try:
    rest = values(list(argv))
  except flags.UnrecognizedFlagError as error:
    refuse(f'--{error.flagname}: there is no such flag; the nearest is --{nearest_flag(error.flagname, values)}, and '
           '--help lists all.')
  except (flags.Error, ValueError) as error:  # ValueError: a value for --noNAME
    refuse(_rewritten(error, values))
  for name in values:
    _check_number(values[name])
  return rest


def nearest_flag(name: str, values: flags.FlagValues = flags.FLAGS) -> str:
  """Returns the flag of this binary whose name is most similar."""
  own = [flag.name for flag in values.get_key_flags_for_module(sys.argv[0])] + ['compilation_cache']
  other = _OTHER_NAMES.get(name, '')
  return other if other in own else nearest(name, own)


def _rewritten(error, values):
  """Rewrites an error message of absl in one line, with the expected values and the nearest known one."""
  said = ' '.join(str(error).split())
  match = re.match(r'flag --(\w+)=(.*?): (.*)', said)
  if not match or match[1] not in values:
    return said
  name, value, reason = match.groups()
  flag = values[name]
  if hasattr(flag.parser, 'enum_values'):
    known = list(flag.parser.enum_values)
    return f'--{name}={value}: expected one of {", ".join(known)}; the nearest is {nearest(value, known)}.'
  beyond = ' is not ' in reason  # a value outside its bounds, for which absl's message is clear
  return f'--{name}={value}: ' + (f'{reason}.' if beyond else f'expected {_EXPECTED.get(flag.flag_type(), reason)}.')


def _check_number(flag):
  """Exits with one line if a number is infinite, NaN or beyond int32, which no config field can hold."""
  if not flag.present or flag.value is None:
    return
  if flag.flag_type() == 'float' and not math.isfinite(flag.value):
    refuse(f'--{flag.name}: expected a finite number, got {flag.value}.')
  if flag.flag_type() == 'int' and 'seed' not in flag.name and abs(flag.value) > LARGEST_INT:
    refuse(f'--{flag.name}: expected a whole number up to {LARGEST_INT}, got {str(flag.value)[:30]}.')


# Flags with lists of values.


def read_names(flag: flags.FlagHolder) -> list[str] | None:
  """Returns the names in a flag's list, None without the flag; exits with one line if a name is empty."""
  if flag.value is not None and not (flag.value and all(flag.value)):
    refuse(f'--{flag.name}: expected names separated by commas, got {",".join(flag.value)!r}.')
  return flag.value


def read_numbers(name: str, given: list[str] | None, kind: Callable[[str], Any] = float) -> list[Any] | None:
  """Returns the numbers in a list, None without a list; exits with one line if an item is no number or repeated."""
  if given is None:
    return None
  found = []
  for text in given or ['']:
    try:
      number = kind(text)
    except ValueError:
      number = math.nan
    if not math.isfinite(number):
      refuse(f'--{name}: expected {"whole " if kind is int else ""}numbers separated by commas, got '
             f'{",".join(given)!r}.')
    if number in found:
      refuse(f'--{name}: {number:g} appears twice; give it once.')
    found.append(number)
  return found


def read_sizes(flag: flags.FlagHolder, number: int) -> tuple[int, ...]:
  """Returns a flag's list of `number` whole numbers, each 1 or more, or exits with one line."""
  if len(flag.value) != number or not all(re.fullmatch(r'[1-9][0-9]{0,8}', text) for text in flag.value):
    refuse(f'--{flag.name}: expected {number} whole numbers separated by commas, got {",".join(flag.value)!r}.')
  return tuple(map(int, flag.value))


def read_digits(flag: flags.FlagHolder, most: int = MOST_DIGITS) -> list[int] | None:
  """Returns a flag's list of numbers of digits, or of facts, None without the flag, or exits with one line."""
  found = read_numbers(flag.name, flag.value, int)
  for number in found or []:
    if not 1 <= number <= most:
      refuse(f'--{flag.name}: expected 1 to {most}, got {str(number)[:30]}.')
  return found


def check_known(flag: str, given: Iterable[str], known: Sequence[str]) -> None:
  """Exits with one line, which suggests the nearest known name, if a name is unknown."""
  for name in given:
    if name not in known:
      refuse(f'--{flag}: there is no {name!r}; the nearest is {nearest(name, known)!r}, of {", ".join(known)}.')


def check_hosts(values: flags.FlagValues) -> None:
  """Exits with one line if the flags for several hosts are invalid or contradict each other."""
  address = values.coordinator_address
  if not (values.multi_host or address):
    for name in ('num_processes', 'process_id', 'coordinator_address'):
      if values[name].value is not None:
        refuse(f'--{name}: expected a host and its port, such as 10.0.0.1:1234, got {values[name].value!r}.'
               if name == 'coordinator_address' else
               f'--{name}: means nothing without --coordinator_address or --multi_host.')
    return
  match = re.fullmatch(r'(\[[0-9a-fA-F:.%]+\]|[\w.-]+):([0-9]{1,5})', address or 'localhost:1')
  if not match or int(match[2]) not in _PORTS:
    refuse(f'--coordinator_address: expected a host and its port, such as 10.0.0.1:1234, got {address!r}.')
  number, own = values.num_processes, values.process_id
  if number is not None and number < 1:
    refuse(f'--num_processes: expected 1 or more, got {number}.')
  if own is not None and not 0 <= own < (number or LARGEST_INT):
    refuse(f'--process_id: expected 0 to {(number or LARGEST_INT) - 1}, got {own}.')
