"""Signals to stop, noticed between two steps instead of in the middle of one; by all processes at the same step.

SIGTERM and SIGINT, SIGHUP (the terminal is gone), and those by which schedulers warn: SIGUSR1, SIGUSR2 and SIGXCPU.
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
_IMPATIENT = (signal.SIGTERM, signal.SIGINT)  # a second one ends the process at once

_received: list[str] = []
_reached: list[Callable[[], bool]] = []  # of several processes: whether all stop here
_before: dict[int, Any] = {}  # the handlers that `install` replaced
_unsaved: list[bool] = []  # one for each `unsaved` that is entered
_terminals: list[int] = []  # standard output and error, where they are terminals


def _handle(number: int, frame: FrameType | None) -> None:
  del frame
  if number in _IMPATIENT:
    signal.signal(number, signal.SIG_DFL)
  if number == signal.SIGHUP:
    _let_go(_terminals)
  request(signal.Signals(number).name)


def request(name: str) -> None:
  """Stops the run at its next check, as a signal does; `name` says why."""
  if _reached:
    os.kill(os.getpid(), signal.SIGTERM)  # which the runtime passes on to all processes
  else:
    _received.append(name)


def _let_go(descriptors: list[int]) -> None:
  """What is written there from now on is lost, and no error."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for descriptor in descriptors:
    os.dup2(nowhere, descriptor)
  os.close(nowhere)


def install() -> None:
  """From now on the first of SIGNALS only makes `check` raise; in a thread, to which no signal comes, nothing changes."""
  _received.clear()
  if threading.current_thread() is not threading.main_thread():
    return
  _terminals[:] = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
  for number in SIGNALS:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
      _before.setdefault(number, signal.signal(number, _handle))


def uninstall() -> None:
  """Gives the signals back to whoever had them before `install`; what came meanwhile stops no later run."""
  _received.clear()
  while _before and threading.current_thread() is threading.main_thread():
    signal.signal(*_before.popitem())


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
  """While the body runs, there is something to save before the process ends; see `at_once`."""
  _unsaved.append(True)
  try:
    yield
  finally:
    _unsaved.pop()


@contextlib.contextmanager
def at_once(meanwhile: str) -> Iterator[None]:
  """While the body runs, which may be deep in a compiler, a signal ends the process at once: nothing is lost then.

  With several processes, outside the main thread, and inside `unsaved`, signals are answered as everywhere.

  Args:
    meanwhile: what the body does, for the message.
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
  """Waits for the number of a signal; ends without one when `at_once` does."""
  while number := os.read(reader, 1):
    if number[0] not in SIGNALS:
      continue
    name = signal.Signals(number[0]).name
    message = (
      f'error: stopped by {name} while {meanwhile}; nothing is lost: run the same command again to go on'
    )
    with contextlib.suppress(OSError):
      os.write(2, f'{message}\n'.encode())
    os._exit(Preempted.exit_code)
  os.close(reader)


def synchronize(reached: Callable[[int], bool]) -> None:
  """From now on SIGTERM is the runtime's: `reached(k)` says, at the k-th look, whether all processes stop there.

  The runtime counts from its start to its end, over all runs of a process.
  """
  looks = itertools.count(1)
  _reached[:] = [lambda: reached(next(looks))]


def pending() -> bool:
  """Whether a signal came; all processes of a run look equally often."""
  if _reached and not _received and _reached[0]():
    _received.append('SIGTERM')
  return bool(_received)


def check() -> None:
  """Raises Preempted if a signal came; loops call it where stopping loses nothing."""
  if pending():
    raise Preempted(
      f'stopped by {_received[0]}; what is saved is whole: run the same command again to go on'
    )
