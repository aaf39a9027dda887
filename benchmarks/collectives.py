"""What the collectives of a compiled program move, read from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_BITS = {'pred': 8, 'bf16': 16, 'c64': 64, 'c128': 128}  # the others say theirs: f32, s8, u4, f8e4m3fn
_ARRAY = re.compile(r'\b(pred|bf16|[fsuc]\d+(?:e\w+)?)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.-]+ = (\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+) ([\w-]+)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{')
_CALLED = re.compile(r'(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction.

  Attributes:
    kind: one of KINDS.
    bytes: of its result on each device, of all arrays if there are several.
    devices: in each group that exchange with each other; 0: all there are.
    calls: how often it runs in one call of the program.
    name: of the operation of the source that it comes from.
  """

  kind: str
  bytes: int
  devices: int
  calls: int
  name: str


def array_bytes(shape: str) -> int:
  """Bytes of an HLO shape, such as `f32[8,3]{1,0}` or a tuple of such."""
  total = 0
  for dtype, sizes in _ARRAY.findall(shape):
    bits = _BITS.get(dtype) or int(re.findall(r'\d+', dtype)[0])
    total += bits * math.prod(int(size) for size in sizes.split(',') if size) // 8
  return total


def read(text: str) -> list[Collective]:
  """The collectives of an HLO module's text.

  An asynchronous one counts at its end (`-done`); one in a loop as often as the loop is known to run.
  """
  bodies, entry = _computations(text)
  found: list[Collective] = []

  def visit(name: str, calls: int) -> None:
    starts: dict[str, str] = {}
    for line in bodies.get(name, ()):
      instruction = _INSTRUCTION.match(line)
      if instruction is None:
        continue
      shape, operation = instruction.groups()
      own = line.split(' = ')[0].split()[-1]
      if operation.endswith('-start'):
        starts[own] = line
      kind = operation.removesuffix('-done')
      if kind in KINDS:
        began = next((starts[key] for key in starts if f'({key})' in line or f' {key})' in line), line)
        told = _NAME.search(began)
        found.append(Collective(kind, array_bytes(shape), _group(began), calls, told[1] if told else ''))
      for called, times in _calls(line, operation):
        visit(called, calls * times)

  visit(entry, 1)
  return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation, and the name of the first to run."""
  bodies: dict[str, list[str]] = {}
  entry, lines = '', None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      lines = bodies[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      lines = None
    elif lines is not None:
      lines.append(line)
  return bodies, entry


def _calls(line: str, operation: str) -> Iterator[tuple[str, int]]:
  """Computations that an instruction runs, and how often; not what it applies to pairs of numbers."""
  if operation in ('call', 'while', 'fusion', 'conditional', 'async-start'):
    trips = _TRIPS.search(line)
    times = int(trips[1]) if trips and operation == 'while' else 1
    branches = [name.strip(' %') for group in _BRANCHES.findall(line) for name in group.split(',')]
    for name in [*_CALLED.findall(line), *branches]:
      yield name, times


def _group(line: str) -> int:
  """Devices of a replica group: of `[4,2]<=[8]`, `{{0,1},{2,3}}` or `mesh['a'=4,'b'=2] {'b'}`."""
  sizes = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if sizes:
    return int(sizes[1])
  members = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if members:
    return len(members[1].split(','))
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line)
  if mesh:
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # of an axis, or of a part of one
    return math.prod(int(part or axes[name]) for name, part in named)
  return 0


def by_kind(found: list[Collective]) -> dict[str, int]:
  """Bytes of one call of the program, by kind; those without any are left out."""
  total: dict[str, int] = collections.Counter()
  for collective in found:
    total[collective.kind] += collective.bytes * collective.calls
  return dict(total)
