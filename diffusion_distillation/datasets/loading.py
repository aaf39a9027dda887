"""Batches of an image set: which images make batch i, read in parallel, ahead of their use.

Batch i is a function of (seed, i) alone: there is nothing to save but i, and every process of several can read its
part of it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import numpy as np
import threadpoolctl

from diffusion_distillation import interrupts
from diffusion_distillation.datasets.image_set import Batch, ImageSet, InMemory
from diffusion_distillation.errors import UserError
from diffusion_distillation.progress import Progress

Executor = concurrent.futures.Executor

_log = logging.getLogger(__name__)

_NAMED = 20  # broken images that are named, each once; further ones are only counted
_CHUNK = 256  # images a batch where a whole set is decoded into memory


class Order(Protocol):
  """Which images make batch i."""

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (B,), and (B,) bool: False for what only fills the batch up."""
    ...


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """An endless stream of shuffled epochs: each visits every example once.

  Attributes:
    size: of the set.
    seed: of the order.
    batch_size: the stream itself does not depend on it.
  """

  size: int
  seed: int
  batch_size: int

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
    epochs, offsets = np.divmod(position, self.size)
    indices = np.empty(self.batch_size, np.int64)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      indices[here] = _permutation(self.size, self.seed, int(epoch))[offsets[here]]
    return indices, np.ones(self.batch_size, bool)


