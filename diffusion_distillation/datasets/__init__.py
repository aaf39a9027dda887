"""Datasets by name: digits, shapes, folders and tensorflow-datasets, shapes and folders also with captions; or a prepared copy."""

from collections.abc import Callable

from diffusion_distillation.datasets import (
  captioned_shapes,
  captions,
  digits,
  folder,
  prepared,
  shapes,
  tfds,
)
from diffusion_distillation.datasets.image_set import BrokenImage, ImageSet, InMemory
from diffusion_distillation.datasets.settings import NONE, PROMPTS, ROLES, Settings
from diffusion_distillation.errors import UserError

# Any other name is a dataset of tensorflow-datasets.
SOURCES: dict[str, Callable[[Settings, str], ImageSet]] = {
  'digits': digits.open_split,
  'shapes': shapes.open_split,
  'captioned_shapes': captioned_shapes.open_split,
  'folder': folder.open_split,
  'captions': captions.open_split,
}


def open_original(settings: Settings, role: str) -> ImageSet:
  """Opens the split for 'train' or 'eval' from its original source, not from a prepared copy; see `open_split`."""
  if settings.name == PROMPTS:
    raise UserError('dataset.name=prompts has no images, which this command needs')
  return SOURCES.get(settings.name, tfds.open_split)(settings, role)


def open_split(settings: Settings, role: str) -> ImageSet:
  """Opens the split for 'train' or 'eval', without reading images; from the prepared copy if the config names one.

  Raises:
    UserError: the dataset or split does not exist or cannot be found; the message says what to do.
  """
  return (prepared.open_split if settings.prepared else open_original)(settings, role)


def has_images(name: str) -> bool:
  """Whether the dataset with this name has images."""
  return name not in (NONE, PROMPTS)


def describe(settings: Settings) -> tuple[tuple[int, int, int], int]:
  """Returns the shape (H, W, C) of the images and the number of classes; known datasets need not be present.

  Raises:
    UserError: see `open_split`.
  """
  if settings.name in tfds.KNOWN and not settings.prepared:
    tfds.data_dir(settings.path)
    known = tfds.KNOWN[settings.name]
    size = settings.image_size
    return (size, size, settings.channels or known.channels), known.num_classes
  images = open_split(settings, 'train')
  return images.image_shape, len(images.classes)


__all__ = [
  'NONE',
  'PROMPTS',
  'ROLES',
  'SOURCES',
  'BrokenImage',
  'ImageSet',
  'InMemory',
  'Settings',
  'describe',
  'has_images',
  'open_original',
  'open_split',
]
