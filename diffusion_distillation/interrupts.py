"""SIGTERM and SIGINT, noticed between two steps instead of in the middle of one."""

import signal
from types import FrameType

from diffusion_distillation.errors import Preempted

_received: list[int] = []


def _handle(number: int, frame: FrameType | None) -> None:
  del frame
  _received.append(number)
  signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def install() -> None:
  """From now on the first SIGTERM or SIGINT only makes `check` raise."""
  _received.clear()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _handle)


def pending() -> bool:
  """Whether a signal came."""
  return bool(_received)


def check() -> None:
  """Raises Preempted if a signal came; loops call it where stopping loses nothing."""
  if pending():
    name = signal.Signals(_received[0]).name
    raise Preempted(f'stopped by {name}; what is saved is whole: run the same command again to go on')
