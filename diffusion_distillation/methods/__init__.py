"""Training methods, one file each: a method is a loss."""

from diffusion_distillation.methods.consistency import Consistency
from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.dmd import DMD
from diffusion_distillation.methods.gan import Gan
from diffusion_distillation.methods.knowledge import Knowledge
from diffusion_distillation.methods.method import DenoiseFn, Method
from diffusion_distillation.methods.progressive import Progressive

METHODS: dict[str, type] = {
  'denoising': Denoising,
  'progressive': Progressive,
  'dmd': DMD,
  'knowledge': Knowledge,
  'consistency': Consistency,
}

__all__ = [
  'DMD',
  'METHODS',
  'Consistency',
  'DenoiseFn',
  'Denoising',
  'Gan',
  'Knowledge',
  'Method',
  'Progressive',
]
