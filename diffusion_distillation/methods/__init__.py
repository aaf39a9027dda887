"""Training methods, one per file; a method defines a loss."""

from typing import Any

from diffusion_distillation.methods.consistency import Consistency
from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.dmd import DMD, DMD2
from diffusion_distillation.methods.gan import Gan
from diffusion_distillation.methods.guided import GuidedDistillation
from diffusion_distillation.methods.knowledge import Knowledge
from diffusion_distillation.methods.method import Context, Method, Sampling, Student
from diffusion_distillation.methods.progressive import Progressive

# By their names in the config's `methods`; each subclass of `Student` has a config section with the same name.
METHODS: dict[str, type[Any]] = {
  'denoising': Denoising,
  'progressive': Progressive,
  'guided': GuidedDistillation,
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
  'GuidedDistillation',
  'Knowledge',
  'Method',
  'Progressive',
  'Sampling',
  'Student',
]
