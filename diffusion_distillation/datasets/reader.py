"""One process that reads images: `python -m diffusion_distillation.datasets.reader FD`, as `workers.py` starts it.

Over the connection FD it is sent the main module's file or None, the image set, then indices, one array at a time. For each
it answers (True, batch) or (False, the error). It imports no jax, and ends when the connection does.
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
  """As many open files as the system lets this process have: ArrayRecord keeps every file of a set open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _follow(connection: Connection, asked: queue.SimpleQueue[Any]) -> None:
  """Without the main process a worker is of no use, and ends, whatever it is at."""
  try:
    while True:
      asked.put(connection.recv())
  finally:
    os._exit(1)


def _arriving(error: Exception) -> Exception:
  """`error`, or a RuntimeError with its text where the main process could not read it: the connection would be lost."""
  try:
    again = ForkingPickler.loads(ForkingPickler.dumps(error))
  except Exception:  # of whatever the error is made of
    return RuntimeError(repr(error))
  ours = type(error).__module__ in ('__main__', '__mp_main__')  # which is another module there
  return RuntimeError(repr(error)) if ours or type(again) is not type(error) else error


def main(descriptor: int) -> None:
  """Answers until the connection ends."""
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
    except Exception as error:  # of whatever the set reads from
      answer = False, _arriving(error)
    try:
      connection.send(answer)
    except (AttributeError, TypeError, ValueError) as error:  # it cannot be sent as it is
      connection.send((False, RuntimeError(f'{answer[1]!r} ({error})')))


if __name__ == '__main__':
  main(int(sys.argv[1]))
