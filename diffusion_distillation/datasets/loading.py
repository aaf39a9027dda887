"""Loads batches of an image set in parallel and ahead of time; each process of a run reads its own part of a batch."""

import collections
import concurrent.futures
import contextlib
import copy
import logging
import math
import os
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from diffusion_distillation.datasets.image_set import Batch, BrokenImage, ImageSet, InMemory
from diffusion_distillation.datasets.orders import InOrder, Order, Shuffled
from diffusion_distillation.datasets.reader import allow_files
from diffusion_distillation.datasets.workers import Workers
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import interrupts
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

_NAMED = 20  # maximum number of broken images that are reported one by one
_CHUNK = 256  # batch size when a whole dataset is decoded into memory


class Loader:
  """Reads batches of a dataset, and records which images it had to skip.

  Args:
    images: the dataset.
    in_memory_gb: maximum size in gigabytes of a dataset that is decoded at its first use and kept in memory.
    workers: number of processes, each of which reads whole batches; 0 for threads. Not used for a dataset in memory.
    part: (index of this process, number of processes): every batch is split into as many equal parts.
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
    self._executor: concurrent.futures.Executor | None = None

  def __len__(self) -> int:
    return len(self.images)

  def shuffled(self, seed: int, batch_size: int, start: int, stop: int) -> Generator[Batch]:
    """Yields batches `start` to `stop` of the endless stream; see `Shuffled` and `stream`."""
    return self.stream(Shuffled(len(self), seed, batch_size), range(start, stop))

  def unparted(self) -> 'Loader':
    """Returns a loader that reads whole batches in this process, for work that every process does by itself."""
    self._hold()
    loader = copy.copy(self)
    loader.part, loader._executor = (0, 1), None
    return loader

  def in_order(
    self, batch_size: int, indices: Sequence[int] | np.ndarray | None = None
  ) -> Generator[Batch]:
    """Yields all images, or those at `indices`; where `mask` is True, each intact image appears exactly once; see `stream`."""
    order = InOrder(range(len(self)) if indices is None else indices, batch_size)
    return self.stream(order, range(len(order)))

  def stream(self, order: Order, steps: range) -> Generator[Batch]:
    """Yields this process's part of each batch, read ahead of time.

    Yields:
      `image` (b, H, W, C) uint8; `cond`, arrays by key such as `label` (b,) int32, or None; `mask` (b,) bool: False for an
      image that replaces a broken one, and for zeros that pad the last batch.

    Raises:
      UserError: batches are not divisible by the number of processes, or too many images are broken, or a worker died.
    """
    self._hold()
    return self._stream(order, steps)

  def _stream(self, order: Order, steps: range) -> Generator[Batch]:
    executor, parallel = self._start()
    read = executor.read if isinstance(executor, Workers) else self.images.batch
    index, count = self.part
    waiting: collections.deque[tuple[concurrent.futures.Future[Batch], np.ndarray]] = collections.deque()

    def take() -> Batch:
      future, counted = waiting.popleft()
      batch = future.result()
      self._note(dict(batch.pop('skipped')))
      batch['mask'] = batch.pop('valid')
      return _spread(batch, counted)

    try:
      for i in steps:
        indices, counted = order(i)
        size, rest = divmod(len(indices), count)
        if rest:
          raise UserError(f'batches of {len(indices)} images are not divisible by {count} processes')
        mine = slice(index * size, (index + 1) * size)
        future = executor.submit(read, indices[mine][counted[mine]])
        waiting.append((future, counted[mine]))
        if len(waiting) > 2 * parallel:
          yield take()
      while waiting:
        yield take()
    except concurrent.futures.BrokenExecutor as error:
      raise UserError(
        f'a process that reads {self.images.name} ended: {error}; it may have run out of memory; set '
        f'dataset.workers below {self._workers}'
      ) from error
    finally:
      for future, _ in waiting:
        future.cancel()

  @property
  def _in_memory(self) -> bool:
    return isinstance(self.images, InMemory)

  def _start(self) -> tuple[concurrent.futures.Executor, int]:
    """Returns the pool of threads or processes, which all streams share, and its size."""
    allow_files()
    in_processes = self._workers > 0 and not self._in_memory
    parallel = self._workers if in_processes else 1 if self._in_memory else _cores()
    if self._executor is None and in_processes:
      self._executor = Workers(self.images, parallel)
    elif self._executor is None:
      self._executor = concurrent.futures.ThreadPoolExecutor(parallel)
    return self._executor, parallel

  def _hold(self) -> None:
    """Decodes the dataset into memory, if it fits and has not been decoded yet."""
    images = self.images
    if self._in_memory or not self._fits:
      return
    pixels = np.empty((len(images), *images.image_shape), np.uint8)
    labels = np.zeros(len(images), np.int32)
    reader = Loader(images, workers=self._workers if len(images) > _CHUNK * self._workers else 0)
    with contextlib.closing(reader), Progress(f'reading {images.name}', len(images)) as progress:
      for k, batch in enumerate(reader.in_order(_CHUNK)):
        interrupts.check()
        here = slice(k * _CHUNK, min((k + 1) * _CHUNK, len(images)))
        size = here.stop - here.start
        pixels[here] = batch['image'][:size]
        labels[here] = 0 if batch['cond'] is None else batch['cond']['label'][:size]
        progress.advance(size)
    self.skipped = reader.skipped
    kept = (images.name, images.image_shape, images.classes, images.identity)
    self.images = InMemory(*kept, pixels, labels, self.skipped, images.all_captions())

  def close(self) -> None:
    """Stops the threads or processes; a later stream starts new ones."""
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
          _log.warning('further skipped images of %s are only counted', self.images.name)


def count_labels(images: ImageSet) -> list[int]:
  """Counts the images of each class, without those whose label is unknown.

  Images are only decoded if their label is not known otherwise.
  """
  counts = [0] * len(images.classes)
  with Progress(f'labels of {images.name}', len(images)) as progress:
    for k in range(len(images)):
      with contextlib.suppress(BrokenImage):
        if (label := images.label(k)) >= 0:
          counts[label] += 1
      progress.advance()
  return counts


def _spread(values: Any, counted: np.ndarray) -> Any:
  """Places values (n, ...), an array or a dict of arrays, where `counted` (b,) is True, and zeros elsewhere."""
  if isinstance(values, dict):
    return {key: _spread(value, counted) for key, value in values.items()}
  if values is None or len(values) == len(counted):
    return values
  spread = np.zeros((len(counted), *values.shape[1:]), values.dtype)
  spread[counted] = values
  return spread


def _cores() -> int:
  return min(16, os.cpu_count() or 1)
