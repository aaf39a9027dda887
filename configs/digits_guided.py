"""Class-conditional digits with students of a guided teacher: two-stage guided distillation, and one-step DMD of one weight."""

import ml_collections

from configs import digits_methods

WEIGHT = 1.0


def get_config() -> ml_collections.ConfigDict:
  """Returns configs/digits_methods.py with a conditional base that is trained with a label dropout of 0.1.

  DMD matches the base guided with WEIGHT. The student of `guided` and the rounds after it, to 8 and to 4 steps, take the weight as
  an input.
  """
  c = digits_methods.get_config()
  c.model.conditional = True
  c.dataset.label_dropout = 0.1
  c.methods = ('dmd', 'guided', 'progressive')

  c.pairs.guidance = WEIGHT
  c.dmd.guidance = WEIGHT

  c.distill.end_steps = 4
  c.distill.factor = (4, 2)
  c.distill.num_updates = (400, 750)

  c.guided.weights = (0.0, 4.0)
  c.guided.num_updates = 1500
  c.guided.batch_size = 64
  c.guided.learning_rate = 1e-3
  c.guided.warmup = 20
  c.guided.decay = 'linear'
  c.guided.ema_decay = (0.99,)

  c.evaluation.guidance = (0.0, 0.5, WEIGHT, 2.0, 4.0)
  return c
