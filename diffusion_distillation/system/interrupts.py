"""SIGTERM and SIGINT, noticed between two steps instead of in the middle of one; by all processes at the same step."""

import os
import signal
from collections.abc import Callable
from types import FrameType

from diffusion_distillation.errors import Preempted

_received: list[str] = []
_reached: list[Callable[[int], bool]] = []  # whether all processes stop at their k-th look
_looks = 0


def _handle(number: int, frame: FrameType | None) -> None:
  del frame
  signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
  if _reached:
    os.kill(os.getpid(), signal.SIGTERM)  # which the runtime passes on to all processes
  else:
    _received.append(signal.Signals(number).name)


def install() -> None:
  """From now on the first SIGTERM or SIGINT only makes `check` raise."""
  _received.clear()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _handle)


def synchronize(reached: Callable[[int], bool]) -> None:
  """From now on SIGTERM is the runtime's: `reached(k)` says, at the k-th look, whether all processes stop there."""
  _reached[:] = [reached]


def pending() -> bool:
  """Whether a signal came; all processes of a run look equally often."""
  global _looks
  if _reached and not _received:
    _looks += 1
    if _reached[0](_looks):
      _received.append('SIGTERM')
  return bool(_received)


def check() -> None:
  """Raises Preempted if a signal came; loops call it where stopping loses nothing."""
  if pending():
    raise Preempted(
      f'stopped by {_received[0]}; what is saved is whole: run the same command again to go on'
    )
