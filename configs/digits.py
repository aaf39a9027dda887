"""scikit-learn's 8x8 handwritten digits: a complete run in minutes on two CPU cores."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: a base model with 32 steps, distilled to 8, 4, 2 and 1."""
  c = default.get_config()
  c.dataset.name = 'digits'

  c.model.ch = 32
  c.model.emb_ch = 128
  c.model.ch_mult = (1, 2)
  c.model.num_res_blocks = 1
  c.model.attn_resolutions = (4,)
  c.model.num_groups = 8
  c.model.dropout = 0.1

  c.train.num_updates = 2600
  c.train.batch_size = 64
  c.train.learning_rate = 2e-3
  c.train.warmup = 100
  c.train.decay = 'cosine'
  c.train.ema_decay = (0.998,)
  c.time.stratified = True

  c.distill.start_steps = 32
  c.distill.factor = (4, 2, 2, 2)
  c.distill.num_updates = (150, 300, 600, 1500)
  c.distill.batch_size = 64
  c.distill.learning_rate = (5e-4, 5e-4, 7e-4, 1e-3)

  c.checkpoint.every = 200
  c.log.every = 50
  c.evaluation.num_samples = 5000
  c.evaluation.tolerance = 0.01
  c.evaluation.batch_size = 256
  c.evaluation.samplers = ('ddim',)
  return c
