"""Diffusion models that need one to eight network calls, by distillation.

import diffusion_distillation
diffusion_distillation.train(diffusion_distillation.get_config('digits'), 'runs/digits')
model = diffusion_distillation.load('runs/digits')
images = model.sample(16, seed=0)  # (16, H, W, C) uint8
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from diffusion_distillation.api import get_config, train
  from diffusion_distillation.evaluation.loading import LoadedModel, load

__all__ = ['LoadedModel', 'get_config', 'load', 'train']


def __getattr__(name: str) -> Any:
  """Imports what is exposed here at its first use, so that the package itself is imported at once."""
  if name in ('get_config', 'train'):
    from diffusion_distillation import api

    return getattr(api, name)
  if name in __all__:
    from diffusion_distillation.evaluation import loading

    return getattr(loading, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
