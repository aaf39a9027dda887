"""What a set of images is: a length, and image k. No jax here: worker processes import this."""

import abc
import dataclasses
from typing import Any

import numpy as np

from diffusion_distillation.datasets.left_out import LeftOut
from diffusion_distillation.errors import DamagedError, UserError

Example = tuple[np.ndarray, int]
Batch = dict[str, Any]

_IN_A_ROW = 1000  # broken images after which a set is given up


class BrokenImage(Exception):
  """An image that cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet(abc.ABC):
  """Images of one shape, by index. Picklable, so that worker processes can read from it.

  Attributes:
    name: for reports.
    image_shape: (H, W, C).
    classes: names of the classes, by label; empty without labels.
    identity: sha256 of what it is made of (of files: names and sizes); equal for equal images in equal order.
  """

  name: str
  image_shape: tuple[int, int, int]
  classes: tuple[str, ...]
  identity: str

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, k: int) -> Example:
    """Image k, (H, W, C) uint8, and its label, 0 without labels; raises BrokenImage."""

  def known_labels(self) -> np.ndarray | None:
    """(N,) int: the label of each image, where that is known without reading them; else None."""
    return None

  def beside(self) -> LeftOut:
    """Files where the images are that are not images."""
    return LeftOut()

  def is_whole(self, k: int) -> bool:
    """Whether image k can be used; reads it."""
    try:
      self.read(k)
    except BrokenImage:
      return False
    return True

  def label(self, k: int) -> int:
    """The label of image k, 0 without labels, decoded or not; raises BrokenImage where only a whole image has one."""
    return self.read(k)[1]

  def batch(self, indices: np.ndarray) -> Batch:
    """The images at `indices` (B,); for a broken one stands the next that is whole.

    Returns:
      `image` (B, H, W, C) uint8; `cond`, arrays by key such as `label` (B,) int32, or None; `whole` (B,) bool, False where another image
      stands in; `skipped`: (index, reason) of the broken ones that were met.

    Raises:
      UserError: no image of the set is whole.
    """
    image = np.empty((len(indices), *self.image_shape), np.uint8)
    label = np.empty(len(indices), np.int32)
    whole = np.empty(len(indices), bool)
    skipped: dict[int, str] = {}
    for place, (example, broken) in enumerate(map(self._next_whole, map(int, indices))):
      image[place], label[place] = example
      whole[place] = not broken
      skipped.update(broken)
    return {
      'image': image,
      'cond': {'label': label} if self.classes else None,
      'whole': whole,
      'skipped': tuple(skipped.items()),
    }

  def _next_whole(self, k: int) -> tuple[Example, dict[int, str]]:
    """The first example from k on (around the end) that is whole, and what was skipped on the way."""
    skipped: dict[int, str] = {}
    for j in range(k, k + min(len(self), _IN_A_ROW)):
      try:
        return self.read(j % len(self)), skipped
      except BrokenImage as error:
        skipped[j % len(self)] = str(error)
    raise UserError(
      f'dataset {self.name!r}: none of {len(skipped)} images in a row can be used, of {len(self)}; the first: '
      f'{next(iter(skipped.values()))}'
    )

  def check(self, key: str) -> None:
    """Raises UserError, naming the config's key, unless two images are whole among the first ones."""
    broken, whole = [], 0
    for k in range(min(len(self), _IN_A_ROW)):
      try:
        self.read(k)
        whole += 1
      except BrokenImage as error:
        broken.append(str(error))
      if whole == 2:
        return
    first = f'; the first that cannot: {broken[0]}' if broken else ''
    raise UserError(
      f'{key}: of {whole + len(broken)} images of {self.name!r} {whole} can be used, 2 are needed at least{first}'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(ImageSet):
  """Decoded images.

  Attributes:
    images: (N, H, W, C) uint8.
    labels: (N,) int32; zeros without labels.
    broken: reasons, by index, of those that could not be decoded.
  """

  images: np.ndarray
  labels: np.ndarray
  broken: dict[int, str] = dataclasses.field(default_factory=dict)

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
      'whole': np.ones(len(indices), bool),
      'skipped': (),
    }


def reading_error(what: str, error: RuntimeError, again: str) -> UserError:
  """What ArrayRecord's error means: a damaged file, to be made `again`, or one that cannot be read now."""
  text = str(error).splitlines()[0]
  if ' failed: ' in text and 'No such file' not in text:  # a system call's
    return UserError(f'{what} cannot be read: {text}')
  return DamagedError(f'{what} is damaged ({text}); {again}')
