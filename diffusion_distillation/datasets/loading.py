"""Batches of an image set: which images make batch i, read in parallel, ahead of their use.

Batch i is a function of (seed, i) alone: there is nothing to save but i, and every process of several can read its
part of it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from diffusion_distillation import interrupts
from diffusion_distillation.datasets.image_set import Batch, ImageSet, InMemory
from diffusion_distillation.errors import UserError
from diffusion_distillation.progress import Progress

_log = logging.getLogger(__name__)

_NAMED = 20  # broken images that are named, each once; further ones are only counted
_HOLD = 1024  # images decoded between two looks at signals


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
  """Given images one after the other; the last batch is filled up with the first of them."""

  indices: Sequence[int] | np.ndarray
  batch_size: int

  def __len__(self) -> int:
    return -(-len(self.indices) // self.batch_size)

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.asarray(self.indices[i * self.batch_size : (i + 1) * self.batch_size], np.int64)
    missing = self.batch_size - len(chosen)
    indices = np.pad(chosen, (0, missing), constant_values=self.indices[0])
    return indices, np.arange(self.batch_size) < len(chosen)


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(threads)


@dataclasses.dataclass(frozen=True)
class _Read:
  """i to this process's part of batch i; all that a worker is sent."""

  images: ImageSet
  order: Order
  part: tuple[int, int]
  threads: int

  def __call__(self, i: int) -> Batch:
    indices, counted = self.order(i)
    index, count = self.part
    size = len(indices) // count
    mine = slice(index * size, (index + 1) * size)
    run = _pool(self.threads).map if self.threads > 1 else map
    batch = self.images.batch(indices[mine], run)
    return batch | {'mask': batch.pop('whole') & counted[mine]}


class Loader:
  """Reads batches of a set, and remembers which images it had to skip.

  Args:
    images: the set.
    in_memory_gb: a set that takes no more is decoded at its first use, and kept.
    workers: processes that read ahead, each whole batches; 0 for threads of this one. Of no use to a set in memory.
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
    self._fits = len(images) * math.prod(images.image_shape) <= in_memory_gb * 1e9
    self._workers = workers
    self.skipped: dict[int, str] = {}

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
    """Batches of this process's part, read ahead while the last one is in use.

    Yields:
      `image` (b, H, W, C) uint8; `label` (b,) int32, or None; `mask` (b,) bool: whether the image counts, or
      only fills the batch, for want of others or in the place of a broken one.

    Raises:
      UserError: the batches do not divide by the number of processes, or no image is whole.
    """
    import grain  # a second; not before it is needed

    size, (_, processes) = len(order(steps.start)[0]), self.part
    if size % processes:
      raise UserError(f'batches of {size} images do not divide by {processes} processes')
    self._hold()
    in_memory = isinstance(self.images, InMemory)
    workers = 0 if in_memory else min(self._workers, len(steps))
    read = _Read(self.images, order, self.part, 1 if workers or in_memory else _cores())
    dataset = (
      grain.MapDataset.range(steps.start, steps.stop)
      .map(read)
      .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    if workers:
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
      dataset = dataset.mp_prefetch(options)
    with contextlib.closing(iter(dataset)) as batches:
      for batch in batches:
        self._note(dict(batch.pop('skipped')))
        yield batch

  def _hold(self) -> None:
    """Decodes the set into memory, if it fits there and is not there yet."""
    images = self.images
    if isinstance(images, InMemory) or not self._fits:
      return
    pixels = np.empty((len(images), *images.image_shape), np.uint8)
    labels = np.zeros(len(images), np.int32)
    broken: dict[int, str] = {}
    with Progress(f'reading {images.name}', len(images)) as progress:
      for start in range(0, len(images), _HOLD):
        interrupts.check()
        indices = np.arange(start, min(start + _HOLD, len(images)))
        batch = images.batch(indices, _pool(_cores()).map)
        pixels[indices] = batch['image']
        labels[indices] = 0 if batch['label'] is None else batch['label']
        broken |= dict(batch['skipped'])
        progress.advance(len(indices))
    self._note(broken)
    self.images = InMemory(
      images.name, images.image_shape, images.classes, images.identity, pixels, labels, broken
    )

  def _note(self, skipped: dict[int, str]) -> None:
    """Reports each broken image once."""
    for k, reason in skipped.items():
      if k not in self.skipped:
        self.skipped[k] = reason
        if len(self.skipped) <= _NAMED:
          _log.warning('skipped an image of %s: %s', self.images.name, reason)
        if len(self.skipped) == _NAMED:
          _log.warning('further images of %s that are skipped are only counted', self.images.name)


def _cores() -> int:
  return min(16, os.cpu_count() or 1)
