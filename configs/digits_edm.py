"""Digits with an EDM teacher (Karras et al. 2022): its preconditioning, loss, noise levels and time grid, then DMD."""

import ml_collections

from configs import digits_methods


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: network and updates of configs/digits.py; 18 steps of EDM's sampler, 35 network calls."""
  c = digits_methods.get_config()
  c.methods = ('dmd',)
  c.model.output = 'edm'
  c.model.time_input = 'c_noise'
  c.schedule.name = 'karras'
  c.weighting = 'edm'
  c.time.law = 'lognormal'

  c.distill.start_steps = 18
  c.pairs.sampler = 'edm_heun'
  c.pairs.num_steps = 18
  c.pairs.grid = 'karras'
  c.evaluation.samplers = ('edm_heun',)
  c.evaluation.grid = 'karras'
  return c
