"""LSUN outdoor churches at 128x128 (Salimans & Ho 2022), with the settings of the bedrooms."""

import ml_collections

from configs import lsun_bedroom128


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns `lsun_bedroom128` with other images; the variants are the same."""
  c = lsun_bedroom128.get_config(variant)
  c.dataset.name = 'lsun/church_outdoor'
  return c
