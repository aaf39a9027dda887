"""Training methods, one file each: a method is a loss."""

from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.method import DenoiseFn, Method
from diffusion_distillation.methods.progressive import Progressive

METHODS: dict[str, type] = {'denoising': Denoising, 'progressive': Progressive}

__all__ = ['METHODS', 'DenoiseFn', 'Denoising', 'Method', 'Progressive']
