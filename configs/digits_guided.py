"""Class-conditional digits and students of a guided teacher: rounds, and DMD in one step, both with one weight."""

import ml_collections

from configs import digits_methods

WEIGHT = 1.0


def get_config() -> ml_collections.ConfigDict:
  """The base and the students of configs/digits_methods.py; the base is told classes, and not told one in ten."""
  c = digits_methods.get_config()
  c.model.conditional = True
  c.dataset.label_dropout = 0.1
  c.methods = ('progressive', 'dmd')
  c.distill.guidance = WEIGHT
  c.pairs.guidance = WEIGHT
  c.dmd.guidance = WEIGHT
  c.evaluation.guidance = (0.0, WEIGHT, 3.0)
  return c
