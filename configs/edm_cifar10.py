"""CIFAR-10 in one step by DMD (Yin et al. 2023), from NVIDIA's unconditional EDM model; `:cond`, from the conditional one.

  main.py --mode=import --source=edm --checkpoint=edm-cifar10-32x32-uncond-vp.pkl --config=configs/edm_cifar10.py --workdir=DIR
  main.py --config=configs/edm_cifar10.py --workdir=DIR

The checkpoint describes the teacher's network; the keys of `model` are not read.
"""

import ml_collections

from configs import default
from diffusion_distillation.errors import UserError

# Number of stored pairs, and weight of the regression on them.
VARIANTS = {'': (500_000, 0.5), 'cond': (100_000, 0.25)}


def common() -> ml_collections.ConfigDict:
  """Returns what both EDM teachers share: their sampler, the weighting of the fake score's loss, and DMD's optimizer."""
  c = default.get_config()
  c.methods = ('dmd',)
  c.weighting = 'edm'

  c.pairs.sampler = 'edm_heun'
  c.pairs.grid = 'karras'
  c.pairs.clip_x = False
  c.dmd.weight_decay = 0.01
  c.dmd.warmup = 500
  c.dmd.decay = 'none'
  c.dmd.clip_norm = 10.0

  c.evaluation.samplers = ('edm_heun',)
  c.evaluation.grid = 'karras'
  c.evaluation.clip_x = False
  c.evaluation.num_samples = 50_000
  return c


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config: 300,000 updates of 392 images; pairs from 18 Heun steps."""
  if variant not in VARIANTS:
    raise UserError(f'config variant :{variant} is not known; leave it out, or choose :cond')
  c = common()
  c.dataset.name = 'cifar10'
  c.dataset.image_size = 32

  c.pairs.num_pairs, c.dmd.regression = VARIANTS[variant]
  c.pairs.num_steps = 18
  c.dmd.num_updates = 300_000
  c.dmd.batch_size = 392
  c.dmd.learning_rate = 5e-5
  c.dmd.fake_learning_rate = 5e-5
  return c
