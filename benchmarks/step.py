"""Speed of an update and of sampling: python benchmarks/step.py --network=digits

For each kind of work (base training, a round of progressive distillation, DMD, sampling, and distillation with guidance), this prints images per second,
time, FLOPs, the fraction of the matrix peak, memory and compilation time. FLOPs are counted in the program before
compiler optimizations. The peak is the speed of the fastest of several large matrix products of the same type, measured
in the same process. Each row is measured in a process of its own, so that its memory is independent of other rows.
"""

import argparse
import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import cases, measuring, workloads
from benchmarks.cases import Case
from benchmarks.workloads import Row
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.unet import DTYPES
from diffusion_distillation.system import compilation, platforms

COLUMNS = (
  *('network', 'work', 'batch', 'images/s', 'ms (quartiles)', 'GFLOP', '% of peak'),
  *('peak memory, GB', 'planned, GB', 'compilation, s'),
)


def measure_apart(case: Case, seconds: float) -> Row | str:
  """Measures a case in a process of its own; returns a description of the failure if there is one."""
  command = [sys.executable, __file__, f'--row={case.to_json()}', f'--seconds={seconds}']
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = f'signal {-done.returncode}' if done.returncode < 0 else f'exit code {done.returncode}'
    return f'failed ({reason}): {lines[-1].strip()[:300] if lines else "no message"}'
  return Row.from_dict(json.loads(done.stdout.splitlines()[-1]))


def describe(row: Row) -> str:
  """A description of the devices and the peak."""
  return f'{row.devices} {row.backend} device(s), {row.case.dtype}; measured matrix peak {row.peak / 1e9:,.0f} GFLOP/s'


def cells(row: Row) -> tuple[str, ...]:
  """The cells of a row, in the order of COLUMNS."""
  work = f'sampling, NFE {row.case.calls}' if row.case.work == 'sampling' else row.case.work
  planned = '-' if row.planned is None else f'{row.planned / 1e9:.3f}'
  return (
    *(row.case.network, work, str(row.batch), f'{row.batch / row.seconds.median:.4g}'),
    *(f'{row.seconds.scaled(1e3):.1f}', f'{row.flops / 1e9:.4g}', f'{100 * row.share:.1f}'),
    *(f'{row.memory / 1e9:.3f}', planned, f'{row.compile_seconds:.1f}'),
  )


def show(cases: list[Case], seconds: float, measured: list[Row]) -> int:
  """Prints the table and adds its rows to `measured`; returns the number of cases that failed."""
  failed, last = 0, None
  for case in cases:
    found = measure_apart(case, seconds)
    if isinstance(found, str):
      print(f'{case.network}, {case.work}: {found}', file=sys.stderr, flush=True)
      failed += 1
      continue
    if last is None or last != case.network:
      print(f'\n{case.network}: {found.parameters:,} parameters; {describe(found)}\n')
      measuring.table(*COLUMNS)
      last = case.network
    measuring.row(*cells(found))
    measured.append(found)
  return failed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Parses the flags."""
  parser = measuring.Parser(description=__doc__.splitlines()[0])
  networks = measuring.some_of('network', cases.NETWORKS)
  works = measuring.some_of('work', cases.WORKS)
  parser.add_argument('--network', type=networks, default='digits', help=', '.join(cases.NETWORKS))
  parser.add_argument(
    '--work', type=works, default='base,round,dmd,sampling', help='kinds of work to measure'
  )
  parser.add_argument(
    '--batch', type=measuring.at_least(1), default=0, help="images per batch; by default the network's"
  )
  parser.add_argument('--dtype', type=measuring.one_of('type', DTYPES), default='float32')
  parser.add_argument(
    '--calls', type=measuring.at_least(1), default=4, help='network evaluations per image in sampling'
  )
  parser.add_argument(
    '--seconds', type=measuring.duration, default=20.0, help='approximate seconds per row'
  )
  parser.add_argument('--json', type=pathlib.Path, help='file to write the rows to, in addition')
  parser.add_argument('--row', type=Case.from_json, help=argparse.SUPPRESS)
  parser.add_argument('--flops', type=Case.from_json, help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and prints the table; the exit code is 1 if a row failed."""
  args = parse(argv)
  if args.flops:
    print(workloads.count_flops(args.flops))
    return 0
  if args.row:
    compilation.use('none')  # a cached program would hide the compilation time
    platforms.start()
    try:
      print(json.dumps(workloads.measure(args.row, args.seconds).to_dict()))
    except UserError as error:
      print(error, file=sys.stderr)
      return error.exit_code
    return 0
  cases = [
    Case(network, work, args.batch, args.dtype, args.calls)
    for network in args.network
    for work in args.work
  ]
  measured: list[Row] = []
  failed = show(cases, args.seconds, measured)
  if args.json:
    args.json.write_text(json.dumps([row.to_dict() for row in measured], indent=2) + '\n')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
