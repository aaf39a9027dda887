"""SIGTERM and SIGINT, noticed between two steps instead of in the middle of one; by all processes at the same step."""

import itertools
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from diffusion_distillation.errors import Preempted

_received: list[str] = []
_before: dict[int, Any] = {}  # what handled the signals before
_reached: list[Callable[[], bool]] = []  # of several processes: whether all stop here


def _handle(number: int, frame: FrameType | None) -> None:
  del frame
  signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
  if _reached:
    os.kill(os.getpid(), signal.SIGTERM)  # which the runtime passes on to all processes
  else:
    _received.append(signal.Signals(number).name)


def install() -> None:
  """From now on, until `restore`, the first SIGTERM or SIGINT only makes `check` raise."""
  _received.clear()
  for number in (signal.SIGTERM, signal.SIGINT):
    before = signal.signal(number, _handle)
    _before.setdefault(number, before)


def restore() -> None:
  """Signals are handled as before `install`; what came meanwhile stops no later run."""
  for number, before in _before.items():
    signal.signal(number, before or signal.SIG_DFL)
  _before.clear()
  _received.clear()


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
