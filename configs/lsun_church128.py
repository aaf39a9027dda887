"""LSUN churches, outdoor, at 128x128 (Salimans & Ho 2022): all but the images as for the bedrooms."""

import ml_collections

from configs import lsun_bedroom128


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """`lsun_bedroom128` with other images; the same variants."""
  c = lsun_bedroom128.get_config(variant)
  c.dataset.name = 'lsun/church_outdoor'
  return c
