"""A process that reads images; `workers.py` starts it as `python -m diffusion_distillation.datasets.reader FD`.

Over the connection FD, it receives the main module's file or None, the image set, and then arrays of indices. It answers each
array with (True, batch) or (False, error). It does not import jax, and exits when the connection is closed.
"""

import contextlib
import multiprocessing.spawn
import os
import queue
import resource
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import threadpoolctl


def allow_files() -> None:
  """Raises this process's limit of open files as far as possible, because ArrayRecord keeps all files of a dataset open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _follow(connection: Connection, asked: queue.SimpleQueue[Any]) -> None:
  """Receives requests; exits as soon as the main process is gone, even while an image is being read."""
  try:
    while True:
      asked.put(connection.recv())
  finally:
    os._exit(1)


def _arriving(error: Exception) -> Exception:
  """Returns `error`, or a RuntimeError with its text if the main process could not unpickle it."""
  try:
    again = ForkingPickler.loads(ForkingPickler.dumps(error))
  except Exception:  # pickling may raise anything
    return RuntimeError(repr(error))
  ours = type(error).__module__ in (
    '__main__',
    '__mp_main__',
  )  # names another module in the main process
  return RuntimeError(repr(error)) if ours or type(again) is not type(error) else error


def main(descriptor: int) -> None:
  """Answers requests until the connection is closed."""
  connection = Connection(descriptor)
  allow_files()
  threadpoolctl.threadpool_limits(1)  # the workers are the parallelism
  if (main_module := connection.recv()) is not None:
    multiprocessing.spawn.import_main_path(main_module)
  images = connection.recv()
  asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
  threading.Thread(target=_follow, args=(connection, asked), daemon=True).start()
  while True:
    indices = asked.get()
    try:
      answer = True, images.batch(indices)
    except Exception as error:  # datasets may raise anything
      answer = False, _arriving(error)
    try:
      connection.send(answer)
    except (AttributeError, TypeError, ValueError) as error:  # the answer cannot be pickled
      connection.send((False, RuntimeError(f'{answer[1]!r} ({error})')))


if __name__ == '__main__':
  main(int(sys.argv[1]))
