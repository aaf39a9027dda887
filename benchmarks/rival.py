"""Comparison with PyTorch: python benchmarks/rival.py --network=digits

Both sides run the same network and the same work, each in a process of its own. They alternate in turns of a few
seconds, so that a machine that slows down affects both; the reported ratio is computed turn by turn. PyTorch runs in
eager mode and with torch.compile, and the faster one is used. --check copies our parameters into PyTorch's network and
compares the results. PyTorch must be installed; nothing else in this project needs it.

Measure on an otherwise idle CPU: PyTorch's threads synchronize in every operation, so that other load slows it down much
more than it slows us down. PyTorch runs with one thread where that is faster than with all.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measuring  # neither jax nor torch: the process of each side imports its own

WORKS = ('base', 'round', 'sampling')
COLUMNS = (
  *('work', 'batch', 'PyTorch', 'ms ours (quartiles)', 'ms PyTorch (quartiles)'),
  *('PyTorch / ours, turn by turn (quartiles)', '% of peak: ours', 'PyTorch'),
  *('peak memory, GB: ours', 'PyTorch'),
)
_PREPARING = (
  0.75  # fraction of the time for a kind of work after which a side that is not ready is dropped
)
_PATIENCE = 2.0  # seconds that a side has to exit by itself
_TOLERANCE = 1e-4
_PEAK_SECONDS = 1.0


class Failed(Exception):
  """A side failed; the message says why."""


class Side:
  """A process that does the work of one side on request; see `serve`."""

  def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
    context = multiprocessing.get_context('spawn')
    self.name = name
    self._connection, other = context.Pipe()
    self._process = context.Process(target=target, args=(other, *args))
    self._process.start()
    other.close()

  def answer(self, deadline: float) -> Any:
    """Waits for the next answer until time.monotonic() is `deadline`; raises Failed."""
    if not self._connection.poll(max(0.0, deadline - time.monotonic())):
      raise Failed(f'{self.name} was not ready in time; --minutes allows more')
    try:
      kind, value = self._connection.recv()
    except (EOFError, OSError):
      self._process.join(10)
      raise Failed(f'{self.name} ended with exit code {self._process.exitcode}') from None
    if kind == 'failed':
      raise Failed(f'{self.name}: {value}')
    return value

  def ask(self, message: Any, deadline: float) -> Any:
    """Sends a request and returns the answer."""
    with contextlib.suppress(OSError):  # `answer` notices that the process has ended
      self._connection.send(message)
    return self.answer(deadline)

  def end(self) -> None:
    """Ends the process and its children, by force unless it is waiting for a request."""
    self._connection.close()
    self._process.join(_PATIENCE)
    with contextlib.suppress(OSError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.kill()
    self._process.join()


def serve(connection: Any, prepare: Callable[[], tuple[Any, dict[str, Any], dict[str, Any]]]) -> None:
  """The process of a side: prepares its work, reports it, and then answers requests.

  Args:
    connection: connection to the parent process. Each answer is ('ok', value) or ('failed', reason). A request that is
      a number is a time to measure for, and the answer is the seconds per call.
    prepare: returns an object with `run` and `wait`; functions without arguments, by request; and a description of the
      work.
  """
  os.setpgrp()  # so that its children, such as compilers, can be ended with it
  try:
    work, answers, about = prepare()
    connection.send(('ok', about))
    while True:
      asked = connection.recv()
      if asked in answers:
        connection.send(('ok', answers[asked]()))
      else:
        connection.send(('ok', measuring.repeat(work.run, work.wait, asked, least=1)))
  except (EOFError, OSError):
    pass  # the parent has ended
  except Exception as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    connection.send(('failed', f'{type(error).__name__}: {lines[0][:300] if lines else ""}'))


def ours(connection: Any, case: dict[str, Any]) -> None:
  """The process of our side. Describes the work before compiling it."""

  def prepare() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    import jax

    from benchmarks import cases, workloads
    from diffusion_distillation.system import compilation, platforms

    compilation.use('none')
    platforms.start()
    known = cases.Case(**case)
    connection.send(('ok', (workloads.describe(known), jax.default_backend(), jax.device_count())))
    flops = workloads.begin_counting_flops(known)
    work = workloads.prepare(known)

    def peak() -> float:
      found = workloads.peak_flops(known.dtype, _PEAK_SECONDS)
      measuring.forget_peak_memory()
      return found

    answers = {'peak': peak, 'memory': workloads.peak_memory}
    return work, answers, {'flops': flops(), 'compile_seconds': work.compile_seconds}

  serve(connection, prepare)


def theirs(connection: Any, spec: dict[str, Any], place: tuple[str, str], compiled: bool) -> None:
  """The process of PyTorch's side; `place` is the argument of `rival_torch.choose_device`."""

  def prepare() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from benchmarks import rival_torch, rival_torch_work

    device = rival_torch.choose_device(*place)
    work = rival_torch_work.Work(rival_torch_work.Spec(**spec), device, compiled)
    for _ in range(2):  # the first call compiles, and the second one may compile again
      work.run()
      work.wait()

    def peak() -> float:
      best = 0.0
      for width in (4096, 8192, 16384) if device == 'cuda' else (512, 1024, 2048):
        product = rival_torch_work.matrix_product(width, spec['dtype'], device)
        seconds = min(measuring.repeat(*product, _PEAK_SECONDS))
        best = max(best, 2.0 * width**3 / seconds)
      measuring.forget_peak_memory()
      work.forget_peak_memory()
      return best

    def memory() -> int:
      return rival_torch_work.peak_memory(device) or measuring.peak_memory()

    answers = {'peak': peak, 'memory': memory, 'threads': work.choose_threads}
    return work, answers, {'device': device}

  serve(connection, prepare)


