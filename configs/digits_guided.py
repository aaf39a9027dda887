"""Class-conditional digits with students of a guided teacher: rounds and one-step DMD, with the same guidance weight."""

import ml_collections

from configs import digits_methods

WEIGHT = 1.0


def get_config() -> ml_collections.ConfigDict:
  """Returns configs/digits_methods.py with a conditional base that is trained with a label dropout of 0.1."""
  c = digits_methods.get_config()
  c.model.conditional = True
  c.dataset.label_dropout = 0.1
  c.methods = ('progressive', 'dmd')
  c.distill.guidance = WEIGHT
  c.pairs.guidance = WEIGHT
  c.dmd.guidance = WEIGHT
  c.evaluation.guidance = (0.0, WEIGHT, 3.0)
  return c
