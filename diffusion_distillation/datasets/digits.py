"""scikit-learn's 1797 handwritten digits (8x8 grey, 17 levels), of which 360 are held out as 'test'."""

import hashlib

import numpy as np

from diffusion_distillation.datasets import splits
from diffusion_distillation.datasets.image_set import ImageSet, InMemory
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`."""
  from sklearn.datasets import load_digits

  if settings.image_size != 8 or settings.channels not in (None, 1):
    raise UserError(
      f'dataset.image_size={settings.image_size}, dataset.channels={settings.channels}: '
      "'digits' only has images of size 8 with 1 channel"
    )
  bunch = load_digits()
  order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(bunch.images))
  table = {'train': order[360:].tolist(), 'test': order[:360].tolist()}
  spec = settings.spec(role, ('train', 'test'))
  chosen = np.array(splits.select(settings.key(role), spec, table))
  images = np.round(bunch.images[chosen] * (255.0 / 16.0)).astype(np.uint8)[..., None]
  labels = bunch.target[chosen].astype(np.int32)
  identity = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
  return InMemory('digits', (8, 8, 1), tuple(map(str, range(10))), identity, images, labels)
