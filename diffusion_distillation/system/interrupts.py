"""Handles signals that stop a run between two steps instead of within one; all processes stop at the same step.

The signals are SIGTERM, SIGINT, SIGHUP (the terminal was closed), and the warnings of schedulers: SIGUSR1, SIGUSR2, SIGXCPU.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from diffusion_distillation.errors import Preempted

SIGNALS = (
  *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
  *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
_IMPATIENT = (signal.SIGTERM, signal.SIGINT)  # a second one ends the process immediately

_received: list[str] = []
_reached: list[Callable[[], bool]] = []  # with several processes: whether all stop at this step
_before: dict[int, Any] = {}  # the handlers that `install` replaced
_cleanups: list[Callable[[], None]] = []  # called before the process ends immediately
_unsaved: list[bool] = []  # one entry for each active `unsaved` context
_terminals: list[int] = []  # standard output and error, if they are terminals


def _handle(number: int, frame: FrameType | None) -> None:
  del frame
  if number in _IMPATIENT:
    signal.signal(number, signal.SIG_DFL)
  if number == signal.SIGHUP:
    _let_go(_terminals)
  request(signal.Signals(number).name)


def request(name: str) -> None:
  """Stops the run at its next check, as a signal does; `name` is the reported reason."""
  if _reached:
    os.kill(os.getpid(), signal.SIGTERM)  # the runtime passes it on to all processes
  else:
    _received.append(name)


def _let_go(descriptors: list[int]) -> None:
  """Redirects the descriptors to /dev/null, so that writing to them does not fail."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for descriptor in descriptors:
    os.dup2(nowhere, descriptor)
  os.close(nowhere)


def install() -> None:
  """Makes the first of SIGNALS only cause `check` to raise; does nothing outside the main thread, which gets no signals."""
  _received.clear()
  if threading.current_thread() is not threading.main_thread():
    return
  _terminals[:] = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
  for number in SIGNALS:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
      _before.setdefault(number, signal.signal(number, _handle))


def uninstall() -> None:
  """Restores the signal handlers from before `install`, and forgets signals that were received."""
  _received.clear()
  while _before and threading.current_thread() is threading.main_thread():
    signal.signal(*_before.popitem())


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
  """Declares that while the body runs there is a state to save before the process may exit; see `at_once`."""
  _unsaved.append(True)
  try:
    yield
  finally:
    _unsaved.pop()


@contextlib.contextmanager
def cleaning(cleanup: Callable[[], None]) -> Iterator[None]:
  """Calls `cleanup`, from another thread, if a signal ends the process immediately while the body runs; see `at_once`."""
  _cleanups.append(cleanup)
  try:
    yield
  finally:
    _cleanups.remove(cleanup)


@contextlib.contextmanager
def at_once(meanwhile: str) -> Iterator[None]:
  """Lets a signal end the process immediately while the body runs, for example a long compilation that can lose nothing.

  With several processes, outside the main thread, and inside `unsaved`, signals are handled as usual.

  Args:
    meanwhile: a description of the body for the message.
  """
  if _reached or _unsaved or not _before or threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_leave_at_once, args=(reader, meanwhile), daemon=True).start()
  try:
    check()
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writer)


def _leave_at_once(reader: int, meanwhile: str) -> None:
  """Waits for the number of a signal and exits; returns if `at_once` ends first."""
  while number := os.read(reader, 1):
    if number[0] not in SIGNALS:
      continue
    name = signal.Signals(number[0]).name
    message = f'error: stopped by {name} while {meanwhile}; nothing is lost: run the same command again to continue'
    with contextlib.suppress(OSError):
      os.write(2, f'{message}\n'.encode())
    for cleanup in reversed(_cleanups):
      with contextlib.suppress(Exception):
        cleanup()
    os._exit(Preempted.exit_code)
  os.close(reader)


def synchronize(reached: Callable[[int], bool]) -> None:
  """Leaves SIGTERM to jax's distributed runtime; at the k-th check, `reached(k)` says whether all processes stop there.

  The checks are counted over the lifetime of the runtime, across all runs of a process.
  """
  checks = itertools.count(1)
  _reached[:] = [lambda: reached(next(checks))]


def pending() -> bool:
  """Whether a signal was received; all processes of a run must call this function equally often."""
  if _reached and not _received and _reached[0]():
    _received.append('SIGTERM')
  return bool(_received)


def check() -> None:
  """Raises Preempted if a signal was received; loops call it where stopping loses nothing."""
  if pending():
    raise Preempted(
      f'stopped by {_received[0]}; all saved files are intact: run the same command again to continue'
    )
