"""How time and memory grow: python benchmarks/growth.py --network=tiny

This measures an update of base training while the batch size, the height and width of the images, or the number of
channels are doubled repeatedly, and sampling while the number of steps is. Each point is measured in a process of its
own. The exponent p of y = c x^p is fitted for time, memory and FLOPs, which are counted in the program before compiler
optimizations. If time grows with a different exponent than FLOPs, it is not determined by arithmetic.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import cases, measuring, step
from benchmarks.cases import Case
from benchmarks.workloads import Row
from diffusion_distillation.networks.unet import DTYPES

COLUMNS = (
  *('ms (quartiles)', 'GFLOP', '% of peak', 'peak memory, GB', 'planned, GB'),
  *('exponent from the row above', 'expected from FLOPs'),
)


@dataclasses.dataclass(frozen=True)
class Axis:
  """A quantity that is doubled.

  Attributes:
    work: the work that is measured, a name in `cases.WORKS`.
    at: returns the case at 1, 2, 4, ... times the smallest value.
    value: returns the quantity of a row.
  """

  work: str
  at: Callable[[Case, int], Case]
  value: Callable[[Row], int]


def _side(row: Row) -> int:
  return row.case.larger * cases.NETWORKS[row.case.network].image_shape[0]


def _channels(row: Row) -> int:
  return int(cases.NETWORKS[row.case.network].config().model.ch) * row.case.wider


AXES = {
  'batch': Axis(
    'base', lambda c, k: dataclasses.replace(c, batch=k * c.batch_size), lambda row: row.batch
  ),
  'resolution': Axis('base', lambda c, k: dataclasses.replace(c, larger=k), _side),
  'channels': Axis('base', lambda c, k: dataclasses.replace(c, wider=k), _channels),
  'steps': Axis('sampling', lambda c, k: dataclasses.replace(c, calls=k), lambda row: row.case.calls),
}


@dataclasses.dataclass(frozen=True)
class Exponents:
  """Exponents of a sequence of rows, or between two rows; None where a row lacks the number."""

  seconds: float
  flops: float
  memory: float
  planned: float | None


def exponents(xs: Sequence[float], rows: Sequence[Row]) -> Exponents:
  """Fits power laws of `xs`, one value for each of at least two rows."""
  planned = [row.planned for row in rows if row.planned]
  return Exponents(
    seconds=measuring.exponent(xs, [row.seconds.median for row in rows]),
    flops=measuring.exponent(xs, [row.flops for row in rows]),
    memory=measuring.exponent(xs, [row.memory for row in rows]),
    planned=measuring.exponent(xs, planned) if len(planned) == len(rows) else None,
  )


def cells(row: Row, since: Exponents | None) -> tuple[str, ...]:
  """The cells of a row, in the order of COLUMNS; `since` is the row above, if there is one."""
  planned = '-' if row.planned is None else f'{row.planned / 1e9:.4f}'
  grown = ('-', '-') if since is None else (f'{since.seconds:z.2f}', f'{since.flops:z.2f}')
  return (
    *(f'{row.seconds.scaled(1e3):.1f}', f'{row.flops / 1e9:.4g}', f'{100 * row.share:.1f}'),
    *(f'{row.memory / 1e9:.3f}', planned, *grown),
  )


def show(name: str, case: Case, points: int, measure: Callable[[Case], Row | str]) -> dict[str, Any]:
  """Measures a sequence and prints its table.

  Args:
    name: name of the axis, in AXES.
    case: the smallest case; its work is replaced by that of the axis.
    points: number of points, each twice as large as the one before.
    measure: measures a case, or returns a description of the failure, which ends the sequence.

  Returns:
    `rows`, `exponents` (None for fewer than two rows) and `failed`, the failure or None; for JSON.
  """
  axis, rows, xs, failed = AXES[name], list[Row](), list[float](), None
  for k in range(points):
    found = measure(axis.at(dataclasses.replace(case, work=axis.work), 2**k))
    if isinstance(found, str):
      failed = found
      print(f'{name}: {found}', file=sys.stderr, flush=True)
      break
    if not rows:
      print(f'\n{axis.work} of {case.network} by {name}; {step.describe(found)}\n')
      measuring.table(name, *COLUMNS)
    rows.append(found)
    xs.append(axis.value(found))
    since = exponents(xs[-2:], rows[-2:]) if len(rows) > 1 else None
    measuring.row(xs[-1], *cells(found, since))
  fitted = exponents(xs, rows) if len(rows) > 1 else None
  if fitted:
    planned = '' if fitted.planned is None else f', planned memory {fitted.planned:z.2f}'
    print(
      f'\nFitted exponents of {name}: time {fitted.seconds:z.2f}, expected from FLOPs {fitted.flops:z.2f}; '
      f'peak memory {fitted.memory:z.2f}{planned}',
      flush=True,
    )
  return {
    'rows': [row.to_dict() | {name: x} for x, row in zip(xs, rows, strict=True)],
    'exponents': fitted and dataclasses.asdict(fitted),
    'failed': failed,
  }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Parses the flags."""
  parser = measuring.Parser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--network',
    type=measuring.one_of('network', cases.NETWORKS),
    default='tiny',
    help='the network at its smallest size',
  )
  parser.add_argument('--axes', type=measuring.some_of('axis', AXES), default=','.join(AXES))
  parser.add_argument(
    '--points', type=measuring.at_least(1), default=4, help='number of points per sequence'
  )
  parser.add_argument(
    '--batch', type=measuring.at_least(1), default=0, help="images per batch; by default the network's"
  )
  parser.add_argument('--dtype', type=measuring.one_of('type', DTYPES), default='float32')
  parser.add_argument(
    '--seconds', type=measuring.duration, default=5.0, help='approximate seconds per point'
  )
  parser.add_argument('--json', type=pathlib.Path, help='file to write the results to, in addition')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and prints the tables; the exit code is 1 if a point failed."""
  args = parse(argv)
  case = Case(args.network, 'base', args.batch, args.dtype)
  found = {
    name: show(name, case, args.points, lambda case: step.measure_apart(case, args.seconds))
    for name in args.axes
  }
  if args.json:
    args.json.write_text(json.dumps(found, indent=2) + '\n')
  return 1 if any(one['failed'] for one in found.values()) else 0


if __name__ == '__main__':
  sys.exit(main())
