"""Images with captions: a folder or zip with tables of captions or one text file per image, or WebDataset's tar files.

    images/                         images/                    shards/
      metadata.csv or .jsonl          a.jpg                      00000.tar: a.jpg, a.txt or a.json, ...
      a.jpg, more/b.png, ...          a.txt                      00001.tar

A table is called metadata or captions, as the Hugging Face hub's image folders have it. Each of its rows holds `file_name`,
relative to the table's folder, and the caption as `text` or `caption`. Where there is a table, text files are not read. Tar
files are read in place by the positions of their members (tars.py).
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import posixpath
from collections.abc import Mapping
from typing import Any, NamedTuple

import fsspec

from diffusion_distillation.datasets import caption_files, decoding, folder, listing, tars
from diffusion_distillation.datasets.image_set import ImageSet
from diffusion_distillation.datasets.left_out import LeftOut, shown
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

_KINDS = 'a directory, a .zip or a .tar of images with captions'


class Sample(NamedTuple):
  """An image: its path in the file system, its size in bytes, and its caption."""

  path: str
  size: int
  caption: str


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """The images at a path whose captions are not empty.

  Attributes:
    system: reads the images, see `folder.Folder`.
    found: the images by name below the root.
    left_out: all other files.
  """

  system: Any
  found: Mapping[str, Sample]
  left_out: LeftOut


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned(folder.Folder):
  """The images of a split, with their captions.

  Attributes:
    captions: the caption of each image.
  """

  captions: list[str]

  def caption(self, k: int) -> str:
    return self.captions[k]


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`. Lists the files and reads the captions; each image is read when it is needed.

  Raises:
    UserError: the path does not exist or has no images, an image has no caption, or a caption has no image.
  """
  path = folder.location(settings, _KINDS)
  local = os.path.expanduser(settings.path)
  if not local.lower().endswith(tars.SUFFIX):
    listing.check_kind(local)
  source = f'dataset.path={settings.path}'
  samples = _samples(path, source)
  try:
    inside, split_of = folder.by_split(samples.found)
  except ValueError as error:
    raise UserError(f'{source} {error}; see docs/your_own_images.md') from error
  files: dict[str, list[tuple[str, int]]] = {}
  for name in folder.in_order(inside):
    files.setdefault(split_of[name], []).append((name, 0))
  channels = settings.channels or 3
  decoder = settings.decoder(channels)
  chosen = folder.choose(settings, role, files, lambda: _held_out(samples, decoder))
  found = [samples.found[name] for name, _ in chosen]
  top = len(os.path.commonpath([os.path.dirname(name) for name in samples.found]))
  described = [
    (name[top:].lstrip('/'), sample.size, sample.caption)
    for (name, _), sample in zip(chosen, found, strict=True)
  ]
  return Captioned(
    name=pathlib.PurePosixPath(settings.path.rstrip('/')).stem or 'captions',
    image_shape=(settings.image_size, settings.image_size, channels),
    classes=(),
    identity=hashlib.sha256(repr(described).encode()).hexdigest(),
    files=[(sample.path, 0) for sample in found],
    system=samples.system,
    decoder=decoder,
    left_out=samples.left_out,
    captions=[sample.caption for sample in found],
  )


@functools.lru_cache(maxsize=4)
def _held_out(samples: Samples, decoder: decoding.Decoder) -> frozenset[str]:
  """Returns the names of the images that are held out of a small dataset without splits; see `folder.last_readable`."""
  names = folder.in_order(folder.by_split(samples.found)[0])
  files = [(samples.found[name].path, 0) for name in names]
  images = folder.Folder('', (0, 0, 0), (), '', files, samples.system, decoder, samples.left_out)
  return folder.last_readable(names, images)


@functools.lru_cache(maxsize=2)
def _samples(path: str, source: str) -> Samples:
  """Reads the captions at an absolute path or URL; `source` names it in messages. Cached, as both splits of a run need it."""
  if path.lower().endswith(tars.SUFFIX):
    system, root = fsspec.core.url_to_fs(path)
    return _of_tars(system, {posixpath.basename(path): root}, LeftOut(), source)
  suffixes = ('.txt', '.csv', '.jsonl', *(() if listing.is_zip(path) else (tars.SUFFIX,)))
  there = listing.list_images(path, folder.MAX_BYTES, suffixes=suffixes)
  archives = {name: at for name, (at, _) in there.others.items() if name.lower().endswith(tars.SUFFIX)}
  if archives and there.found:
    raise UserError(
      f'{source} holds tar files ({shown(min(archives))}) and images next to them ({shown(min(there.found))}); name a '
      'directory with one of them'
    )
  if archives:
    for name in there.others.keys() - archives:
      there.left_out.add(listing.unsupported(name), name)
    return _of_tars(there.system, archives, there.left_out, source)
  if not there.found:
    raise UserError(f'{source} holds no image ({", ".join(decoding.SUFFIXES)}) and no .tar')
  return _of_files(there, source)


def _of_tars(
  system: fsspec.AbstractFileSystem, archives: Mapping[str, str], left_out: LeftOut, source: str
) -> Samples:
  places, captions = tars.read(system, archives, left_out, source)
  found = {name: Sample(name, places[name].size, captions[name]) for name in places}
  return Samples(tars.Members(system, places), _not_empty(found, left_out, source), left_out)


def _of_files(there: listing.Listing, source: str) -> Samples:
  """Returns the images in a folder or zip with the captions in its tables, or in a text file beside each image."""
  tables = [name for name in there.others if caption_files.is_table(name)]
  used = tables or [name for name in there.others if name.lower().endswith('.txt')]
  for name in there.others.keys() - set(used):
    there.left_out.add(listing.unsupported(name), name)
  files = {name: there.others[name] for name in used}
  if not files:
    raise UserError(
      f'{source} holds {len(there.found):,} images and no captions; add metadata.csv with the columns file_name and text, or '
      'put the caption of NAME.jpg into NAME.txt; see docs/your_own_images.md'
    )
  if tables:
    captions = caption_files.of_tables(there.system, files, source)
    remedy = f'add rows to {shown(min(used))}'
  else:
    captions = caption_files.beside(there.system, files, there.found, source)
    remedy = 'put the caption of NAME.jpg into NAME.txt'
  if missing := captions.keys() - there.found:
    raise UserError(
      f'{source}: there is a caption of {shown(min(missing))}, but no such image ({len(missing):,} in total); restore the '
      'image, or remove its caption'
    )
  if missing := there.found.keys() - captions:
    raise UserError(
      f'{source}: {len(missing):,} of {len(there.found):,} images have no caption, such as {shown(min(missing))}; {remedy}'
    )
  found = {name: Sample(*there.found[name], captions[name]) for name in there.found}
  return Samples(there.system, _not_empty(found, there.left_out, source), there.left_out)


def _not_empty(found: Mapping[str, Sample], left_out: LeftOut, source: str) -> dict[str, Sample]:
  """Returns the images whose captions are not empty, and counts the others as left out."""
  for name, sample in found.items():
    if not sample.caption:
      left_out.add('with an empty caption', name)
  kept = {name: sample for name, sample in found.items() if sample.caption}
  if not kept:
    raise UserError(f'{source}: all {len(found):,} captions are empty')
  return kept
