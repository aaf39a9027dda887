"""Processes that read images: without jax, out of reach of the signals, and gone when the main process is."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Iterator

import numpy as np
import threadpoolctl

from diffusion_distillation.datasets.image_set import Batch, ImageSet
from diffusion_distillation.system import interrupts

# Of a worker process: the set that it reads from, sent once.
_images: ImageSet | None = None


class _Worker(multiprocessing.context.SpawnProcess):
  """A process that SIGTERM does not reach."""

  def terminate(self) -> None:
    self.kill()


class _Context(multiprocessing.context.SpawnContext):
  Process = _Worker


@contextlib.contextmanager
def bare(images: ImageSet) -> Iterator[None]:
  """A process that is started here never sees the signals to stop, and does not import the main module.

  A signal to the whole process group is the main process's to answer, after this. The main module imports jax.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
  main = sys.modules['__main__']
  if type(images).__module__ != '__main__':
    sys.modules['__main__'] = types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(images: ImageSet) -> None:
  """Without the main process a worker is of no use, and ends."""
  global _images
  _images = images
  allow_files()
  threadpoolctl.threadpool_limits(1)  # the workers are the parallelism
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def allow_files() -> None:
  """As many open files as the system lets this process have: ArrayRecord keeps every file of a set open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read(indices: np.ndarray) -> Batch:
  """In a worker: a batch of its set; see `ImageSet.batch`."""
  assert _images is not None
  return _images.batch(indices)


def start(images: ImageSet, count: int) -> concurrent.futures.Executor:
  """`count` processes, each with `images`; they begin when something is submitted, which is to be done `bare`."""
  return concurrent.futures.ProcessPoolExecutor(count, _Context(), _begin_worker, (images,))
