"""Runs what the threads of a server submit in the main thread, one piece of work at a time."""

import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from diffusion_distillation.errors import Preempted
from diffusion_distillation.system import interrupts

T = TypeVar('T')
Report = Callable[[str], None]  # is given a line about the progress of the work
_log = logging.getLogger(__name__)


class Done(NamedTuple, Generic[T]):
  """What a piece of work returned."""

  result: T


class MainThreadWorker:
  """Runs queued work in the main thread, the only one that receives signals, so that a signal can end even a compilation."""

  def __init__(self) -> None:
    self._queue: queue.Queue[tuple[Callable[..., Any], queue.SimpleQueue[Any]]] = queue.Queue()

  def submit(self, work: Callable[[Report], T]) -> Iterator[str | Done[T]]:
    """Yields the lines that `work` reports while it runs, then its result. Exceptions of `work` are raised here.

    Args:
      work: called with a function that reports a line of progress.
    """
    answers: queue.SimpleQueue[str | Done[T] | Exception] = queue.SimpleQueue()
    self._queue.put((work, answers))
    while True:
      answer = answers.get()
      if isinstance(answer, Exception):
        raise answer
      yield answer
      if isinstance(answer, Done):
        return

  def run(self) -> NoReturn:
    """Runs what is submitted until a signal arrives; then raises Preempted."""
    while True:
      interrupts.check()
      try:
        work, answers = self._queue.get(timeout=0.5)
      except queue.Empty:
        continue
      try:
        answers.put(Done(work(answers.put)))
      except Preempted as error:
        answers.put(error)
        raise
      except Exception as error:  # the page shows it, and the server goes on
        answers.put(error)
        _log.debug('work failed', exc_info=True)
