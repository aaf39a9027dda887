"""Text to image on drawn shapes with captions: autoencoder, text encoder, base and a one-step student on two CPU cores.

main.py --config=configs/tiny_t2i.py --workdir=DIR
main.py --mode=sample --workdir=DIR --prompts="a large red circle on white" --seed=1 --out=circle.png
"""

import ml_collections

from configs import default

GUIDANCE = 2.0


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: a guided base in 32 steps, and DMD in one step with pairs."""
  c = default.get_config()
  c.dataset.name = 'captioned_shapes'
  c.dataset.split = 'train[:9600]'
  c.dataset.image_size = 32
  c.dataset.label_dropout = 0.1

  c.autoencoder.num_updates = 800
  c.autoencoder.batch_size = 32
  c.autoencoder.learning_rate = 3e-3
  c.autoencoder.block_out_channels = (8, 16, 32)
  c.autoencoder.norm_num_groups = 1  # more groups take the colour out of plain images
  c.text_encoder.num_updates = 200
  c.text_encoder.batch_size = 64
  c.text_encoder.length = 8

  c.model.name = 'unet2d_condition'
  c.model.space = 'latents'
  c.model.block_out_channels = (32, 64)
  c.schedule.name = 'discrete'
  c.schedule.betas = 'squaredcos_cap_v2'

  c.train.num_updates = 1200
  c.train.batch_size = 64
  c.train.learning_rate = 2e-3
  c.train.warmup = 50
  c.train.decay = 'cosine'
  c.train.ema_decay = (0.99,)
  c.time.stratified = True

  c.methods = ('dmd',)
  c.distill.start_steps = 32
  c.pairs.num_pairs = 1536
  c.pairs.sampler = 'dpm_solver_2m'
  c.pairs.num_steps = 10
  c.pairs.guidance = GUIDANCE
  c.dmd.num_updates = 240
  c.dmd.batch_size = 32
  c.dmd.learning_rate = 1e-3
  c.dmd.fake_learning_rate = 3e-4
  c.dmd.warmup = 20
  c.dmd.decay = 'linear'
  c.dmd.ema_decay = (0.98,)
  c.dmd.regression = 1.0
  c.dmd.guidance = GUIDANCE

  c.checkpoint.every = 200
  c.log.every = 50
  c.log.health_every = 0
  c.evaluation.num_samples = 480
  c.evaluation.batch_size = 240
  c.evaluation.samplers = ('ddim',)
  c.evaluation.guidance = (GUIDANCE,)
  c.evaluation.clip_x = False
  c.pairs.clip_x = False
  return c
