"""Reads a decoded, resized copy of a dataset in ArrayRecord format, which `preparing.py` writes.

A record is the label, four bytes, little-endian, and the pixels, H * W * C bytes; or BROKEN and the reason in UTF-8.
ArrayRecord stores a hash of each record, and detects records that have changed.

    info.json                              description and number of the images, and the size of each file
    train-00000-of-00078.array_record ...  training images
    eval-00000-of-00001.array_record ...   held-out images
    train-captions.json, eval-captions.json   the captions, if the dataset has them
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import Any

import numpy as np

from diffusion_distillation.datasets.image_set import BrokenImage, Example, ImageSet, reading_error
from diffusion_distillation.datasets.left_out import LeftOut
from diffusion_distillation.datasets.settings import FROM_PATH, ROLES, WITHOUT_FILES, Settings
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.system.files import read_json

BROKEN = -(2**31)
INFO = 'info.json'
FORMAT = 1  # version of the records
COLOURS = 2  # version of the colours of decoded files: 2 is sRGB; 1 ignored colour profiles
AGAIN = 'remove it and run --mode=prepare again'


def shard_count(split: dict[str, Any]) -> int:
  """Returns the number of files of a split."""
  return math.ceil(split['num_images'] / split['images_per_file'])


def is_whole(path: pathlib.Path, split: dict[str, Any]) -> bool:
  """Whether a file exists and has the size with which it was written."""
  return path.is_file() and path.stat().st_size == split['bytes'].get(path.name)


def pack(image: np.ndarray, label: int) -> bytes:
  """Converts an example to a record."""
  return struct.pack('<i', label) + image.tobytes()


def pack_broken(reason: str) -> bytes:
  """Returns the record of a broken image."""
  return struct.pack('<i', BROKEN) + reason.encode(errors='backslashreplace')


def unpack(record: bytes, image_shape: tuple[int, int, int]) -> Example:
  """Converts a record to an example; raises BrokenImage for the record of a broken image."""
  (label,) = struct.unpack_from('<i', record)
  if label == BROKEN:
    raise BrokenImage(record[4:].decode())
  return np.frombuffer(record, np.uint8, offset=4).reshape(image_shape), label


def fields(settings: Settings) -> dict[str, Any]:
  """Returns the settings that a copy depends on; of the path of the original, only the folder's name."""
  kept = dataclasses.asdict(settings)
  del kept['prepared']
  path = pathlib.PurePath(settings.path).stem if settings.name in FROM_PATH else ''
  colours = {} if settings.name in WITHOUT_FILES else {'colours': COLOURS}
  return kept | {'path': path, 'format': FORMAT} | colours


def shard_paths(directory: pathlib.Path, role: str, count: int) -> list[pathlib.Path]:
  """Returns the paths of a split's files."""
  return [directory / f'{role}-{k:05d}-of-{count:05d}.array_record' for k in range(count)]


def captions_file(role: str) -> str:
  """Returns the name of the file of a split's captions."""
  return f'{role}-captions.json'


def _captions(directory: pathlib.Path, role: str, split: dict[str, Any]) -> list[str] | None:
  """Reads the captions of a split; raises DamagedError if they are missing. Copies of older versions have none."""
  if not split.get('captions'):
    return None
  path = directory / captions_file(role)
  found = read_json(path).get('captions') if path.is_file() else None
  if not isinstance(found, list) or len(found) != split['num_images']:
    raise DamagedError(f'{path} is missing or damaged; run --mode=prepare again')
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class Copy(ImageSet):
  """A split of a copy.

  Attributes:
    source: reads the records.
    paths: paths of the files.
    per_file: number of images in each file except the last one.
    left_out: files of the original dataset that were not used.
    broken: by index, the reason why an image could not be read.
    captions: the captions; None if there are none.
  """

  source: Any
  paths: list[pathlib.Path]
  per_file: int
  left_out: LeftOut
  broken: dict[int, str]
  captions: list[str] | None

  def __len__(self) -> int:
    return len(self.source)

  def caption(self, k: int) -> str | None:
    return None if self.captions is None else self.captions[k]

  def beside(self) -> LeftOut:
    return self.left_out

  def read(self, k: int) -> Example:
    try:
      record = self.source[k]
    except RuntimeError as error:
      raise reading_error(str(self.paths[k // self.per_file]), error, AGAIN) from error
    return unpack(record, self.image_shape)


def directory_of(settings: Settings) -> pathlib.Path:
  """Returns the directory of the copy, which need not exist."""
  return pathlib.Path(os.path.abspath(os.path.expanduser(settings.prepared)))


def read_info(directory: pathlib.Path) -> dict[str, Any] | None:
  """Reads `info.json`, or returns None if it does not exist; raises DamagedError if its contents are not valid."""
  if not (directory / INFO).is_file():
    return None
  try:
    info = read_json(directory / INFO)
    [info['dataset'].get, info['finished'], info['name'], info['image_shape'], info['classes']]
    for role in ROLES:
      [shard_count(info['splits'][role]), *(info['splits'][role][key] for key in ('identity', 'bytes'))]
  except (DamagedError, KeyError, AttributeError, TypeError, ZeroDivisionError) as error:
    raise DamagedError(f'{directory}: its {INFO} is damaged ({error!r}); {AGAIN}') from error
  return info


def check_fields(directory: pathlib.Path, info: dict[str, Any], settings: Settings) -> None:
  """Raises UserError, listing the differences, if the settings of the copy differ from the config."""
  wanted = json.loads(json.dumps(fields(settings)))
  differing = [
    f'dataset.{key} was {info["dataset"].get(key)}, is {value}'
    for key, value in wanted.items()
    if info['dataset'].get(key) != value and key != 'colours' and (key != 'path' or value)
  ]
  if differing:
    raise UserError(f'dataset.prepared={directory} was made from other images: {"; ".join(differing)}')
  if info['dataset'].get('colours') != wanted.get('colours'):
    raise UserError(
      f'dataset.prepared={directory} was made before colour profiles were converted to sRGB; {AGAIN}'
    )


def open_split(settings: Settings, role: str) -> ImageSet:
  """Opens the split for 'train' or 'eval' of the finished copy in `settings.prepared`.

  Raises:
    UserError: there is no finished copy, or it was made from other images.
    DamagedError: a file is missing or has the wrong size.
  """
  directory = directory_of(settings)
  info = read_info(directory)
  if info is None or not info['finished']:
    raise UserError(
      f'dataset.prepared={settings.prepared} holds no finished copy; run the same command with --mode=prepare, '
      'or leave the key out'
    )
  check_fields(directory, info, settings)
  split = info['splits'][role]
  paths = shard_paths(directory, role, shard_count(split))
  for path in paths:
    if not is_whole(path, split):
      state = 'has another size than was written' if path.exists() else 'is missing'
      raise DamagedError(f'{path} {state}; run --mode=prepare again')
  from array_record.python import array_record_data_source

  return Copy(
    name=info['name'],
    image_shape=tuple(info['image_shape']),
    classes=tuple(info['classes']),
    identity=split['identity'],
    source=array_record_data_source.ArrayRecordDataSource([str(path) for path in paths]),
    paths=paths,
    per_file=split['images_per_file'],
    left_out=LeftOut(**info.get('left_out', {})),
    broken={int(k): reason for k, reason in split.get('broken', {}).items()},
    captions=_captions(directory, role, split),
  )
