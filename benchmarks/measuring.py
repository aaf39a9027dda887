"""Shared by the benchmarks: timing, peak memory, medians, fits, tables and flags. Imports neither jax nor torch."""

import argparse
import ctypes
import math
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, NoReturn

_GROUP = 0.25  # seconds; faster calls are timed several at a time


class Spread(NamedTuple):
  """The quartiles of some measurements."""

  low: float
  median: float
  high: float

  def __format__(self, spec: str) -> str:
    """The median, with the other quartiles in parentheses; `spec` applies to each number."""
    return f'{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})'

  def scaled(self, factor: float) -> 'Spread':
    """The same measurements in another unit."""
    return Spread(*(factor * value for value in self))


def spread(values: Sequence[float]) -> Spread:
  """The quartiles of `values`, interpolated; of a single value, all three are equal."""
  if len(values) == 1:
    return Spread(values[0], values[0], values[0])
  return Spread(*statistics.quantiles(values, n=4, method='inclusive'))


def repeat(
  run: Callable[[], Any], wait: Callable[[], Any], seconds: float, least: int = 2
) -> list[float]:
  """Times a call repeatedly.

  Args:
    run: the call; it may return before the device is done.
    wait: returns when the device is done.
    seconds: approximate total time.
    least: minimum number of measurements, even if they take longer.

  Returns:
    Seconds per call. Each measurement is the mean over consecutive calls that together take a quarter of a second,
    or a twentieth of `seconds` if that is less.
  """

  def timed(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
      run()
    wait()
    return (time.perf_counter() - start) / count

  began = time.perf_counter()
  first = timed(1)
  count = max(1, int(min(_GROUP, seconds / 20) / first))
  found = [first] if count == 1 else []
  while len(found) < least or time.perf_counter() - began < seconds:
    found.append(timed(count))
  return found


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
  """The exponent p of the power law y = c x^p, fitted by least squares of log y over log x."""
  fit = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
  return fit.slope


def peak_memory() -> int:
  """Peak memory of this process in bytes, since the last call of `forget_peak_memory` if there was one.

  On Linux this is VmHWM rather than ru_maxrss. Both are the peak of the resident set, but the latter is never below the
  peak of the parent process.
  """
  status = pathlib.Path('/proc/self/status')
  if status.is_file():
    lines = dict(line.split(':', 1) for line in status.read_text().splitlines() if ':' in line)
    if 'VmHWM' in lines:
      return 1024 * int(lines['VmHWM'].split()[0])
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak_memory() -> None:
  """Resets `peak_memory`, so that it excludes memory that has been freed, such as the compiler's; on Linux only."""
  try:
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  except (AttributeError, OSError):
    pass


class Parser(argparse.ArgumentParser):
  """A flag parser whose errors are one line, with exit code 2."""

  def error(self, message: str) -> NoReturn:
    """Prints the message and ends the process."""
    self.exit(2, f'error: {message}\n')


def one_of(what: str, known: Collection[str]) -> Callable[[str], str]:
  """The type of a flag whose value is a name in `known`."""

  def parse(text: str) -> str:
    if text not in known:
      raise argparse.ArgumentTypeError(f'unknown {what} {text!r}; choose from {", ".join(known)}')
    return text

  return parse


def some_of(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
  """The type of a flag whose value is a comma-separated list of names in `known`."""
  return lambda text: [one_of(what, known)(name) for name in text.split(',')]


def at_least(smallest: int) -> Callable[[str], int]:
  """The type of a flag whose value is an integer, at least `smallest`."""

  def parse(text: str) -> int:
    if not text.isdecimal() or int(text) < smallest:
      raise argparse.ArgumentTypeError(f'{text!r} is not an integer of at least {smallest}')
    return int(text)

  return parse


def duration(text: str) -> float:
  """The type of a flag whose value is a non-negative duration."""
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0.0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f'{text!r} is not a duration')
  return value


def table(*columns: str) -> None:
  """Prints the header of a markdown table."""
  row(*columns)
  row(*('---' for _ in columns))


def row(*cells: Any) -> None:
  """Prints a row of a markdown table."""
  print('| ' + ' | '.join(str(cell) for cell in cells) + ' |', flush=True)
