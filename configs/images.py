"""Your own images at 16 (to try everything on a CPU), 32, 64 or 128 pixels: `configs/images.py:64`.

Set `dataset.name=folder` and `dataset.path`; the default is a dataset of synthetic shapes.
"""

import ml_collections

from configs import default
from diffusion_distillation.errors import UserError

# Channels, multiples per level, heights with attention. Our choice, based on the paper's networks.
NETWORKS = {
  '16': (32, (1, 2), (8,)),
  '32': (128, (1, 2, 2), (8, 16)),
  '64': (128, (1, 2, 3, 4), (8, 16)),
  '128': (64, (1, 2, 4, 6, 8), (8, 16)),
}


def get_config(variant: str = '64') -> ml_collections.ConfigDict:
  """Returns the config: a network that predicts v; 64 steps (8 for `:16`), distilled to 1."""
  if variant not in NETWORKS:
    raise UserError(f'config variant :{variant} is not known; choose one of {", ".join(NETWORKS)}')
  c = default.get_config()
  c.dataset.name = 'shapes'
  c.dataset.image_size = int(variant)

  c.schedule.name = 'shifted_cosine' if int(variant) > 64 else 'cosine'
  c.model.ch, c.model.ch_mult, c.model.attn_resolutions = NETWORKS[variant]
  c.model.emb_ch = 4 * c.model.ch
  c.model.head_dim = 32
  c.model.dropout = 0.1
  c.model.num_groups = 16

  c.train.num_updates = 200_000
  c.distill.start_steps = 64
  c.distill.num_updates = (10_000, 20_000, 20_000)
  c.evaluation.num_samples = 10_000
  if variant == '16':
    _small(c)
  return c


def _small(c: ml_collections.ConfigDict) -> None:
  """Shortens the run to minutes on two cores, for a first look."""
  c.model.num_res_blocks = 1
  c.train.num_updates = 800
  c.train.batch_size = 64
  c.train.learning_rate = 1e-3
  c.train.warmup = 100
  c.train.ema_decay = (0.995,)
  c.distill.start_steps = 8
  c.distill.num_updates = (80, 160)
  c.distill.batch_size = 64
  c.distill.learning_rate = (3e-4,)
  c.checkpoint.every = 200
  c.log.every = 20
  c.evaluation.num_samples = 500
  c.evaluation.batch_size = 250
