"""A folder or zip of images, flat or with one folder per class, on disk or at any URL that fsspec supports."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import fsspec
import numpy as np

from diffusion_distillation.datasets import decoding, listing, splits
from diffusion_distillation.datasets.image_set import BrokenImage, Example, ImageSet
from diffusion_distillation.datasets.left_out import LeftOut
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

SPLIT_FOLDERS = ('train', 'test', 'val', 'valid', 'validation')
_LIKE_SPLITS = {'training', 'testing', 'eval', 'evaluation', *SPLIT_FOLDERS[1:]}
_WAITS = (0.1, 1.0, 5.0)  # seconds to wait before reading is tried again
MAX_BYTES = 2**29  # maximum size of a file; larger files are ignored
SMALL = 1000  # maximum number of images for which held-out images are decoded before they are chosen

Parts = dict[str, tuple[str, ...]]  # parts of the path of each image, by its name


@dataclasses.dataclass(frozen=True)
class Tree:
  """The splits and classes of a folder.

  Attributes:
    files: (name, label) of each split's images.
    classes: class names by label; empty if the images are not in folders by class.
  """

  files: dict[str, list[tuple[str, int]]]
  classes: tuple[str, ...]


def arrange(names: Iterable[str]) -> Tree:
  """Infers splits and classes from the names of image files ('train/cat/1.png').

  Outer folders that contain everything are ignored. If all top folders are called train, test, validation and so on, they
  are splits; otherwise all images are in 'train'. Within a split, images are either not in folders, or in one folder per
  class (with any folders below). The images of a split are ordered by a hash of their names, so that any slice is a random
  sample.

  Raises:
    ValueError: only some images are in folders, or some folders have names similar to those of splits.
  """
  inside, split_of = by_split(names)
  flat = [name for name, parts in inside.items() if len(parts) == 1]
  deep = [name for name, parts in inside.items() if len(parts) > 1]
  if flat and deep:
    raise ValueError(f'has images in folders ({min(deep)}) and next to them ({min(flat)})')
  classes = tuple(sorted({inside[name][0] for name in deep}))
  label = {name: k for k, name in enumerate(classes)}
  files: dict[str, list[tuple[str, int]]] = {}
  for name in in_order(inside):
    files.setdefault(split_of[name], []).append((name, label.get(inside[name][0], 0)))
  return Tree(files, classes)


def by_split(names: Iterable[str]) -> tuple[Parts, dict[str, str]]:
  """Returns the parts of each name below its split's folder, and the split of each name; see `arrange`.

  Raises:
    ValueError: some folders have names similar to those of splits.
  """
  inside = passed_over({name: tuple(name.split('/')) for name in names})
  split_of = dict.fromkeys(inside, 'train')
  tops = {parts[0] if len(parts) > 1 else '' for parts in inside.values()}
  if 'train' in tops and tops <= set(SPLIT_FOLDERS):
    split_of = {name: parts[0] for name, parts in inside.items()}
    inside = passed_over({name: parts[1:] for name, parts in inside.items()})
  elif alike := sorted(top for top in tops if top.lower() in _LIKE_SPLITS):
    raise ValueError(
      f'has a folder {alike[0]!r}; folders of splits must be called {", ".join(SPLIT_FOLDERS)}, must include train, '
      'and must contain all images'
    )
  return inside, split_of


def in_order(inside: Parts) -> list[str]:
  """Returns the names in the order of a hash of their parts."""
  return sorted(inside, key=lambda name: _hash(inside[name]))


def passed_over(parts: Parts) -> Parts:
  """Removes the outer folders that contain all images."""
  while parts and all(len(p) > 1 for p in parts.values()) and len({p[0] for p in parts.values()}) == 1:
    parts = {name: p[1:] for name, p in parts.items()}
  return parts


def _hash(parts: tuple[str, ...]) -> bytes:
  return hashlib.sha256('/'.join(parts).encode(errors='surrogateescape')).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(ImageSet):
  """The image files of a split.

  Attributes:
    files: (path, label) of each image.
    system: the file system that reads the files.
    decoder: decodes the bytes of a file.
    left_out: other files of the folder that are not used.
  """

  files: list[tuple[str, int]]
  system: fsspec.AbstractFileSystem
  decoder: decoding.Decoder | decoding.NativeDecoder
  left_out: LeftOut

  def __len__(self) -> int:
    return len(self.files)

  def known_labels(self) -> np.ndarray:
    return np.array([label for _, label in self.files], np.int64)

  def beside(self) -> LeftOut:
    return self.left_out

  def read(self, k: int) -> Example:
    path, label = self.files[k]
    try:
      return self.decoder(self._bytes(path)), label
    except BrokenImage as error:
      raise BrokenImage(f'{path} {error}') from error

  def label(self, k: int) -> int:
    return self.files[k][1]

  def _bytes(self, path: str) -> bytes:
    """Reads a file; retries after errors, so that temporary network failures do not change which images are skipped."""
    attempt = 0
    while True:
      try:
        data: bytes = self.system.cat_file(path)
        return data
      except Exception as error:  # file systems may raise anything
        if listing.is_damage(error):
          raise BrokenImage(f'cannot be unpacked: {error}') from error
        lasting = isinstance(error, FileNotFoundError | PermissionError | RuntimeError)
        if lasting or attempt == len(_WAITS):
          raise UserError(
            f'{path} cannot be read: {error}; repair it, or remove it from the dataset'
          ) from error
      time.sleep(_WAITS[attempt])
      attempt += 1


@functools.lru_cache(maxsize=2)
def _listing(path: str) -> listing.Listing:
  """Lists the images at an absolute path or URL; cached, because both splits of a run need it."""
  return listing.list_images(path, MAX_BYTES)


@functools.lru_cache(maxsize=4)
def _held_out(there: listing.Listing, decoder: decoding.Decoder) -> frozenset[str]:
  """Returns the names of the images that are held out of a small dataset without splits; see `last_readable`."""
  names = [name for name, _ in arrange(there.found).files['train']]
  files = [(there.found[name][0], 0) for name in names]
  return last_readable(
    names, Folder('', (0, 0, 0), (), '', files, there.system, decoder, there.left_out)
  )


def last_readable(names: Sequence[str], images: Folder) -> frozenset[str]:
  """Returns the names of the last readable images of a small dataset, as many as `splits.held_out_size` says.

  Without this check, all held-out images might be broken. Returns an empty set if `splits.held_out` shall choose without
  decoding: for large datasets, which have many held-out images, or if too few images are readable.
  """
  size = splits.held_out_size(len(names))
  if len(names) > SMALL:
    return frozenset()
  readable = (name for k, name in reversed(list(enumerate(names))) if images.is_whole(k))
  held = frozenset(itertools.islice(readable, size))
  return held if len(held) == size else frozenset()


def choose(
  settings: Settings,
  role: str,
  files: Mapping[str, Sequence[tuple[str, int]]],
  held_out: Callable[[], frozenset[str]],
) -> list[tuple[str, int]]:
  """Chooses the files of a role by the splits in the config, or else those of the dataset.

  Args:
    settings: the dataset.
    role: 'train' or 'eval'.
    files: (name, label) of each split's images, in order; all in 'train' if the dataset has no splits of its own.
    held_out: returns the names to hold out of a dataset without splits, as `last_readable` does.

  Raises:
    UserError: there are too few images, or only one of two splits is given, or a split does not exist or is empty.
  """
  others = [name for name in SPLIT_FOLDERS[1:] if name in files]
  ours = not others and not settings.spec(role, ('', ''))
  if (count := sum(map(len, files.values()))) < 4 and ours:
    raise UserError(f'dataset.path={settings.path} holds {count} images; at least 4 are needed')
  if role == 'eval' and settings.split and not settings.eval_split and not others:
    raise UserError(
      f'dataset.split={settings.split} is given without dataset.eval_split; set it to the held-out split'
    )
  if ours and (held := held_out()):
    return [file for file in files['train'] if (file[0] in held) == (role == 'eval')]
  default = ('train', others[0]) if others else splits.held_out(len(files['train']))
  return splits.select(settings.key(role), settings.spec(role, default), files)


def location(settings: Settings, kinds: str = 'a directory or a .zip of images') -> str:
  """Returns the absolute path or the URL in the config; raises UserError if there is none, or nothing at the path."""
  if not settings.path:
    raise UserError(f'dataset.name={settings.name} needs dataset.path, {kinds}')
  path = settings.path
  if '://' not in path:
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
      raise UserError(f'dataset.path={settings.path}: there is no such file or directory')
  return path


def _there(settings: Settings) -> listing.Listing:
  """Lists the images at the path in the config; raises UserError if there are none."""
  path = location(settings)
  listing.check_kind(os.path.expanduser(settings.path))
  there = _listing(path)
  if not there.found:
    beside = ''.join(f'; {line}' for line in there.left_out.lines())
    raise UserError(
      f'dataset.path={settings.path} holds no image ({", ".join(decoding.SUFFIXES)}){beside}'
    )
  return there


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`. Only lists the files; each file is opened when its image is read.

  Raises:
    UserError: the path does not exist or has no images, or the classes cannot be inferred.
  """
  there = _there(settings)
  found = there.found
  try:
    tree = arrange(found)
  except ValueError as error:
    raise UserError(f'dataset.path={settings.path} {error}; see docs/your_own_images.md') from error
  size, channels = settings.image_size, settings.channels or 3
  decoder = settings.decoder(channels)
  chosen = choose(settings, role, tree.files, lambda: _held_out(there, decoder))
  top = len(os.path.commonpath([os.path.dirname(name) for name in found]))
  described = [(name[top:].lstrip('/'), found[name][1], label) for name, label in chosen]
  return Folder(
    name=pathlib.PurePosixPath(settings.path.rstrip('/')).stem or 'folder',
    image_shape=(size, size, channels),
    classes=tree.classes,
    identity=hashlib.sha256(f'{tree.classes} {described}'.encode()).hexdigest(),
    files=[(found[name][0], label) for name, label in chosen],
    system=there.system,
    decoder=decoder,
    left_out=there.left_out,
  )
