"""Images that were made elsewhere: a folder or zip of image files, or an .npz of an array of images.

They are read batch by batch, in their own sizes and without cropping; memory does not grow with their number.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import lzma
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.datasets import decoding, folder, listing
from diffusion_distillation.datasets.image_set import BrokenImage
from diffusion_distillation.errors import UserError

ARRAYS = ('arr_0', 'images')  # the arrays of an .npz that may hold the images; the first one is taken
_WAITING = 2**29  # maximum bytes of images that wait for others of their size
# What reading a damaged, encrypted or unusually compressed .npz may raise.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)
_THREADS = min(8, os.cpu_count() or 1)


class Batch(NamedTuple):
  """Some of the images, all of one size.

  Attributes:
    places: (n,) int64, the places of the images among all images, in the order of their names.
    images: (n, H, W, C) uint8 with one channel (grey) or three.
  """

  places: np.ndarray
  images: np.ndarray


class GivenImages(abc.ABC):
  """Images of one or several sizes, in the order of their names.

  Attributes:
    source: the flag and the path that the images come from, for messages: '--images=samples.npz'.
  """

  source: str

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def batches(self, size: int) -> Iterator[Batch]:
    """Yields all images once, at most `size` at a time; images of equal size come together where possible.

    Raises:
      UserError: an image cannot be read; the message names it.
    """


def open_images(given: str | os.PathLike[str], flag: str = '--images') -> GivenImages:
  """Opens the images at a path: a folder, a .zip of image files, or an .npz with uint8 images (N, H, W, C).

  Args:
    given: the path, as the user has written it.
    flag: the flag that the path comes from, for messages.

  Raises:
    UserError: there are no images, or the array has another type or shape.
  """
  source, is_array = f'{flag}={os.fspath(given)}', os.fspath(given).lower().endswith('.npz')
  path = (paths.local if is_array else paths.expand)(flag, os.fspath(given))
  if '://' not in path and not os.path.exists(path):
    raise UserError(f'{source}: there is no such file or directory')
  if is_array:
    return _open_array(pathlib.Path(path), source)
  listing.check_kind(path, flag)
  return _open_files(path, flag, source)


# Image files.


@dataclasses.dataclass(frozen=True)
class _Files(GivenImages):
  source: str
  files: folder.Folder

  def __len__(self) -> int:
    return len(self.files)

  def batches(self, size: int) -> Iterator[Batch]:
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for k, image in self._in_order(size):
      same = waiting.setdefault(image.shape, [])
      same.append((k, image))
      if len(same) == size:
        yield _stack(waiting.pop(image.shape))
      elif sum(math.prod(shape) * len(found) for shape, found in waiting.items()) > _WAITING:
        most = max(waiting, key=lambda shape: math.prod(shape) * len(waiting[shape]))
        yield _stack(waiting.pop(most))
    yield from map(_stack, waiting.values())

  def _in_order(self, ahead: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the place and the pixels of all images, which threads decode up to `ahead` images ahead."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      reading: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
      try:
        for k in range(len(self)):
          while k + len(reading) < min(k + ahead, len(self)):
            reading.append(pool.submit(self._read, k + len(reading)))
          yield k, reading.popleft().result()
      finally:
        pool.shutdown(wait=False, cancel_futures=True)

  def _read(self, k: int) -> np.ndarray:
    try:
      return self.files.read(k)[0]
    except BrokenImage as error:
      raise UserError(f'{self.source}: {error}; repair or remove it') from error


def _stack(found: list[tuple[int, np.ndarray]]) -> Batch:
  return Batch(np.array([k for k, _ in found]), np.stack([image for _, image in found]))


def _open_files(path: str, flag: str, source: str) -> GivenImages:
  """Lists the image files below a folder or in a zip, by name; they are decoded to three channels."""
  there = listing.list_images(path if '://' in path else os.path.abspath(path), folder.MAX_BYTES, flag)
  if not there.found:
    beside = ''.join(f'; {line}' for line in there.left_out.lines())
    raise UserError(f'{source} holds no image ({", ".join(decoding.SUFFIXES)}){beside}')
  files = [(there.found[name][0], 0) for name in sorted(there.found)]
  decoder = decoding.NativeDecoder(3)
  return _Files(
    source, folder.Folder(path, (0, 0, 3), (), '', files, there.system, decoder, there.left_out)
  )


# Arrays.


@dataclasses.dataclass(frozen=True)
class _Array(GivenImages):
  source: str
  path: pathlib.Path
  member: str
  shape: tuple[int, ...]

  def __len__(self) -> int:
    return self.shape[0]

  def batches(self, size: int) -> Iterator[Batch]:
    count, image = self.shape[0], self.shape[1:]
    try:
      with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
        _header(file)
        for start in range(0, count, size):
          places = np.arange(start, min(start + size, count))
          content = file.read(len(places) * math.prod(image))
          yield Batch(places, np.frombuffer(content, np.uint8).reshape(len(places), *image))
    except _DAMAGE as error:
      raise UserError(f'{self.source} is damaged ({error}); write it again') from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads the header of an array: its shape, whether it is in Fortran order, and its type; raises ValueError."""
  version = np.lib.format.read_magic(file)
  if version == (1, 0):
    return np.lib.format.read_array_header_1_0(file)
  if version == (2, 0):
    return np.lib.format.read_array_header_2_0(file)
  raise ValueError(f'an array has version {version} of the format of NumPy')


def _open_array(path: pathlib.Path, source: str) -> GivenImages:
  """Reads the header of the array of images; never unpickles anything."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
      name = next((name for name in ARRAYS if name in members), None)
      if name is None:
        held = ', '.join(sorted(members)[:5]) or 'none'
        raise UserError(f'{source} has no array {" or ".join(ARRAYS)}; its arrays: {held}')
      with archive.open(members[name]) as file:
        shape, fortran, dtype = _header(file)
        begin = file.tell()
  except _DAMAGE as error:
    raise UserError(f'{source} is not a readable .npz ({error}); write it again') from error
  if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
    raise UserError(
      f'{source}: {name} is {dtype} {tuple(shape)}; images must be uint8 (N, H, W, C) with 1 or 3 channels'
    )
  if fortran:
    raise UserError(f'{source}: {name} is in Fortran order; save numpy.ascontiguousarray of it')
  if members[name].file_size != begin + math.prod(shape):
    raise UserError(f'{source} is damaged (the size of {name} is not that of its shape); write it again')
  return _Array(source, path, members[name].filename, tuple(map(int, shape)))
