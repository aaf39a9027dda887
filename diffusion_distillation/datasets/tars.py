"""Reads WebDataset's tar files in place: each image by its position, and the caption beside it. Nothing is extracted.

A sample is the members with one name before the first dot: 00001.jpg with 00001.txt, or with `text` or `caption` in 00001.json.
"""

import dataclasses
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import fsspec

from diffusion_distillation.datasets import caption_files, decoding, folder, listing
from diffusion_distillation.datasets.left_out import LeftOut, shown
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import interrupts
from diffusion_distillation.system.progress import Progress

SUFFIX = '.tar'
MOST_CAPTION = 2**20  # maximum size of a text or JSON in bytes
_TEXT, _JSON = '.txt', '.json'
_SPLIT = re.compile(rf'({"|".join(folder.SPLIT_FOLDERS)})[-_.]?\d*')  # train-00000.tar


class Place(NamedTuple):
  """Where an image is: the path of the tar file, the position of its first byte in it, and its size in bytes."""

  path: str
  start: int
  size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Members:
  """Reads members of tar files as a file system reads files.

  Attributes:
    system: the file system of the tar files.
    places: where each member is, by its name.
  """

  system: fsspec.AbstractFileSystem
  places: Mapping[str, Place]

  def cat_file(self, name: str) -> bytes:
    """Returns the content of a member; raises RuntimeError if the tar file has become shorter."""
    path, start, size = self.places[name]
    content: bytes = self.system.cat_file(path, start=start, end=start + size)
    if len(content) != size:
      raise RuntimeError(f'{path} is shorter than when it was listed')
    return content


class _Member(NamedTuple):
  name: str
  start: int
  size: int


def read(
  system: fsspec.AbstractFileSystem, archives: Mapping[str, str], left_out: LeftOut, source: str
) -> tuple[dict[str, Place], dict[str, str]]:
  """Lists the images in tar files and reads their captions.

  Args:
    system: the file system of the tar files.
    archives: path of each tar file by its name below the root.
    left_out: counts the members that are not used.
    source: the root as messages name it.

  Returns:
    Where each image is, and its caption, by NAME/MEMBER for the tar file NAME.tar; by SPLIT/NAME/MEMBER if NAME begins with the
    name of a split, as in train-00000.

  Raises:
    UserError: a tar file cannot be read, or is compressed, a member leads out of it or is there twice, a caption has no image, or
      an image no caption.
  """
  places: dict[str, Place] = {}
  captions: dict[str, str] = {}
  with Progress('listing tar files', len(archives)) as progress:
    for name in sorted(archives):
      interrupts.check()
      where = f'{source}: {shown(name)}'
      below = _below(name)
      try:
        with system.open(archives[name], 'rb') as file, tarfile.open(fileobj=file, mode='r:') as tar:
          for image, caption in _samples(tar, left_out, name, where):
            found = f'{below}/{image.name}'
            places[found] = Place(archives[name], image.start, image.size)
            captions[found] = caption
          _check_end(file, tar, where)
      except UserError:
        raise
      except Exception as error:  # of tarfile, or of any file system
        raise UserError(
          f'{where} cannot be read as a tar file ({error}); restore it, or unpack it if it is compressed'
        ) from error
      progress.advance()
  if not places:
    raise UserError(f'{source}: its tar files hold no image ({", ".join(decoding.SUFFIXES)})')
  return places, captions


def _check_end(file: IO[bytes], tar: tarfile.TarFile, where: str) -> None:
  """Raises UserError unless the listing ended where the tar file ends: tarfile also ends it at a damaged header."""
  file.seek(tar.offset)
  block = file.read(tarfile.BLOCKSIZE)
  if block and (len(block) < tarfile.BLOCKSIZE or block.strip(b'\0')):
    raise UserError(f'{where} is damaged at byte {tar.offset:,}; restore it')


def _below(name: str) -> str:
  """Returns the folder that stands for a tar file: its name without the suffix, below the split that it begins with."""
  stem = name[: -len(SUFFIX)]
  if '/' not in name and (split := _SPLIT.fullmatch(stem)):
    return f'{split[1]}/{stem}'
  return stem


def _samples(
  tar: tarfile.TarFile, left_out: LeftOut, archive: str, where: str
) -> Iterator[tuple[_Member, str]]:
  """Yields the image and the caption of each sample, in the order of the images."""
  images: dict[str, _Member] = {}
  captions: dict[str, dict[str, str]] = {}
  for info, name in _members(tar, left_out, archive, where):
    stem, dot, rest = posixpath.basename(name).partition('.')
    key, suffix = posixpath.join(posixpath.dirname(name), stem), f'{dot}{rest.lower()}'
    if suffix in decoding.SUFFIXES:
      if key in images:
        raise UserError(
          f'{where} holds {shown(images[key].name)} and {shown(name)}, two images of one sample'
        )
      images[key] = _Member(name, info.offset_data, info.size)
    elif suffix in (_TEXT, _JSON):
      if info.size > MOST_CAPTION:
        raise UserError(f'{where}: {shown(name)} is larger than {MOST_CAPTION / 2**20:.0f} MiB')
      file = tar.extractfile(info)  # a view of the tar file
      assert file is not None  # as for every regular file
      text = caption_files.decoded(file.read(), f'{where}: {shown(name)}')
      captions.setdefault(key, {})[suffix] = text
    else:
      left_out.add(listing.unsupported(name), f'{archive}/{name}')
  if missing := sorted(captions.keys() - images):
    raise UserError(f'{where}: there is a caption of {shown(missing[0])}, but no image; repack it')
  if missing := sorted(images.keys() - captions):
    raise UserError(
      f'{where}: {shown(images[missing[0]].name)} has no caption; add {shown(missing[0])}.txt or .json'
    )
  for key, image in images.items():
    yield image, _caption(captions[key], f'{where}: {shown(key)}')


def _caption(texts: Mapping[str, str], where: str) -> str:
  """Returns the caption of a sample: its text, or else a value of its JSON object."""
  if _TEXT in texts:
    return texts[_TEXT].strip()
  row: Mapping[str, Any] = caption_files.parsed(texts[_JSON], f'{where}{_JSON}')
  return caption_files.caption_of(row, f'{where}{_JSON}')


def _members(
  tar: tarfile.TarFile, left_out: LeftOut, archive: str, where: str
) -> Iterator[tuple[tarfile.TarInfo, str]]:
  """Yields the regular files of a tar file with their normalized names."""
  seen: set[str] = set()
  for info in tar:
    name = listing.normalized(info.name)
    if name is None and not info.isdir():
      raise UserError(f'{where} holds {info.name!r}, a path outside the archive; repack it')
    if name is None or info.isdir():
      continue
    if info.issym() or info.islnk():
      left_out.add('links in a tar', f'{archive}/{name}')
    elif not info.isreg() or info.issparse():
      left_out.add('not regular files', f'{archive}/{name}')
    elif reason := listing.clutter(name):
      left_out.add(reason, f'{archive}/{name}')
    elif name in seen:
      raise UserError(f'{where} holds {shown(name)} twice; repack it')
    else:
      seen.add(name)
      yield info, name
