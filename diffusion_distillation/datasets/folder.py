"""A folder of images, flat or one folder a class, or a zip of such; on disk or wherever fsspec reaches."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import fsspec

from diffusion_distillation.datasets import decoding, splits
from diffusion_distillation.datasets.image_set import BrokenImage, Example, ImageSet
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

SPLIT_FOLDERS = ('train', 'test', 'val', 'valid', 'validation')
_LIKE_SPLITS = {'training', 'testing', 'eval', 'evaluation', *SPLIT_FOLDERS[1:]}
_UNPACKING = (zipfile.BadZipFile, zlib.error, EOFError)  # of one member of a zip
_WAITS = (0.1, 1.0, 5.0)  # seconds, before a read is tried again
MAX_BYTES = 2**29  # of one file; larger ones are not images, or not for this

Parts = dict[str, tuple[str, ...]]  # of the path of each image, by its name


@dataclasses.dataclass(frozen=True)
class Tree:
  """What was found.

  Attributes:
    files: (name, label) of each split's images.
    classes: names by label; empty if the images are not in folders by class.
  """

  files: dict[str, list[tuple[str, int]]]
  classes: tuple[str, ...]


def arrange(names: Iterable[str]) -> Tree:
  """Reads splits and classes off the names of image files ('train/cat/1.png').

  Folders that hold everything are passed over. Folders called train, test, validation and so on, and nothing beside
  them, are splits; without them all is 'train'. Below, images lie flat, or in one folder a class (and in whatever
  folders below that). Within a split they are ordered by a hash of their names, so that any slice is a fair sample.

  Raises:
    ValueError: some images are in folders, and some beside these, or folders are called almost like splits.
  """
  inside = passed_over({name: tuple(name.split('/')) for name in names})
  split_of = dict.fromkeys(inside, 'train')
  tops = {parts[0] if len(parts) > 1 else '' for parts in inside.values()}
  if 'train' in tops and tops <= set(SPLIT_FOLDERS):
    split_of = {name: parts[0] for name, parts in inside.items()}
    inside = passed_over({name: parts[1:] for name, parts in inside.items()})
  elif alike := sorted(top for top in tops if top.lower() in _LIKE_SPLITS):
    raise ValueError(
      f'has a folder {alike[0]!r}, but splits are folders {", ".join(SPLIT_FOLDERS)}, train among them, and '
      'nothing beside'
    )
  flat = [name for name, parts in inside.items() if len(parts) == 1]
  deep = [name for name, parts in inside.items() if len(parts) > 1]
  if flat and deep:
    raise ValueError(f'has images in folders ({min(deep)}) and beside them ({min(flat)})')
  classes = tuple(sorted({inside[name][0] for name in deep}))
  label = {name: k for k, name in enumerate(classes)}
  files: dict[str, list[tuple[str, int]]] = {}
  for name in sorted(inside, key=lambda name: _hash(inside[name])):
    files.setdefault(split_of[name], []).append((name, label.get(inside[name][0], 0)))
  return Tree(files, classes)


def passed_over(parts: Parts) -> Parts:
  """The same without the folders that hold all of them."""
  while parts and all(len(p) > 1 for p in parts.values()) and len({p[0] for p in parts.values()}) == 1:
    parts = {name: p[1:] for name, p in parts.items()}
  return parts


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
      return self.decoder(self._bytes(path)), label
    except BrokenImage as error:
      raise BrokenImage(f'{path} {error}') from error
    except _UNPACKING as error:
      raise BrokenImage(f'{path} cannot be unpacked: {error}') from error

  def label(self, k: int) -> int:
    return self.files[k][1]

  def _bytes(self, path: str) -> bytes:
    """Of a file; tries again before it gives up, since what is skipped must not depend on a network's mood."""
    attempt = 0
    while True:
      try:
        data: bytes = self.system.cat_file(path)
        return data
      except _UNPACKING:
        raise
      except Exception as error:  # whatever a file system raises for one file
        lasting = isinstance(error, FileNotFoundError | PermissionError | RuntimeError)
        if lasting or attempt == len(_WAITS):
          raise UserError(
            f'{path} cannot be read: {error}; mend it, or remove it from the set'
          ) from error
      time.sleep(_WAITS[attempt])
      attempt += 1


