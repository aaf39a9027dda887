"""The data volume of the collectives in a compiled program, from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
_BITS = {
  'pred': 8,
  'bf16': 16,
  'c64': 64,
  'c128': 128,
}  # the names of other types contain their size: f32, s8, u4, f8e4m3fn
_ARRAY = re.compile(r'\b(pred|bf16|[fsuc]\d+(?:e\w+)?)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.-]+ = (\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+) ([\w-]+)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{')
_CALLED = re.compile(r'(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective instruction.

  Attributes:
    kind: one of KINDS.
    bytes: size of its result on each device, over all arrays.
    devices: number of devices per replica group; 0 for all devices.
    calls: number of executions per call of the program.
    name: name of the operation in the source.
  """

  kind: str
  bytes: int
  devices: int
  calls: int
  name: str


def array_bytes(shape: str) -> int:
  """Size in bytes of an HLO shape, such as `f32[8,3]{1,0}`, or of a tuple of shapes."""
  total = 0
  for dtype, sizes in _ARRAY.findall(shape):
    bits = _BITS.get(dtype) or int(re.findall(r'\d+', dtype)[0])
    total += bits * math.prod(int(size) for size in sizes.split(',') if size) // 8
  return total


def read(text: str) -> list[Collective]:
  """The collectives of an HLO module's text.

  Asynchronous collectives are counted at their end (`-done`), and those in loops are multiplied by the trip count.
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
  """The lines of each computation, and the name of the entry computation."""
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
  """The computations that an instruction calls, and how often; reducers are left out."""
  if operation in ('call', 'while', 'fusion', 'conditional', 'async-start'):
    trips = _TRIPS.search(line)
    times = int(trips[1]) if trips and operation == 'while' else 1
    branches = [name.strip(' %') for group in _BRANCHES.findall(line) for name in group.split(',')]
    for name in [*_CALLED.findall(line), *branches]:
      yield name, times


def _group(line: str) -> int:
  """Number of devices in a replica group, from `[4,2]<=[8]`, `{{0,1},{2,3}}` or `mesh['a'=4,'b'=2] {'b'}`."""
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
  """Bytes per call of the program, by kind; kinds that do not occur are left out."""
  total: dict[str, int] = collections.Counter()
  for collective in found:
    total[collective.kind] += collective.bytes * collective.calls
  return dict(total)