@dataclasses.dataclass(frozen=True)
class InOrder:
  """Given images one after the other; the last batch is filled up with nothing."""

  indices: Sequence[int] | np.ndarray
  batch_size: int

  def __len__(self) -> int:
    return -(-len(self.indices) // self.batch_size)

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.asarray(self.indices[i * self.batch_size : (i + 1) * self.batch_size], np.int64)
    missing = self.batch_size - len(chosen)
    return np.pad(chosen, (0, missing)), np.arange(self.batch_size) < len(chosen)


# Of a worker process: the set that it reads from, sent once.
_images: ImageSet | None = None


class _Worker(multiprocessing.context.SpawnProcess):
  """A process that SIGTERM does not reach."""

  def terminate(self) -> None:
    self.kill()


class _Context(multiprocessing.context.SpawnContext):
  Process = _Worker


@contextlib.contextmanager
def _bare(images: ImageSet) -> Iterator[None]:
  """A process that is started here never sees SIGINT and SIGTERM, and does not import the main module.

  A signal to the whole process group is the main process's to answer, after this. The main module imports jax.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
  _allow_files()
  threadpoolctl.threadpool_limits(1)  # the workers are the parallelism
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _allow_files() -> None:
  """As many open files as the system lets this process have: ArrayRecord keeps every file of a set open."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_in_worker(indices: np.ndarray) -> Batch:
  assert _images is not None
  return _images.batch(indices)


class Loader:
  """Reads batches of a set, and remembers which images it had to skip.

  Args:
    images: the set.
    in_memory_gb: a set that takes no more is decoded at its first use, and kept.
    workers: processes that read, each whole batches; 0 for threads of this one. Of no use to a set in memory.
    part: (this process, of how many): every batch is cut into as many equal parts.
  """

  def __init__(
    self,
    images: ImageSet,
    in_memory_gb: float = 0.0,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
  ) -> None:
    self.images, self.part = images, part
    self.skipped: dict[int, str] = {}
    self._fits = len(images) * math.prod(images.image_shape) <= in_memory_gb * 1e9
    self._workers = workers
    self._executor: Executor | None = None

  def __len__(self) -> int:
    return len(self.images)

  def shuffled(self, seed: int, batch_size: int, start: int, stop: int) -> Generator[Batch]:
    """Batches `start` to `stop` of the endless stream; see `Shuffled` and `stream`."""
    return self.stream(Shuffled(len(self), seed, batch_size), range(start, stop))

  def in_order(
    self, batch_size: int, indices: Sequence[int] | np.ndarray | None = None
  ) -> Generator[Batch]:
    """All images, or those at `indices`, none left out and none twice where `mask` holds; see `stream`."""
    order = InOrder(range(len(self)) if indices is None else indices, batch_size)
    return self.stream(order, range(len(order)))

  def stream(self, order: Order, steps: range) -> Generator[Batch]:
    """This process's part of batches, read ahead while the last one is in use.

    Yields:
      `image` (b, H, W, C) uint8; `label` (b,) int32, or None; `mask` (b,) bool: False where another image
      stands in for a broken one, and where there is none, but zeros, for want of more.

    Raises:
      UserError: the batches do not divide by the number of processes, or no image is whole, or a worker died.
    """
    self._hold()
    return self._stream(order, steps)

  def _stream(self, order: Order, steps: range) -> Generator[Batch]:
    executor, parallel = self._start()
    in_processes = isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    read = _read_in_worker if in_processes else self.images.batch
    index, count = self.part
    waiting: collections.deque[tuple[concurrent.futures.Future[Batch], np.ndarray]] = collections.deque()

    def take() -> Batch:
      future, counted = waiting.popleft()
      batch = future.result()
      self._note(dict(batch.pop('skipped')))
      batch['mask'] = batch.pop('whole')
      return {key: _spread(value, counted) for key, value in batch.items()}

    try:
      for i in steps:
        indices, counted = order(i)
        size, rest = divmod(len(indices), count)
        if rest:
          raise UserError(f'batches of {len(indices)} images do not divide by {count} processes')
        mine = slice(index * size, (index + 1) * size)
        with _bare(self.images):
          future = executor.submit(read, indices[mine][counted[mine]])
        waiting.append((future, counted[mine]))
        if len(waiting) > 2 * parallel:
          yield take()
      while waiting:
        yield take()
    except concurrent.futures.BrokenExecutor as error:
      raise UserError(
        f'a process that reads {self.images.name} ended: {error}; it may have run out of memory: set '
        f'dataset.workers below {self._workers}'
      ) from error
    finally:
      for future, _ in waiting:
        future.cancel()

  @property
  def _in_memory(self) -> bool:
    return isinstance(self.images, InMemory)

  def _start(self) -> tuple[Executor, int]:
    """Threads or processes, kept from stream to stream, and their number."""
    _allow_files()
    in_processes = self._workers > 0 and not self._in_memory
    parallel = self._workers if in_processes else 1 if self._in_memory else _cores()
    if self._executor is None and in_processes:
      self._executor = concurrent.futures.ProcessPoolExecutor(
        parallel, _Context(), _begin_worker, (self.images,)
      )
    elif self._executor is None:
      self._executor = concurrent.futures.ThreadPoolExecutor(parallel)
    return self._executor, parallel

  def _hold(self) -> None:
    """Decodes the set into memory, if it fits there and is not there yet."""
    images = self.images
    if self._in_memory or not self._fits:
      return
    pixels = np.empty((len(images), *images.image_shape), np.uint8)
    labels = np.zeros(len(images), np.int32)
    reader = Loader(images, workers=self._workers if len(images) > _CHUNK * self._workers else 0)
    with Progress(f'reading {images.name}', len(images)) as progress:
      for k, batch in enumerate(reader.in_order(_CHUNK)):
        interrupts.check()
        here = slice(k * _CHUNK, min((k + 1) * _CHUNK, len(images)))
        size = here.stop - here.start
        pixels[here] = batch['image'][:size]
        labels[here] = 0 if batch['label'] is None else batch['label'][:size]
        progress.advance(size)
    reader.close()
    self.skipped = reader.skipped
    self.images = InMemory(
      images.name, images.image_shape, images.classes, images.identity, pixels, labels, self.skipped
    )

  def close(self) -> None:
    """Ends its threads or processes; a later stream starts new ones."""
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)
      self._executor = None

  def _note(self, skipped: dict[int, str]) -> None:
    """Reports each broken image once."""
    for k, reason in skipped.items():
      if k not in self.skipped:
        self.skipped[k] = reason
        if len(self.skipped) <= _NAMED:
          _log.warning('skipped an image of %s: %s', self.images.name, reason)
        if len(self.skipped) == _NAMED:
          _log.warning('further images of %s that are skipped are only counted', self.images.name)


def _spread(values: np.ndarray | None, counted: np.ndarray) -> np.ndarray | None:
  """Lays the values (n, ...) out where `counted` (b,) holds; zeros elsewhere."""
  if values is None or len(values) == len(counted):
    return values
  spread = np.zeros((len(counted), *values.shape[1:]), values.dtype)
  spread[counted] = values
  return spread


def _cores() -> int:
  return min(16, os.cpu_count() or 1)
