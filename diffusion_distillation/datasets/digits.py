"""scikit-learn's 1797 handwritten digits (8x8 grey, 17 levels), of which 360 are held out as 'test'."""

import functools
import hashlib
import importlib.util
import pathlib

import numpy as np

from diffusion_distillation.datasets import splits
from diffusion_distillation.datasets.image_set import ImageSet, InMemory
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`."""
  if settings.image_size != 8 or settings.channels not in (None, 1):
    raise UserError(
      f'dataset.image_size={settings.image_size}, dataset.channels={settings.channels}: '
      "'digits' only has images of size 8 with 1 channel"
    )
  table = _table()
  order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(table))
  parts = {'train': order[360:].tolist(), 'test': order[:360].tolist()}
  spec = settings.spec(role, ('train', 'test'))
  chosen = np.array(splits.select(settings.key(role), spec, parts))
  images = np.round(table[chosen, :-1] * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 8, 8, 1)
  labels = table[chosen, -1].astype(np.int32)
  identity = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
  return InMemory('digits', (8, 8, 1), tuple(map(str, range(10))), identity, images, labels)


@functools.cache
def _table() -> np.ndarray:
  """Returns a row per image: 64 grey values from 0 to 16, then the digit.

  The file is read from where scikit-learn keeps it, because importing scikit-learn takes a second or two.
  """
  spec = importlib.util.find_spec('sklearn')
  places = (spec and spec.submodule_search_locations) or ()
  files = [pathlib.Path(place) / 'datasets' / 'data' / 'digits.csv.gz' for place in places]
  for file in files:
    if file.is_file():
      return np.loadtxt(file, delimiter=',')
  from sklearn.datasets import load_digits

  bunch = load_digits()
  return np.column_stack([bunch.data, bunch.target])
