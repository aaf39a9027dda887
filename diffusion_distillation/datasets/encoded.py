"""Reads texts as embeddings, and images as latents, which were computed once; `run/encoding.py` writes them.

A record of ArrayRecord is x, if there are images, followed by the text's embeddings: little-endian numbers of one type.

    info.json                       what was encoded with which networks, and the size of each file
    no_text.npy                     the embeddings of the empty text
    00000-of-00010.array_record ... the records, in the order of the dataset
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distillation.datasets.image_set import Batch, reading_error
from diffusion_distillation.datasets.orders import shuffled
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.system.files import read_json

INFO, NO_TEXT = 'info.json', 'no_text.npy'
AGAIN = 'remove its folder to have it encoded again'


def shard_paths(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Returns the paths of the files of records."""
  return [folder / f'{k:05d}-of-{count:05d}.array_record' for k in range(count)]


def shard_count(info: Mapping[str, Any]) -> int:
  """Returns the number of files of records."""
  return math.ceil(info['count'] / info['per_file'])


def is_whole(path: pathlib.Path, info: Mapping[str, Any]) -> bool:
  """Whether a file exists and has the size with which it was written."""
  return path.is_file() and path.stat().st_size == info['bytes'].get(path.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """Embeddings of texts by index, perhaps with latents of images; picklable, so that processes can read from it.

  Attributes:
    name: name of the dataset for reports.
    identity: sha256 of what was encoded and of the networks that encoded it.
    image_shape: (H, W, C) of the images; () without images.
    x_shape: shape of an encoded image; () without images.
    no_text: (T, D) float32, the embeddings of the empty text.
    dtype: type of the stored numbers, one of `settings.ENCODED_DTYPES`.
    source: reads the records.
    folder: the folder of the files.
  """

  name: str
  identity: str
  image_shape: tuple[int, ...]
  x_shape: tuple[int, ...]
  no_text: np.ndarray
  dtype: str
  source: Any
  folder: pathlib.Path

  def __len__(self) -> int:
    return len(self.source)

  def places(self, index: np.ndarray, seed: int) -> np.ndarray:
    """Returns which texts the samples at `index` (B,) have: each epoch of samples has every text once, in another order."""
    return shuffled(len(self), seed, index)

  def draw(self, index: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """See `conditioning.Texts.draw`."""
    return self.texts(self.places(index, seed))

  def texts(self, places: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `text` and `no_text`, each (B, T, D) float32, of the texts at `places` (B,)."""
    return self._cond(self._read(places)[1])

  def batch(self, indices: np.ndarray) -> Batch:
    """Reads the examples at `indices` (B,); see `ImageSet.batch`. In place of `image`, it has `x` (B, ...) float32."""
    x, text = self._read(indices)
    found = {'cond': self._cond(text), 'valid': np.ones(len(indices), bool), 'skipped': ()}
    return found | ({'x': x} if self.x_shape else {})

  def _cond(self, text: np.ndarray) -> dict[str, np.ndarray]:
    return {'text': text, 'no_text': np.broadcast_to(self.no_text, text.shape)}

  def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the encoded images (B, ...), or (B, 0) without images, and the embeddings (B, T, D)."""
    wanted = [int(k) for k in indices]
    try:
      records = self.source.__getitems__(wanted)
    except RuntimeError as error:
      raise reading_error(str(self.folder), error, AGAIN) from error
    flat = np.stack(
      [np.frombuffer(record, np.dtype(self.dtype).newbyteorder('<')) for record in records]
    )
    size = math.prod(self.x_shape) if self.x_shape else 0
    numbers = flat.astype(np.float32)
    shape = self.x_shape or (0,)
    return numbers[:, :size].reshape(len(flat), *shape), numbers[:, size:].reshape(
      len(flat), *self.no_text.shape
    )


def open_folder(folder: pathlib.Path) -> Encoded:
  """Opens a finished folder; raises DamagedError if a file is missing or has another size than was written."""
  try:
    info = read_json(folder / INFO)
    paths = shard_paths(folder, shard_count(info))
    missing = next((path for path in paths if not is_whole(path, info)), None)
    no_text = np.load(folder / NO_TEXT, allow_pickle=False)
    image_shape, x_shape = tuple(info['image_shape']), tuple(info['x_shape'])
    name, identity, dtype = (str(info[key]) for key in ('name', 'identity', 'dtype'))
  except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
    raise DamagedError(f'{folder} is damaged ({error!r}); {AGAIN}') from error
  if missing is not None:
    raise DamagedError(f'{missing} is missing or has another size than was written; {AGAIN}')
  from array_record.python import array_record_data_source

  source = array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])
  return Encoded(name, identity, image_shape, x_shape, no_text, dtype, source, folder)
