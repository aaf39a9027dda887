"""A folder of images, flat or one folder a class, or a zip of such; on disk or wherever fsspec reaches."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Collection
from typing import Any

import fsspec

from diffusion_distillation.datasets import decoding, splits
from diffusion_distillation.datasets.image_set import BrokenImage, Example, ImageSet
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

SPLIT_FOLDERS = ('train', 'test', 'val', 'valid', 'validation')
MAX_BYTES = 2**29  # of one file; larger ones are not images, or not for this


@dataclasses.dataclass(frozen=True)
class Tree:
  """What was found: each split's files, and their classes.

  Attributes:
    files: (name below the root, label) by split.
    classes: names by label; empty if the images are not in folders by class.
  """

  files: dict[str, list[tuple[str, int]]]
  classes: tuple[str, ...]


def arrange(names: Collection[str]) -> Tree:
  """Reads splits and classes off the names of image files ('train/cat/1.png').

  Folders that hold everything are passed over. Folders called train, test, validation and so on, and nothing beside
  them, are splits; without them all is 'train'. Below, images lie flat, or in one folder a class (and in whatever
  folders below that). Within a split they are ordered by a hash of their names below it, so that any slice is a
  fair sample, and a zip of a folder is in the order of the folder.

  Raises:
    ValueError: some images are in folders, and some beside these; the message names one of each.
  """
  paths = [pathlib.PurePosixPath(name) for name in names]
  below = 0
  while all(len(path.parts) > below + 1 for path in paths) and paths:
    if len({path.parts[below] for path in paths}) > 1:
      break
    below += 1
  inside = {name: path.parts[below:] for name, path in zip(names, paths, strict=True)}
  tops = {parts[0] if len(parts) > 1 else '' for parts in inside.values()}
  table: dict[str, dict[str, tuple[str, ...]]] = {'train': inside}
  if 'train' in tops and tops <= set(SPLIT_FOLDERS):
    table = {top: {n: p[1:] for n, p in inside.items() if p[0] == top} for top in sorted(tops)}
  flat = [name for part in table.values() for name, parts in part.items() if len(parts) == 1]
  deep = [name for part in table.values() for name, parts in part.items() if len(parts) > 1]
  if flat and deep:
    raise ValueError(f'has images in folders ({min(deep)}) and beside them ({min(flat)})')
  found = {parts[0] for part in table.values() for parts in part.values()} if deep else set()
  classes = tuple(sorted(found)) if len(found) > 1 else ()
  label = {name: k for k, name in enumerate(classes)}
  return Tree(
    {
      split: [(name, label.get(part[name][0], 0)) for name in sorted(part, key=lambda n: _hash(part[n]))]
      for split, part in table.items()
    },
    classes,
  )


def _hash(parts: tuple[str, ...]) -> bytes:
  return hashlib.sha256('/'.join(parts).encode(errors='surrogateescape')).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(ImageSet):
  """Files of a file system.

  Attributes:
    files: (path, label).
    system: that reads them.
    decoder: of their bytes.
  """

  files: list[tuple[str, int]]
  system: fsspec.AbstractFileSystem
  decoder: decoding.Decoder

  def __len__(self) -> int:
    return len(self.files)

  def read(self, k: int) -> Example:
    path, label = self.files[k]
    try:
      return self.decoder(self.system.cat_file(path)), label
    except BrokenImage as error:
      raise BrokenImage(f'{path} {error}') from error
    except Exception as error:  # whatever a file system raises for one file
      raise BrokenImage(f'{path} cannot be read: {error!r}') from error


@functools.lru_cache(maxsize=2)
def _listing(path: str) -> tuple[fsspec.AbstractFileSystem, dict[str, tuple[str, int]]]:
  """The file system of `path`, and its image files: full path and size, by name below `path`."""
  local = '://' not in path
  url = str(pathlib.Path(path).expanduser().absolute()) if local else path
  if local and not pathlib.Path(url).exists():
    raise UserError(f'dataset.path={path}: there is no such file or directory')
  is_zip = url.lower().endswith('.zip')
  try:
    system, root = fsspec.core.url_to_fs(f'zip::{url}' if is_zip else url)
    details: dict[str, Any] = system.find(root, detail=True)
  except Exception as error:  # of any file system: no such bucket, not a zip, not allowed, not installed
    raise UserError(f'dataset.path={path} cannot be listed: {error}') from error
  found = {}
  for full, info in details.items():
    name = full[len(root) :].lstrip('/')
    hidden = any(part.startswith('.') or part == '__MACOSX' for part in name.split('/'))
    if name.lower().endswith(decoding.SUFFIXES) and not hidden and info['size'] <= MAX_BYTES:
      found[name] = (full, int(info['size']))
  return system, found


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`. Only lists; each file is opened when its image is asked for.

  Raises:
    UserError: there is nothing at the path, or no image, or no way to tell the classes.
  """
  if not settings.path:
    raise UserError('dataset.name=folder needs dataset.path, a directory or a .zip of images')
  system, found = _listing(settings.path)
  if not found:
    raise UserError(f'dataset.path={settings.path} holds no image ({", ".join(decoding.SUFFIXES)})')
  try:
    tree = arrange(found)
  except ValueError as error:
    raise UserError(f'dataset.path={settings.path} {error}; use one folder a class, or none') from error
  others = [name for name in SPLIT_FOLDERS[1:] if name in tree.files]
  default = ('train', others[0]) if others else splits.held_out(len(tree.files['train']))
  chosen = splits.select(settings.key(role), settings.spec(role, default), tree.files)
  described = f'{tree.classes} {[(found[n][1], label) for n, label in chosen]}'
  size, channels = settings.image_size, settings.channels or 3
  return Folder(
    name=pathlib.PurePosixPath(settings.path.rstrip('/')).stem or 'folder',
    image_shape=(size, size, channels),
    classes=tree.classes,
    identity=hashlib.sha256(described.encode()).hexdigest(),
    files=[(found[name][0], label) for name, label in chosen],
    system=system,
    decoder=settings.decoder(channels),
  )
