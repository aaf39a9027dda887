"""Sets of images, and batches of them: batch i is a function of (seed, i) alone."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.errors import UserError


def to_x(image: jax.Array) -> jax.Array:
  """uint8 pixels 0..255 to [-1, 1], the range of x everywhere else."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def to_image(x: jax.Array) -> jax.Array:
  """[-1, 1] to the nearest uint8 pixels; the inverse of `to_x`."""
  return jnp.round(127.5 * (jnp.clip(x, -1.0, 1.0) + 1.0)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images that fit in memory.

  Attributes:
    name: for reports.
    images: (N, H, W, C) uint8.
    labels: (N,) int32, or None.
    num_classes: 0 without labels.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray | None
  num_classes: int

  def __len__(self) -> int:
    return len(self.images)

  def batch(self, indices: np.ndarray) -> dict[str, np.ndarray | None]:
    """`image` (B, H, W, C) uint8 and `label` (B,) int32 or None, at `indices` (B,)."""
    labels = None if self.labels is None else self.labels[indices]
    return {'image': self.images[indices], 'label': labels}


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def batch_indices(size: int, seed: int, step: int, batch_size: int) -> np.ndarray:
  """Which of `size` examples make batch `step` of a stream of shuffled epochs: (batch_size,).

  A pure function, so that nothing but the step needs saving; each epoch visits every example once.
  """
  position = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(position, size)
  indices = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = _permutation(size, seed, int(epoch))[offsets[here]]
  return indices


def digits(split: str) -> ImageSet:
  """scikit-learn's 1797 handwritten digits (8x8 grey, 17 levels), 360 of them held out for 'test'."""
  from sklearn.datasets import load_digits

  bunch = load_digits()
  order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(bunch.images))
  chosen = {'train': order[360:], 'test': order[:360]}[split]
  images = np.round(bunch.images[chosen] * (255.0 / 16.0)).astype(np.uint8)[..., None]
  return ImageSet('digits', images, bunch.target[chosen].astype(np.int32), 10)


@dataclasses.dataclass(frozen=True)
class Info:
  """What is known of a set before it is read: its channels, and classes (0 without labels)."""

  channels: int
  num_classes: int


SETS = {
  'digits': Info(1, 10),
  'cifar10': Info(3, 10),
  'imagenet2012': Info(3, 1000),
  'lsun/bedroom': Info(3, 0),
  'lsun/church_outdoor': Info(3, 0),
}


def describe(name: str, image_size: int) -> tuple[tuple[int, int, int], int]:
  """Shape (H, W, C) of a set's images, square, and its number of classes; nothing is read.

  Raises:
    UserError: there is no such set; the message lists those there are.
  """
  if name not in SETS:
    raise UserError(f'dataset.name={name!r} is not known; one of {sorted(SETS)}')
  return (image_size, image_size, SETS[name].channels), SETS[name].num_classes


SOURCES: dict[str, Callable[[str], ImageSet]] = {'digits': digits}


def load(name: str, image_size: int, split: str) -> ImageSet:
  """The split ('train' or 'test') of a set by name.

  Raises:
    UserError: there is no such set, or it is of another size, or this version cannot read it.
  """
  if name not in SOURCES:
    describe(name, image_size)
    raise UserError(
      f'dataset.name={name!r} cannot be read by this version; one of {sorted(SOURCES)} can'
    )
  images = SOURCES[name](split)
  if images.images.shape[1] != image_size:
    raise UserError(
      f'dataset.image_size={image_size}, but the images of {name!r} have {images.images.shape[1]}'
    )
  return images
