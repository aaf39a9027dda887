"""The order of images: which images are in batch i is a function of (seed, i), so only i has to be saved."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Order(Protocol):
  """Chooses the images of batch i."""

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices (B,), and (B,) bool: False for padding."""
    ...


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def shuffled(size: int, seed: int, position: np.ndarray) -> np.ndarray:
  """Returns which of `size` examples stand at the positions (B,) of an endless stream of shuffled epochs."""
  epochs, offsets = np.divmod(np.asarray(position, np.int64), size)
  indices = np.empty(len(position), np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = _permutation(size, seed, int(epoch))[offsets[here]]
  return indices


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """An endless stream of shuffled epochs; each epoch visits every example once.

  Attributes:
    size: number of images.
    seed: seed of the order.
    batch_size: images per batch; the order of the stream does not depend on it.
  """

  size: int
  seed: int
  batch_size: int

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
    return shuffled(self.size, self.seed, position), np.ones(self.batch_size, bool)


@dataclasses.dataclass(frozen=True)
class InOrder:
  """The given images in order; the last batch is padded."""

  indices: Sequence[int] | np.ndarray
  batch_size: int

  def __len__(self) -> int:
    return -(-len(self.indices) // self.batch_size)

  def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.asarray(self.indices[i * self.batch_size : (i + 1) * self.batch_size], np.int64)
    missing = self.batch_size - len(chosen)
    return np.pad(chosen, (0, missing)), np.arange(self.batch_size) < len(chosen)
