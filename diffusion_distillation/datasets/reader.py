"""One process that reads images: `python -m diffusion_distillation.datasets.reader`, as `workers.py` starts it.

Pickles arrive on its stdin: the main module's file or None, the image set, then indices, one array at a time. For each it
answers on its stdout with (True, batch) or (False, the error). It imports no jax, and ends when its stdin does.
"""

import contextlib
import multiprocessing.spawn
import os
import pickle
import queue
import resource
import sys
import threading
from typing import IO, Any

import threadpoolctl


def allow_files() -> None:
  """As many open files as the system lets this process have: ArrayRecord keeps every file of a set open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _follow(requests: IO[bytes], asked: queue.SimpleQueue[Any]) -> None:
  """Without the main process a worker is of no use, and ends, whatever it is at."""
  try:
    while True:
      asked.put(pickle.load(requests))
  finally:
    os._exit(1)


def _answer(answers: IO[bytes], ok: bool, value: Any) -> None:
  try:
    text = pickle.dumps((ok, value), pickle.HIGHEST_PROTOCOL)
  except Exception as error:  # an error that cannot be pickled
    text = pickle.dumps((False, RuntimeError(f'{value!r} ({error})')))
  answers.write(text)
  answers.flush()


def main() -> None:
  """Answers until stdin ends."""
  requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # what a library prints does not get among the answers
  allow_files()
  threadpoolctl.threadpool_limits(1)  # the workers are the parallelism
  if (main_module := pickle.load(requests)) is not None:
    multiprocessing.spawn.import_main_path(main_module)
  images = pickle.load(requests)
  asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
  threading.Thread(target=_follow, args=(requests, asked), daemon=True).start()
  while True:
    indices = asked.get()
    try:
      _answer(answers, True, images.batch(indices))
    except Exception as error:  # of whatever the set reads from
      _answer(answers, False, error)


if __name__ == '__main__':
  main()
