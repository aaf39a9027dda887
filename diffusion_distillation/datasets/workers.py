"""Processes that read images; they do not import jax, ignore signals, and exit with the main process.

They are separate programs (`reader.py`) and not children of `multiprocessing`, which would import the main module, and with it
jax, and need a guard in the main module. So they also work in a script without a guard, from stdin and in a notebook.
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
  """A pool of threads, each with its own process that reads images; both are started when work is submitted.

  Args:
    images: the dataset to read.
    count: number of threads and processes.

  Raises:
    UserError: the class of the dataset cannot be imported by another process.
  """

  def __init__(self, images: ImageSet, count: int) -> None:
    super().__init__(count, 'reader', _block_signals)
    self._begin = (_main_module(images), images)
    self._own, self._lock = threading.local(), threading.Lock()
    self._processes: list[_Process] = []
    self._ended = False

  def read(self, indices: np.ndarray) -> Batch:
    """Reads a batch in the process of the calling thread, which must be in this pool; see `ImageSet.batch`.

    Raises:
      BrokenExecutor: this process or another one has exited; all others are then killed, so that no thread waits forever.
    """
    (program, connection), messages = self._process()
    try:
      for message in (*messages, indices):
        connection.send(message)
      ok, value = connection.recv()
    except Exception as error:  # after any error, requests and answers no longer match
      self._end()
      raise concurrent.futures.BrokenExecutor(f'exit code {program.wait()}, {error!r}') from error
    if not ok:
      raise value
    batch: Batch = value
    return batch

  def _process(self) -> tuple[_Process, tuple[Any, ...]]:
    """Returns this thread's process, and the messages to send to it first."""
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
    """Kills the processes, even while they are reading, and ends the threads."""
    super().shutdown(wait=False, cancel_futures=cancel_futures)
    self._end()
    super().shutdown(wait=wait)
    for program, connection in self._processes:
      program.wait()
      connection.close()


def _block_signals() -> None:
  """Blocks signals in the thread's process: only the main process handles a signal to the whole process group."""
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
  """Returns the file of the main module if it defines the class of the images; the processes then import it, too."""
  if type(images).__module__ != '__main__':
    return None
  file: str | None = getattr(sys.modules['__main__'], '__file__', None)
  if file is None or not os.path.exists(file):
    raise UserError(
      f'{images.name}: its class is defined in the main module, which has no file that other processes could import; move it '
      'to a separate module, or set dataset.workers=0'
    )
  return os.path.abspath(file)
