"""CIFAR-10, unconditional (Salimans & Ho 2022): 8192 steps, distilled to 1; `:fast` has shorter rounds."""

import ml_collections

from configs import paper


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config: a network that predicts x at 32x32."""
  c = paper.common(variant)
  c.dataset.name = 'cifar10'
  c.dataset.image_size = 32

  c.model.output = 'x'
  c.model.ch = 256
  c.model.emb_ch = 1024
  c.model.ch_mult = (1, 1, 1)
  c.model.attn_resolutions = (8, 16)
  c.model.num_heads = 1
  c.model.dropout = 0.2

  c.train.num_updates = 2_000_000  # the best of Table 1 is within 2 million; not stated for the teacher
  c.train.weight_decay = 0.001

  c.distill.start_steps = 8192
  c.distill.learning_rate = (1e-4,)  # 5e-5 in the released code

  c.checkpoint.every = 5000
  return c