def compare(case: dict[str, Any], args: argparse.Namespace, deadline: float) -> dict[str, Any]:
  """Measures one kind of work; raises Failed if that takes beyond time.monotonic() = `deadline`."""
  began = time.monotonic()
  ready_by = began + _PREPARING * (deadline - began)
  sides = [Side('ours', ours, case)]
  try:
    spec, backend, devices = sides[0].answer(ready_by)
    place = (args.device, backend)
    kinds = ('eager', 'compiled') if args.compile else ('eager',)
    sides += [Side(f'PyTorch, {kind}', theirs, spec, place, kind == 'compiled') for kind in kinds]
    about = sides[0].answer(ready_by)
    rivals, notes = [], []
    for side in sides[1:]:
      try:
        about |= side.answer(ready_by)
        rivals.append(side)
      except Failed as error:
        notes.append(str(error))
        side.end()
    if not rivals:
      raise Failed('; '.join(notes))
    for side in rivals:
      threads = side.ask('threads', deadline)
      notes.append(f'{side.name}: {threads} thread(s)')
    if len(rivals) > 1:
      tried = [min(side.ask(args.seconds, deadline)) for side in rivals]
      notes.append(', '.join(f'{s.name}: {1e3 * t:.1f} ms' for s, t in zip(rivals, tried, strict=True)))
      rivals = [side for _, side in sorted(zip(tried, rivals, strict=True), key=lambda one: one[0])]
      for side in rivals[1:]:
        side.end()
    peaks = [side.ask('peak', deadline) for side in (sides[0], rivals[0])]
    pairs = take_turns(sides[0], rivals[0], args, deadline)
    memory = [side.ask('memory', deadline + 10.0) for side in (sides[0], rivals[0])]
  finally:
    for side in sides:
      side.end()
  return {
    **{'case': case, 'batch': spec['batch'], 'parameters': spec['num_parameters']},
    **{'backend': backend, 'devices': devices, 'torch_device': about['device']},
    **{'kind': rivals[0].name.split()[-1], 'notes': notes, 'pairs': pairs},
    **{'flops': about['flops'], 'compile_seconds': about['compile_seconds'], 'peak': max(peaks)},
    **{'peak_ours': peaks[0], 'peak_torch': peaks[1]},
    **{'memory_ours': memory[0], 'memory_torch': memory[1]},
  }


def take_turns(
  one: Side, other: Side, args: argparse.Namespace, deadline: float
) -> list[tuple[float, float]]:
  """Seconds per call of both sides, turn by turn: the median of each turn."""
  pairs: list[tuple[float, float]] = []
  longest = 0.0
  while len(pairs) < args.turns and (not pairs or time.monotonic() + longest < deadline):
    began = time.monotonic()
    turn = [measuring.spread(side.ask(args.seconds, deadline)).median for side in (one, other)]
    pairs.append((turn[0], turn[1]))
    longest = max(longest, time.monotonic() - began)
  return pairs


def cells(found: dict[str, Any]) -> tuple[str, ...]:
  """The cells of a row, in the order of COLUMNS."""
  ms = [measuring.spread([1e3 * pair[k] for pair in found['pairs']]) for k in (0, 1)]
  ratio = measuring.spread([theirs / ours for ours, theirs in found['pairs']])
  shares = [f'{100 * found["flops"] / (1e-3 * one.median) / found["peak"]:.1f}' for one in ms]
  memory = [f'{found[key] / 1e9:.3f}' for key in ('memory_ours', 'memory_torch')]
  case = found['case']
  work = f'sampling, NFE {case["calls"]}' if case['work'] == 'sampling' else case['work']
  told = (f'{ms[0]:.1f}', f'{ms[1]:.1f}', f'{ratio:.2f}')
  return (work, str(found['batch']), found['kind'], *told, *shares, *memory)


