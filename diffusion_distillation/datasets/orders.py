"""Which images make batch i: a function of (seed, i) alone, so that there is nothing to save but i."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np


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
