"""All methods with one teacher: progressive, knowledge and consistency distillation, DMD and DMD2 on digits."""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns a base with its rounds, and other methods, each with no more training than all rounds together.

  The methods were tuned with this base, which is simpler than the base of configs/digits.py.
  """
  c = digits.get_config()
  c.train.learning_rate = 1e-3
  c.train.decay = 'none'
  c.train.ema_decay = (0.999,)
  c.time.stratified = False
  c.distill.factor = (2,)
  c.distill.num_updates = (200, 750, 750, 750)
  c.distill.learning_rate = (3e-4,)
  c.evaluation.tolerance = 0.0
  c.methods = ('progressive', 'knowledge', 'consistency', 'dmd', 'dmd2')

  c.pairs.num_pairs = 6144
  c.pairs.sampler = 'dpm_solver_2m'
  c.pairs.num_steps = 12

  for name in ('knowledge', 'consistency', 'dmd', 'dmd2'):
    c[name].batch_size = 64
    c[name].warmup = 20
    c[name].decay = 'linear'
    c[name].ema_decay = (0.99,)
    c[name].clip_norm = 1.0

  c.knowledge.num_updates = 1200
  c.knowledge.learning_rate = 5e-4

  c.consistency.num_updates = 1500
  c.consistency.learning_rate = 1e-3
  c.consistency.ema_decay = (0.95,)
  c.consistency.target_decay = 0.95
  c.consistency.start_intervals = 4
  c.consistency.end_intervals = 32
  c.consistency.solver = 'ddim'

  c.dmd.num_updates = 500
  c.dmd.learning_rate = 3e-4
  c.dmd.fake_learning_rate = 5e-5

  c.dmd2.num_updates = 900
  c.dmd2.fake_updates = 3
  c.dmd2.learning_rate = 5e-4
  c.dmd2.fake_learning_rate = 1e-3
  c.dmd2.gan_generator = 0.01
  c.dmd2.gan_fake = 0.03
  c.dmd2.gan_first_t = c.dmd2.first_t  # the GAN uses the times at which scores are compared
  c.dmd2.gan_last_t = c.dmd2.last_t

  c.log.health_every = 50
  return c
