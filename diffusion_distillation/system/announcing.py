"""Announces compilations that take longer than a second; a signal during a compilation ends the process immediately."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator

import jax

from diffusion_distillation.system import compilation, files, interrupts

_MOMENT = 1.0  # seconds before anything is printed
_LOOKED_UP = 0.5  # seconds after which a lookup without a hit counts as a miss


class _Requests:
  """Counts the programs that all threads have looked up in the cache since the process started."""

  def __init__(self) -> None:
    self.asked, self.found, self.last = 0, 0, 0.0

  def listen(self, event: str, **_: object) -> None:
    if event == '/jax/compilation_cache/compile_requests_use_cache':
      self.asked, self.last = self.asked + 1, time.monotonic()
    elif event == '/jax/compilation_cache/cache_hits':
      self.found, self.last = self.found + 1, 0.0

  def ended(self, event: str, duration_secs: float, **_: object) -> None:
    del duration_secs
    if event == '/jax/core/compile/backend_compile_duration':
      self.last = 0.0

  def is_compiling(self) -> bool:
    """Whether the program that was looked up last was not in the cache and is still being compiled."""
    return bool(self.last) and time.monotonic() - self.last > _LOOKED_UP


@functools.cache
def _requests() -> _Requests:
  requests = _Requests()
  jax.monitoring.register_event_listener(requests.listen)
  jax.monitoring.register_event_duration_secs_listener(requests.ended)
  return requests


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
  """Prints to stderr that the body is compiling `what`, when it began, and whether the program was in the cache.

  Nothing is printed for a body that takes less than a second. A signal may end the process anywhere in the body, so the body
  must not make changes that are unsafe to interrupt; see `interrupts.at_once`.
  """
  done = threading.Event()
  teller = threading.Thread(target=_tell, args=(what, _requests(), done), daemon=True)
  if files.writes():
    teller.start()
  try:
    with interrupts.at_once(f'compiling {what}'):
      yield
  finally:
    done.set()
    if teller.ident is not None:
      teller.join()


def _tell(what: str, requests: _Requests, done: threading.Event) -> None:
  began, clock, found = time.monotonic(), time.strftime('%H:%M:%S'), requests.found
  announced = False
  while not done.wait(0.1):
    if announced or time.monotonic() - began < _MOMENT:
      continue
    if not compilation.is_cached():
      _print(f'{what}: compiling since {clock}; compiled programs are not cached')
      announced = True
    elif requests.is_compiling():
      _print(f'{what}: compiling since {clock}; it is not in the cache of compiled programs')
      announced = True
  seconds = time.monotonic() - began
  if announced:
    _print(f'{what}: compiled in {seconds:.0f} s')
  elif seconds > _MOMENT and requests.found > found:
    _print(f'{what}: the compiled program was in the cache ({seconds:.1f} s)')


def _print(line: str) -> None:
  with contextlib.suppress(OSError):  # stderr is closed
    print(line, file=sys.stderr, flush=True)
