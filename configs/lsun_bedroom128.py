"""LSUN bedrooms at 128x128 (Salimans & Ho 2022): 1024 steps, distilled to 1; `:fast` has shorter rounds."""

import ml_collections

from configs import paper


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config: a network that predicts x and eps."""
  c = paper.large(variant)
  c.dataset.name = 'lsun/bedroom'
  c.dataset.image_size = 128
  c.dataset.resize = 'bilinear'

  c.model.ch = 64
  c.model.ch_mult = (1, 2, 4, 6, 8)
  return c
