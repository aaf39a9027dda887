"""Class-conditional ImageNet 64x64 (Salimans & Ho 2022): 1024 steps, distilled to 1; `:fast` has shorter rounds.

`:guided` is two-stage guided distillation (Meng et al. 2023): its students take the weight of guidance as an input.
"""

import ml_collections

from configs import paper


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config: a class-conditional network that predicts x and eps."""
  c = paper.large('' if variant == 'guided' else variant)
  c.dataset.name = 'imagenet2012'
  c.dataset.image_size = 64

  c.model.conditional = True
  c.model.ch = 192
  c.model.ch_mult = (1, 2, 3, 4)
  if variant == 'guided':
    _guided(c)
  return c


def _guided(c: ml_collections.ConfigDict) -> None:
  """Adds stage one. The range of weights is the paper's; its length is our choice, that of the last two rounds."""
  c.dataset.label_dropout = 0.1
  c.methods = ('guided', 'progressive')
  c.guided.weights = (0.0, 4.0)
  c.guided.num_updates = 100_000
  c.guided.batch_size = c.distill.batch_size
  c.guided.decay = 'linear'
  c.evaluation.guidance = (0.0, 0.3, 1.0, 4.0)
