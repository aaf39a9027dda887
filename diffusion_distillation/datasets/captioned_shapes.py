"""Drawn shapes with captions, such as "a large red circle on white": images that a text describes completely, without files.

Image k shows combination k mod 48 of size, colour, shape and ground. The combination is the image's label, its caption is the name
of that class, and each caption belongs to one class only, so that a classifier of the labels reads an image's caption. With the image
as the unit square, these are drawn independently and uniformly:

    centre       x, y in [0.4, 0.6]
    radius       of the circle that the shape fits into: in [0.17, 0.2] if it is small, in [0.32, 0.38] if it is large
    angle        in [-0.1, 0.1]; the cross is upright at 0, the square lies on a side, the triangle has one below

Colours and grounds are always the same. Shapes are drawn as in shapes.py.
"""

import dataclasses
import itertools

import numpy as np

from diffusion_distillation.datasets import shapes
from diffusion_distillation.datasets.image_set import Example, ImageSet
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

RADII = {'small': (0.17, 0.2), 'large': (0.32, 0.38)}
COLOURS = {'red': (0.9, 0.1, 0.1), 'green': (0.1, 0.7, 0.2), 'blue': (0.15, 0.25, 0.9)}
KINDS = {'circle': 'disc', 'square': 'square', 'triangle': 'triangle', 'cross': 'cross'}  # in shapes.py
GROUNDS = {'black': 0.0, 'white': 1.0}
COMBINATIONS = tuple(itertools.product(RADII, COLOURS, KINDS, GROUNDS))
CAPTIONS = tuple(f'a {size} {colour} {kind} on {ground}' for size, colour, kind, ground in COMBINATIONS)
VERSION = 1  # version of the drawing; images of different versions differ
SIZES = {'train': 500 * len(CAPTIONS), 'test': 100 * len(CAPTIONS)}


def parameters(index: int) -> shapes.Parameters:
  """Returns the parameters of image `index`; training images begin at 0, and test images follow them."""
  rng = np.random.Generator(np.random.Philox(key=[0xCA57, index]))
  size, colour, kind, ground = COMBINATIONS[index % len(COMBINATIONS)]
  return shapes.Parameters(
    kind=shapes.CLASSES.index(KINDS[kind]),
    centre=rng.uniform(0.4, 0.6, 2),
    radius=rng.uniform(*RADII[size]),
    angle=rng.uniform(-0.1, 0.1),
    ground=GROUNDS[ground],
    colour=np.array(COLOURS[colour]),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedShapes(ImageSet):
  """The images at `indices`."""

  indices: list[int]

  def __len__(self) -> int:
    return len(self.indices)

  def known_labels(self) -> np.ndarray:
    return np.array(self.indices) % len(CAPTIONS)

  def label(self, k: int) -> int:
    return self.indices[k] % len(CAPTIONS)

  def caption(self, k: int) -> str:
    return CAPTIONS[self.label(k)]

  def read(self, k: int) -> Example:
    return shapes.draw(parameters(self.indices[k]), self.image_shape[0], 3), self.label(k)


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`; raises UserError for grey images, of which the captions would not be true."""
  if settings.channels == 1:
    raise UserError('dataset.channels=1: the captions of captioned_shapes name colours; set it to 3')
  indices, identity = shapes.select(settings, role, 'captioned_shapes', VERSION, SIZES)
  shape = (settings.image_size, settings.image_size, 3)
  return CaptionedShapes('captioned_shapes', shape, CAPTIONS, identity, indices)