def _walk(root: str) -> Iterator[tuple[str, int]]:
  """Files below a local directory and their sizes; follows links, each directory once."""
  seen: set[str] = set()

  def refuse(error: OSError) -> None:
    raise error

  for directory, below, files in os.walk(root, followlinks=True, onerror=refuse):
    below.sort()
    real = os.path.realpath(directory)
    if real in seen:
      below.clear()
      continue
    seen.add(real)
    for file in files:
      path = os.path.join(directory, file)
      if os.path.isfile(path):
        yield path, os.path.getsize(path)


@functools.lru_cache(maxsize=2)
def _listing(path: str) -> tuple[fsspec.AbstractFileSystem, dict[str, tuple[str, int]]]:
  """The file system of an absolute path or URL, and the image files there: path and size, by name below it.

  Kept, since both splits of a run ask for it.
  """
  try:
    if os.path.isdir(path):
      system, root = fsspec.filesystem('file'), path
      sizes = dict(_walk(path))
    else:
      zipped = path.lower().endswith('.zip')
      system, root = (fsspec.filesystem('zip', fo=path), '') if zipped else fsspec.core.url_to_fs(path)
      sizes = {full: int(info['size']) for full, info in system.find(root, detail=True).items()}
  except Exception as error:  # of any file system: no such bucket, not a zip, not allowed, not installed
    raise UserError(f'dataset.path={path} cannot be listed: {error}') from error
  found = {}
  for full, size in sizes.items():
    name = full[len(root) :].lstrip('/')
    hidden = any(part.startswith('.') or part == '__MACOSX' for part in name.split('/'))
    if name.lower().endswith(decoding.SUFFIXES) and not hidden and size <= MAX_BYTES:
      found[name] = (full, size)
  return system, found


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`. Only lists; each file is opened when its image is asked for.

  Raises:
    UserError: there is nothing at the path, or no image, or no way to tell the classes.
  """
  if not settings.path:
    raise UserError('dataset.name=folder needs dataset.path, a directory or a .zip of images')
  path = settings.path
  if '://' not in path:
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
      raise UserError(f'dataset.path={settings.path}: there is no such file or directory')
  system, found = _listing(path)
  if not found:
    raise UserError(f'dataset.path={settings.path} holds no image ({", ".join(decoding.SUFFIXES)})')
  try:
    tree = arrange(found)
  except ValueError as error:
    raise UserError(f'dataset.path={settings.path} {error}; see docs/your_own_images.md') from error
  others = [name for name in SPLIT_FOLDERS[1:] if name in tree.files]
  if len(found) < 4 and not others and not settings.spec(role, ('', '')):
    raise UserError(f'dataset.path={settings.path} holds {len(found)} images; 4 are needed at least')
  if role == 'eval' and settings.split and not settings.eval_split and not others:
    raise UserError(
      f'dataset.split={settings.split} is given: give dataset.eval_split, too, what is held out'
    )
  default = ('train', others[0]) if others else splits.held_out(len(tree.files['train']))
  chosen = splits.select(settings.key(role), settings.spec(role, default), tree.files)
  top = len(os.path.commonpath([os.path.dirname(name) for name in found]))
  described = [(name[top:].lstrip('/'), found[name][1], label) for name, label in chosen]
  size, channels = settings.image_size, settings.channels or 3
  return Folder(
    name=pathlib.PurePosixPath(settings.path.rstrip('/')).stem or 'folder',
    image_shape=(size, size, channels),
    classes=tree.classes,
    identity=hashlib.sha256(f'{tree.classes} {described}'.encode()).hexdigest(),
    files=[(found[name][0], label) for name, label in chosen],
    system=system,
    decoder=settings.decoder(channels),
  )