def show(args: argparse.Namespace, end: float) -> list[dict[str, Any]]:
  """Measures as much as possible until time.monotonic() = `end`; prints the table and what was skipped."""
  measured: list[dict[str, Any]] = []
  for k, work in enumerate(args.work):
    now = time.monotonic()
    deadline = now + (end - now) / (len(args.work) - k)
    case = {'network': args.network, 'work': work, 'batch': args.batch, 'dtype': args.dtype}
    try:
      found = compare({**case, 'calls': args.calls}, args, deadline)
    except Failed as error:
      print(
        f'{work}: skipped after {time.monotonic() - now:.0f} s: {error}', file=sys.stderr, flush=True
      )
      continue
    if not measured:
      print(
        f'\n{args.network}: {found["parameters"]:,} parameters, {args.dtype}; ours on {found["devices"]} '
        f'{found["backend"]} device(s), PyTorch on {found["torch_device"]}; measured matrix peak '
        f'{found["peak"] / 1e9:,.0f} GFLOP/s\n'
      )
      measuring.table(*COLUMNS)
    for note in found['notes']:
      print(f'{work}: {note}', file=sys.stderr, flush=True)
    measuring.row(*cells(found))
    measured.append(found)
  return measured


def check(network: str, works: list[str]) -> int:
  """Compares the results of both sides from the same parameters and inputs; 1 if they differ, else 0."""
  from benchmarks import rival_check

  errors = rival_check.errors(network, works)
  measuring.table('compared', 'relative error')
  for name, error in errors.items():
    measuring.row(name, f'{error:.1e}')
  wrong = [name for name, error in errors.items() if not error < _TOLERANCE]
  if wrong:
    print(f'error: relative error above {_TOLERANCE}: {", ".join(wrong)}', file=sys.stderr)
  return 1 if wrong else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Parses the flags."""
  from benchmarks import cases
  from diffusion_distillation.networks.unet import DTYPES

  parser = measuring.Parser(description=__doc__.splitlines()[0])
  network = measuring.one_of('network', cases.NETWORKS)
  positive = measuring.at_least(1)
  parser.add_argument('--network', type=network, default='digits', help=', '.join(cases.NETWORKS))
  parser.add_argument('--work', type=measuring.some_of('work', WORKS), default=','.join(WORKS))
  parser.add_argument(
    '--batch', type=positive, default=0, help="images per batch; by default the network's"
  )
  parser.add_argument('--dtype', type=measuring.one_of('type', DTYPES), default='float32')
  parser.add_argument(
    '--calls', type=positive, default=4, help='network evaluations per image in sampling'
  )
  parser.add_argument(
    '--device',
    type=measuring.one_of('device', ('auto', 'cpu', 'cuda')),
    default='auto',
    help="PyTorch's device: auto, cpu or cuda",
  )
  parser.add_argument(
    '--turns', type=positive, default=10, help='number of turns per side, if time allows'
  )
  parser.add_argument('--seconds', type=measuring.duration, default=3.0, help='seconds per turn')
  parser.add_argument(
    '--minutes',
    type=measuring.duration,
    default=8.0,
    help='total time; work that does not fit is skipped',
  )
  parser.add_argument(
    '--no-compile', dest='compile', action='store_false', help='do not use torch.compile'
  )
  parser.add_argument('--check', action='store_true', help='compare the results of both sides instead')
  parser.add_argument('--json', type=pathlib.Path, help='file to write the results to, in addition')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and prints the table; the exit code is 1 if work was skipped, 2 without PyTorch."""
  began = time.monotonic()
  args = parse(argv)
  if importlib.util.find_spec('torch') is None:
    print('error: PyTorch is not installed; run `pip install torch` first', file=sys.stderr)
    return 2
  if args.check:
    return check(args.network, args.work)
  # Both sides may share a GPU, so ours must not preallocate most of its memory.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  # A side that is killed leaves semaphores behind; their removal causes a warning.
  os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker')
  measured = show(args, began + 60.0 * args.minutes)
  if args.json:
    args.json.write_text(json.dumps(measured, indent=2) + '\n')
  return 0 if len(measured) == len(args.work) else 1


if __name__ == '__main__':
  sys.exit(main())
