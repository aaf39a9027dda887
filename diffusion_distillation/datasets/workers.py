"""Processes that read images: without jax, out of reach of the signals, and gone when the main process is.

They are programs of their own (`reader.py`), not children of `multiprocessing`, which would import the main module, and with it
jax, or ask each user to guard it: so that they work from a script, from stdin and in a notebook alike.
"""

import concurrent.futures
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from diffusion_distillation.datasets.image_set import Batch, ImageSet
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import interrupts


class _Process(NamedTuple):
  """A process that reads, and the connection to it."""

  program: subprocess.Popen[bytes]
  connection: Connection


class Workers(concurrent.futures.ThreadPoolExecutor):
  """Threads, each with a process of its own that reads for it; both begin when something is submitted.

  Args:
    images: what they read.
    count: of threads, and of processes.

  Raises:
    UserError: no other process can know the class of the images.
  """

  def __init__(self, images: ImageSet, count: int) -> None:
    super().__init__(count, 'reader', _block_signals)
    self._begin = (_main_module(images), images)
    self._own, self._lock = threading.local(), threading.Lock()
    self._processes: list[_Process] = []
    self._ended = False

  def read(self, indices: np.ndarray) -> Batch:
    """In a thread of this pool: a batch of the set, read by the thread's process; see `ImageSet.batch`.

    Raises:
      BrokenExecutor: the process, or another one, has ended; then all of them do, so that nobody waits for a batch
        that does not come.
    """
    (program, connection), messages = self._process()
    try:
      for message in (*messages, indices):
        connection.send(message)
      ok, value = connection.recv()
    except Exception as error:  # whatever it is, the two are not in step any more
      self._end()
      raise concurrent.futures.BrokenExecutor(f'exit code {program.wait()}, {error!r}') from error
    if not ok:
      raise value
    batch: Batch = value
    return batch

  def _process(self) -> tuple[_Process, tuple[Any, ...]]:
    """This thread's process, and what it is to be told first."""
    with self._lock:
      if self._ended:
        raise concurrent.futures.BrokenExecutor('with the others')
      if hasattr(self._own, 'process'):
        return self._own.process, ()
      self._own.process = _start()
      self._processes.append(self._own.process)
      return self._own.process, self._begin

  def _end(self) -> None:
    with self._lock:
      self._ended = True
      for process in self._processes:
        process.program.kill()

  def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
    """Ends the processes, whatever they are at, and the threads."""
    super().shutdown(wait=False, cancel_futures=cancel_futures)
    self._end()
    super().shutdown(wait=wait)
    for program, connection in self._processes:
      program.wait()
      connection.close()


def _block_signals() -> None:
  """The thread's process never sees them: a signal to the whole group is the main process's to answer."""
  signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)


def _start() -> _Process:
  ours, theirs = multiprocessing.connection.Pipe()
  path = os.pathsep.join(map(os.path.abspath, sys.path))
  program = subprocess.Popen(
    [sys.executable, '-P', '-m', 'diffusion_distillation.datasets.reader', str(theirs.fileno())],
    stdin=subprocess.DEVNULL,
    pass_fds=[theirs.fileno()],
    env=os.environ | {'PYTHONPATH': path},
  )
  theirs.close()
  return _Process(program, ours)


def _main_module(images: ImageSet) -> str | None:
  """The file of the main module where the class of the images is defined there; then the processes import it, too."""
  if type(images).__module__ != '__main__':
    return None
  file: str | None = getattr(sys.modules['__main__'], '__file__', None)
  if file is None or not os.path.exists(file):
    raise UserError(
      f'{images.name}: its class is defined in the main module, which has no file that other processes could import; put it '
      'into a module of its own, or set dataset.workers=0'
    )
  return os.path.abspath(file)
