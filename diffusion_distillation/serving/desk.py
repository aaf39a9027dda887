"""Work that the threads of a server hand in, and the main thread carries out, one at a time."""

import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from diffusion_distillation.errors import Preempted
from diffusion_distillation.system import interrupts

T = TypeVar('T')
_log = logging.getLogger(__name__)


class Done(NamedTuple, Generic[T]):
  """The end of a piece of work."""

  result: T


class Desk:
  """Where work waits. It is done in the main thread, which signals come to: there one ends a compilation, too."""

  def __init__(self) -> None:
    self._waiting: queue.Queue[tuple[Callable[..., Any], queue.SimpleQueue[Any]]] = queue.Queue()

  def ask(self, work: Callable[[Callable[[str], None]], T]) -> Iterator[str | Done[T]]:
    """Yields the lines that `work` tells while it is done, then its result; raises what it raises.

    Args:
      work: is given a function that takes a line.
    """
    answers: queue.SimpleQueue[str | Done[T] | Exception] = queue.SimpleQueue()
    self._waiting.put((work, answers))
    while True:
      answer = answers.get()
      if isinstance(answer, Exception):
        raise answer
      yield answer
      if isinstance(answer, Done):
        return

  def work(self) -> NoReturn:
    """Does what comes, until a signal does; raises Preempted then."""
    while True:
      interrupts.check()
      try:
        work, answers = self._waiting.get(timeout=0.5)
      except queue.Empty:
        continue
      try:
        answers.put(Done(work(answers.put)))
      except Preempted as error:
        answers.put(error)
        raise
      except Exception as error:  # whatever it is, the page goes on
        answers.put(error)
        _log.debug('work has failed', exc_info=True)
