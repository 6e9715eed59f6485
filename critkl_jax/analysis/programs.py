"""What a compiled program makes devices exchange, read from its text."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32,
         's64': 64, 'u64': 64, 'f64': 64}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|branch_computations|true_computation|false_computation)='
                     r'\{?((?:%?[\w.\-]+(?:, )?)+)')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_SHAPE = re.compile(r'\b(' + '|'.join(_BITS) + r')\[([\d,]*)\]')


class Collective(NamedTuple):
  """The collectives of one kind at one depth.

  Attributes:
    kind: one of `KINDS`.
    in_loop: whether they stand in a loop, and happen in each of its rounds.
    number: of them in the text.
    bytes: of their results on a device, all of them together, each counted once.
  """

  kind: str
  in_loop: bool
  number: int
  bytes: int


def collectives(text: str) -> list[Collective]:
  """Counts the collectives of a compiled program.

  Args:
    text: `compiled.as_text()`, of any backend.

  Returns:
    A record for each kind, inside and outside of loops, in the order of `KINDS`.
  """
  bodies = _computations(text)
  looped = _inside_loops(bodies)
  number: Counter[tuple[str, bool]] = Counter()
  size: Counter[tuple[str, bool]] = Counter()
  for name, lines in bodies.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if match:
        key = match[2], name in looped
        number[key] += 1
        size[key] += _result_bytes(match[1], '-start(' in line)
  return [Collective(kind, in_loop, number[kind, in_loop], size[kind, in_loop])
          for kind in KINDS for in_loop in (False, True) if number[kind, in_loop]]


def _computations(text: str) -> dict[str, list[str]]:
  bodies, name = {}, None
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      name = match[1]
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)
  return bodies


def _inside_loops(bodies: dict[str, list[str]]) -> set[str]:
  """Returns the computations that run in the rounds of some loop."""

  def called(line):
    return [name.strip().lstrip('%') for found in _CALLED.findall(line) for name in found.split(',')]

  frontier = [name for lines in bodies.values() for line in lines if ' while(' in line for name in called(line)]
  inside: set[str] = set()
  while frontier:
    name = frontier.pop()
    if name in bodies and name not in inside:
      inside.add(name)
      frontier += [x for line in bodies[name] for x in called(line)]
  return inside


def _result_bytes(shapes: str, started: bool) -> int:
  """Returns the bytes of a result; that of an asynchronous start holds operands too, and the largest array counts."""
  sizes = [_BITS[kind] // 8 * math.prod(int(n) for n in dims.split(',') if n) for kind, dims in _SHAPE.findall(shapes)]
  return max(sizes, default=0) if started else sum(sizes)
