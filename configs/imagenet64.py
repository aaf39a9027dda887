"""Class-conditional ImageNet 64x64 (Salimans & Ho 2022): 1024 steps, distilled to 1; `:fast` has shorter rounds."""

import ml_collections

from configs import paper


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config: a class-conditional network that predicts x and eps."""
  c = paper.large(variant)
  c.dataset.name = 'imagenet2012'
  c.dataset.image_size = 64

  c.model.conditional = True
  c.model.ch = 192
  c.model.ch_mult = (1, 2, 3, 4)
  return c
