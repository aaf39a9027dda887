"""Training methods, one file each: a method is a loss."""

from typing import Any

from diffusion_distillation.methods.consistency import Consistency
from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.dmd import DMD, DMD2
from diffusion_distillation.methods.gan import Gan
from diffusion_distillation.methods.knowledge import Knowledge
from diffusion_distillation.methods.method import Context, Method, Sampling, Student
from diffusion_distillation.methods.progressive import Progressive

# By the name that the config's `methods` has for them; each that is a `Student` has a section of that name.
METHODS: dict[str, type[Any]] = {
  'denoising': Denoising,
  'progressive': Progressive,
  'knowledge': Knowledge,
  'consistency': Consistency,
  'dmd': DMD,
  'dmd2': DMD2,
}

__all__ = [
  'DMD',
  'METHODS',
  'Consistency',
  'Context',
  'Denoising',
  'Gan',
  'Knowledge',
  'Method',
  'Progressive',
  'Sampling',
  'Student',
]
