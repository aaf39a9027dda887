"""Drawn shapes at any resolution: images with a known distribution, which are computed from their index without files.

Image k of class c = k mod 6 shows one shape (disc, square, triangle, ring, cross, half disc) on a plain ground. With the
image as the unit square, these are drawn independently and uniformly:

    centre       x, y in [0.3, 0.7]
    radius       in [0.15, 0.3]: of the circle that the shape fits into
    angle        in [0, 2 pi)
    ground       one brightness in [0.6, 1], the same for all channels
    colour       each channel in [0, 0.5]

A pixel's value is the mean of ground and colour, weighted by the fraction that the shape covers (to first order in the
distance to the edge), so that all resolutions show the same image. Grey images have the mean colour.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import numpy as np

from diffusion_distillation.datasets import splits
from diffusion_distillation.datasets.image_set import Example, ImageSet
from diffusion_distillation.datasets.settings import Settings

CLASSES = ('disc', 'square', 'triangle', 'ring', 'cross', 'half_disc')
VERSION = 1  # version of the drawing; images of different versions differ
SIZES = {'train': 50_000, 'test': 10_000}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """The parameters of an image; lengths are in units of the image's side."""

  kind: int
  centre: np.ndarray
  radius: float
  angle: float
  ground: float
  colour: np.ndarray


def parameters(index: int) -> Parameters:
  """Returns the parameters of image `index`; training images begin at 0, and test images follow them."""
  rng = np.random.Generator(np.random.Philox(key=[0x5A9E, index]))
  return Parameters(
    kind=index % len(CLASSES),
    centre=rng.uniform(0.3, 0.7, 2),
    radius=rng.uniform(0.15, 0.3),
    angle=rng.uniform(0.0, 2.0 * np.pi),
    ground=rng.uniform(0.6, 1.0),
    colour=rng.uniform(0.0, 0.5, 3),
  )


def distance(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Returns the signed distance to the edge of a shape of radius 1, below 0 inside (near corners, a lower bound)."""
  r = np.hypot(u, v)
  half = np.sqrt(0.5)
  bar = 0.35
  match CLASSES[kind]:
    case 'disc':
      return r - 1.0
    case 'square':
      return np.maximum(np.abs(u), np.abs(v)) - half
    case 'triangle':
      sides = [u * np.cos(a) + v * np.sin(a) for a in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
      return np.maximum.reduce(sides) - 0.5
    case 'ring':
      return np.abs(r - 0.75) - 0.25
    case 'cross':
      arm = np.sqrt(1.0 - bar**2)
      upright = np.maximum(np.abs(u) - bar, np.abs(v) - arm)
      return np.minimum(upright, np.maximum(np.abs(u) - arm, np.abs(v) - bar))
    case _:
      return np.maximum(r - 1.0, v)


@functools.lru_cache(maxsize=4)
def _pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
  middle = ((np.arange(size) + 0.5) / size).astype(np.float32)
  return middle[None, :], middle[:, None]


def draw(p: Parameters, size: int, channels: int) -> np.ndarray:
  """Draws an image, (size, size, channels) uint8."""
  x, y = _pixel_centres(size)
  x, y = (x - np.float32(p.centre[0])) / p.radius, (y - np.float32(p.centre[1])) / p.radius
  cos, sin = np.cos(p.angle), np.sin(p.angle)
  edge = distance(p.kind, cos * x + sin * y, cos * y - sin * x)
  covered = np.clip(0.5 - edge * (p.radius * size), 0.0, 1.0)[..., None]
  colour = p.colour if channels == 3 else p.colour.mean(keepdims=True)
  return np.round(255.0 * (p.ground + covered * (colour - p.ground))).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes(ImageSet):
  """The images at `indices`."""

  indices: list[int]

  def __len__(self) -> int:
    return len(self.indices)

  def known_labels(self) -> np.ndarray:
    return np.array(self.indices) % len(CLASSES)

  def read(self, k: int) -> Example:
    index = self.indices[k]
    size, _, channels = self.image_shape
    return draw(parameters(index), size, channels), index % len(CLASSES)

  def label(self, k: int) -> int:
    return self.indices[k] % len(CLASSES)


def select(
  settings: Settings, role: str, name: str, version: int, sizes: Mapping[str, int]
) -> tuple[list[int], str]:
  """Returns the indices of the images of a split, and their identity, in a dataset that is drawn from indices.

  Args:
    settings: the settings of the dataset.
    role: see `datasets.open_split`.
    name: the name of the dataset.
    version: the version of its drawing.
    sizes: the number of images in `train`, whose indices begin at 0, and in `test`, whose indices follow.
  """
  first = sizes['train']
  table = {'train': range(first), 'test': range(first, first + sizes['test'])}
  indices = splits.select(settings.key(role), settings.spec(role, ('train', 'test')), table)
  return indices, hashlib.sha256(f'{name} {version} {indices}'.encode()).hexdigest()


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`."""
  indices, identity = select(settings, role, 'shapes', VERSION, SIZES)
  shape = (settings.image_size, settings.image_size, settings.channels or 3)
  return Shapes('shapes', shape, CLASSES, identity, indices)
