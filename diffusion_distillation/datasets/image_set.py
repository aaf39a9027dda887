"""The interface of a dataset: a length, and image k. Must not import jax, because worker processes import this module."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_distillation.datasets.left_out import LeftOut
from diffusion_distillation.errors import DamagedError, UserError

Example = tuple[np.ndarray, int]
Batch = dict[str, Any]

_IN_A_ROW = 1000  # maximum number of broken images in a row


class BrokenImage(Exception):
  """An image cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet(abc.ABC):
  """Images of one shape, by index. An image set must be picklable, so that worker processes can read from it.

  Attributes:
    name: name of the dataset for reports.
    image_shape: (H, W, C).
    classes: names of the classes, by label; empty without labels.
    identity: sha256 of the contents (for files, of names and sizes) and captions; equal for equal images in equal order.
  """

  name: str
  image_shape: tuple[int, int, int]
  classes: tuple[str, ...]
  identity: str

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, k: int) -> Example:
    """Reads image k, (H, W, C) uint8, and its label, 0 without labels; raises BrokenImage."""

  def known_labels(self) -> np.ndarray | None:
    """Returns the label of each image, (N,) int, if it is known without reading the images; else None."""
    return None

  def caption(self, k: int) -> str | None:
    """Returns the caption of image k, which is known without reading the image; None if the dataset has no captions."""
    return None

  def all_captions(self) -> list[str] | None:
    """Returns the caption of each image; None if the dataset has no captions."""
    found = [self.caption(k) for k in range(len(self))] if self.caption(0) is not None else None
    return found  # type: ignore[return-value]

  def beside(self) -> LeftOut:
    """Returns the other files that are stored with the images and not used."""
    return LeftOut()

  def is_whole(self, k: int) -> bool:
    """Whether image k can be used; reads the image."""
    try:
      self.read(k)
    except BrokenImage:
      return False
    return True

  def label(self, k: int) -> int:
    """Returns the label of image k, 0 without labels; raises BrokenImage if the label cannot be known without the image."""
    return self.read(k)[1]

  def batch(self, indices: np.ndarray) -> Batch:
    """Reads the images at `indices` (B,); each broken image is replaced by the next intact one.

    Returns:
      `image` (B, H, W, C) uint8; `cond`, arrays by key such as `label` (B,) int32, or None; `valid` (B,) bool, False for
      replaced images; `skipped`: (index, reason) of the broken images.

    Raises:
      UserError: too many images in a row are broken.
    """
    image = np.empty((len(indices), *self.image_shape), np.uint8)
    label = np.empty(len(indices), np.int32)
    valid = np.empty(len(indices), bool)
    skipped: dict[int, str] = {}
    for place, (example, broken) in enumerate(map(self._next_whole, map(int, indices))):
      image[place], label[place] = example
      valid[place] = not broken
      skipped.update(broken)
    return {
      'image': image,
      'cond': {'label': label} if self.classes else None,
      'valid': valid,
      'skipped': tuple(skipped.items()),
    }

  def _next_whole(self, k: int) -> tuple[Example, dict[int, str]]:
    """Returns the first intact example from k on, wrapping around at the end, and the examples skipped before it."""
    skipped: dict[int, str] = {}
    for j in range(k, k + min(len(self), _IN_A_ROW)):
      try:
        return self.read(j % len(self)), skipped
      except BrokenImage as error:
        skipped[j % len(self)] = str(error)
    raise UserError(
      f'dataset {self.name!r}: {len(skipped)} images in a row, of {len(self)}, cannot be used; the first: '
      f'{next(iter(skipped.values()))}'
    )

  def check(self, key: str) -> None:
    """Raises UserError, naming the config's key, unless at least two of the first images are intact."""
    broken, whole = [], 0
    for k in range(min(len(self), _IN_A_ROW)):
      try:
        self.read(k)
        whole += 1
      except BrokenImage as error:
        broken.append(str(error))
      if whole == 2:
        return
    first = f'; the first broken image: {broken[0]}' if broken else ''
    raise UserError(
      f'{key}: of {whole + len(broken)} images of {self.name!r}, only {whole} can be used; at least 2 are needed{first}'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(ImageSet):
  """Decoded images.

  Attributes:
    images: (N, H, W, C) uint8.
    labels: (N,) int32; zeros without labels.
    broken: by index, the reason why an image could not be decoded.
    captions: the captions; None if there are none.
  """

  images: np.ndarray
  labels: np.ndarray
  broken: dict[int, str] = dataclasses.field(default_factory=dict)
  captions: Sequence[str] | None = None

  def caption(self, k: int) -> str | None:
    return None if self.captions is None else self.captions[k]

  def __len__(self) -> int:
    return len(self.images)

  def known_labels(self) -> np.ndarray:
    return self.labels

  def read(self, k: int) -> Example:
    if k in self.broken:
      raise BrokenImage(self.broken[k])
    return self.images[k], int(self.labels[k])

  def batch(self, indices: np.ndarray) -> Batch:
    if self.broken:
      return super().batch(indices)
    return {
      'image': self.images[indices],
      'cond': {'label': self.labels[indices]} if self.classes else None,
      'valid': np.ones(len(indices), bool),
      'skipped': (),
    }


def reading_error(what: str, error: RuntimeError, again: str) -> UserError:
  """Translates an error of ArrayRecord: the file is damaged, with the advice `again`, or it cannot be read now."""
  text = str(error).splitlines()[0]
  if ' failed: ' in text and 'No such file' not in text:  # from a system call
    return UserError(f'{what} cannot be read: {text}')
  return DamagedError(f'{what} is damaged ({text}); {again}')
