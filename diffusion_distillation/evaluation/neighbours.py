"""Finds the training images nearest to samples, which shows whether a model repeats its training images.

Distances are measured in the extractor's features and between pixels. Held-out images, which no model has seen, are compared
with the training images in the same way: samples that are closer to training images than those are suspicious.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation.extracted import Extractor
from diffusion_distillation.evaluation.features import features_of
from diffusion_distillation.evaluation.kept_features import OfEach
from diffusion_distillation.evaluation.metrics import some_of
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.system.progress import Progress

_BATCH = 500
_SIDE = 64  # pixels
NEAREST = 3  # number of training images that are shown beside a sample
SHOWN = 8  # number of samples that are shown
COMPARED = 256  # number of samples, and of held-out images, whose distances are compared


class Distances(NamedTuple):
  """Distances to the nearest training image, by one measure.

  Attributes:
    samples: (n,), of samples.
    held_out: (m,), of held-out images.
  """

  samples: np.ndarray
  held_out: np.ndarray

  @property
  def ratio(self) -> float:
    """The median distance of samples divided by that of held-out images; nan if the latter is 0."""
    of_held_out = float(np.median(self.held_out))
    return float(np.median(self.samples)) / of_held_out if of_held_out > 0.0 else math.nan

  @property
  def closer(self) -> float:
    """The share of samples that are closer to a training image than 95 % of the held-out images are; 0.05 is expected."""
    return float(np.mean(self.samples < np.quantile(self.held_out, 0.05)))


class Neighbours(NamedTuple):
  """Samples and the training images nearest to them.

  Attributes:
    samples: (SHOWN, H, W, C) uint8.
    by_features, by_pixels: (SHOWN, NEAREST, H, W, C) uint8, the nearest training images, in ascending order of distance.
    features, pixels: the distances of all samples that were compared; in pixels, the root mean square difference from 0 to 255,
      of large images after they are reduced; see `_flat`.
    searched: number of training images among which the nearest were looked for.
  """

  samples: np.ndarray
  by_features: np.ndarray
  by_pixels: np.ndarray
  features: Distances
  pixels: Distances
  searched: int


class Nearest:
  """The nearest of a stream of images to each of some fixed vectors.

  Args:
    queries: (n, D), the vectors.
    shown: for so many of the first queries, the images themselves are kept.
    nearest: number of images that are kept per query.
  """

  def __init__(self, queries: np.ndarray, shown: int, nearest: int) -> None:
    self._queries = np.asarray(queries, np.float64)
    self._squares = np.square(self._queries).sum(axis=1)
    self._squared = np.full((len(queries), nearest), np.inf)
    self._images: np.ndarray | None = None
    self._shown = shown

  def add(self, vectors: np.ndarray, images: np.ndarray) -> None:
    """Compares a batch of vectors (b, D), which belong to images (b, H, W, C), with the queries."""
    vectors = np.asarray(vectors, np.float64)
    squared = self._squares[:, None] + np.square(vectors).sum(axis=1)[None, :]
    squared = np.maximum(squared - 2.0 * self._queries @ vectors.T, 0.0)
    nearest = self._squared.shape[1]
    if self._images is None:
      self._images = np.zeros((self._shown, nearest, *images.shape[1:]), images.dtype)
    both = np.concatenate([self._squared, squared], axis=1)
    order = np.argsort(both, axis=1, kind='stable')[:, :nearest]
    self._squared = np.take_along_axis(both, order, axis=1)
    for k in range(self._shown):
      old = self._images[k]
      self._images[k] = np.stack([old[i] if i < nearest else images[i - nearest] for i in order[k]])

  @property
  def images(self) -> np.ndarray:
    """(shown, nearest, H, W, C), in ascending order of distance; raises ValueError before the first batch."""
    if self._images is None:
      raise ValueError('no image has been compared')
    return self._images

  @property
  def distances(self) -> np.ndarray:
    """(n,), the distance of each query to its nearest vector."""
    return np.sqrt(self._squared[:, 0])


def find(
  samples: np.ndarray,
  extractor: Extractor,
  train: Loader,
  held_out: Loader,
  searched: OfEach,
) -> Neighbours:
  """Compares samples and held-out images with the training images.

  Args:
    samples: (n, H, W, C) uint8, the same in every process.
    extractor: the map to features.
    train: the training images.
    held_out: the held-out images, of which at most COMPARED are used, those of `some_of`.
    searched: the features of the training images to search.
  """
  unseen = _some(held_out, COMPARED)
  queries, shown = np.concatenate([samples, unseen]), min(SHOWN, len(samples))
  by_features = Nearest(features_of(extractor, queries), shown, NEAREST)
  by_pixels = Nearest(_flat(queries), shown, NEAREST)
  done, places = 0, searched.places
  size = sharding.round_up(_BATCH)
  batches = train.in_order(size, places)
  with (
    contextlib.closing(batches),
    Progress('nearest training images', -(-len(places) // size), images_per_step=size) as progress,
  ):
    for k, batch in enumerate(batches):
      interrupts.check()
      here: dict[str, np.ndarray] = sharding.gather_batch({key: batch[key] for key in ('image', 'mask')})
      intact = np.flatnonzero(here['mask'])
      if len(intact):
        pixels = here['image'][intact]
        by_features.add(searched.features[k * size + intact], pixels)
        by_pixels.add(_flat(pixels), pixels)
        done += len(intact)
      progress.advance()

  def divided(distances: np.ndarray) -> Distances:
    return Distances(distances[: len(samples)], distances[len(samples) :])

  return Neighbours(
    samples=samples[:shown],
    by_features=by_features.images,
    by_pixels=by_pixels.images,
    features=divided(by_features.distances),
    pixels=divided(by_pixels.distances),
    searched=done,
  )


def _some(images: Loader, most: int) -> np.ndarray:
  """Returns up to `most` images (n, H, W, C), those of `some_of`; unreadable ones are left out."""
  found = []
  with contextlib.closing(
    images.in_order(sharding.round_up(_BATCH), some_of(len(images), most))
  ) as batches:
    for batch in batches:
      pixels = sharding.to_host(sharding.put(batch['image']))
      found.append(pixels[sharding.gather_batch(batch['mask'])])
  return np.concatenate(found)


def _flat(images: np.ndarray) -> np.ndarray:
  """Returns (n, D) vectors whose Euclidean distance is the root mean square difference of uint8 pixels (n, H, W, C).

  Larger images are reduced to between _SIDE and 2 _SIDE pixels a side, by averaging squares, which bounds the memory.
  """
  count, height, width, channels = images.shape
  factor = max(1, min(height, width) // _SIDE)
  rows, columns = height // factor, width // factor
  squares = images[:, : rows * factor, : columns * factor]
  squares = squares.reshape(count, rows, factor, columns, factor, channels)
  flat = squares.mean(axis=(2, 4), dtype=np.float32).reshape(count, -1)
  return flat / np.float32(np.sqrt(flat.shape[1]))
