"""CIFAR-10 in one step by DMD (Yin et al. 2023), from the DDPM of Ho et al. (2020) as published for diffusers.

main.py --mode=import --source=diffusers --checkpoint=ddpm-cifar10-32 --config=configs/ddpm_cifar10.py --workdir=DIR
main.py --config=configs/ddpm_cifar10.py --workdir=DIR
"""

import ml_collections

from configs import edm_cifar10


def get_config() -> ml_collections.ConfigDict:
  """Returns the paper's hyper-parameters for EDM's unconditional model, except for those that depend on the teacher.

  The fake score is trained with the teacher's own loss, the squared error in eps. The pairs are drawn with 100 DDIM steps
  without clipping, starting at t = 1, where the student is evaluated.
  """
  c = edm_cifar10.get_config()
  c.weighting = 'snr'
  c.pairs.sampler = 'ddim'
  c.pairs.grid = 'uniform'
  c.pairs.num_steps = 100
  c.distill.start_steps = 100

  c.evaluation.samplers = ('ddim',)
  c.evaluation.grid = 'uniform'
  c.evaluation.clip_x = True
  return c
