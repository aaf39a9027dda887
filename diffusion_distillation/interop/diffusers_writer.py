"""The format `diffusers`: a pipeline folder that DDIMPipeline loads, for networks that are a UNet2DModel."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.samplers import DDIM, SAMPLERS, DDIMKeepEps
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.interop import diffusers, diffusers_config
from diffusion_distillation.interop.stablehlo import Draw
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet2d import UNet2D
from diffusion_distillation.training.state import Params

FILES = {
  'model_index.json': 'the pipeline: `DDIMPipeline` of a `UNet2DModel` and a `DDIMScheduler`',
  'unet/': 'the network: its config and weights',
  'scheduler/': 'the noise schedule and the timesteps',
}
USAGE = """```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained('.')
images = pipeline(batch_size=16, num_inference_steps=STEPS, use_clipped_model_output=RECOMPUTED).images
```

The number of steps is the one that the model was distilled for. The images of a seed differ from those of other programs, which draw
other noise from it. For a class-conditional model, call `pipeline.unet(z, timestep, class_labels=...)` and `pipeline.scheduler.step`.
"""


def write(drawer: Drawer, params: Params, grid: np.ndarray, folder: pathlib.Path) -> Draw:
  """Writes a pipeline folder; see `exporting.Format.write`.

  Raises:
    UserError: a part of the model cannot be expressed in diffusers; the message names it.
  """
  schedule, network = _check(drawer)
  scheduler = _scheduler(drawer, schedule, grid)
  contents: dict[str, Any] = {
    'model_index.json': {
      '_class_name': 'DDIMPipeline',
      'scheduler': ['diffusers', 'DDIMScheduler'],
      'unet': ['diffusers', 'UNet2DModel'],
    },
    'unet/config.json': _network(drawer, network),
    'scheduler/scheduler_config.json': scheduler,
  }
  for name, content in contents.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2) + '\n')
  weights = safetensors.numpy.save(diffusers.state_dict(params), {'format': 'pt'})
  (folder / 'unet' / diffusers.WEIGHTS).write_bytes(weights)
  return _reader(drawer, grid, folder)


def usage(description: Mapping[str, Any]) -> str:
  """Returns instructions for drawing the model's images, in Markdown; `description` is the contents of model.json."""
  recomputed = description['clip_x'] and not SAMPLERS[description['sampler']].keeps_eps
  return USAGE.replace('STEPS', str(description['num_steps'])).replace('RECOMPUTED', str(recomputed))


def _check(drawer: Drawer) -> tuple[Discrete, UNet2D]:
  """Returns the schedule and the network; raises UserError if diffusers does not have them."""
  network, schedule = drawer.denoise.network, drawer.schedule
  if not isinstance(network, UNet2D):
    raise _refuse(f'the network {type(network).__name__} is not a UNet2DModel')
  if not isinstance(schedule, Discrete):
    raise _refuse(f'the schedule {type(schedule).__name__} is not in discrete time')
  if drawer.denoise.output not in diffusers.PREDICTIONS:
    raise _refuse(f'a network that predicts {drawer.denoise.output} has no prediction_type')
  if type(drawer.sampler) not in (DDIM, DDIMKeepEps):
    raise _refuse(f'the sampler {type(drawer.sampler).__name__} is not DDIM')
  if not isinstance(drawer.space, Pixels):
    raise _refuse(f'the space {type(drawer.space).__name__} needs more than a network and a scheduler')
  return schedule, network


def _refuse(what: str) -> UserError:
  return UserError(f'--format=diffusers: {what}; --format=jax exports every model')


def _network(drawer: Drawer, network: UNet2D) -> dict[str, Any]:
  """Returns config.json of the network."""
  height, width, channels = drawer.image_shape
  classes = conditioning.classes(drawer.denoise.conditioning)
  given = {field: getattr(network, field) for field in diffusers_config.FIELDS}
  return given | {
    '_class_name': 'UNet2DModel',
    'sample_size': height if height == width else [height, width],
    'in_channels': channels,
    'out_channels': channels,
    'num_class_embeds': classes.count if classes else None,
  }


def _scheduler(drawer: Drawer, schedule: Discrete, grid: np.ndarray) -> dict[str, Any]:
  """Returns scheduler_config.json: the schedule, and the spacing of timesteps that matches `grid`.

  With set_alpha_to_one, the last step of DDIMScheduler ends at clean data, as ours does.
  """
  count, steps = schedule.num_timesteps, len(grid) - 1
  timesteps = np.float64(grid[1:]) * count - 1.0
  ratio = count // steps
  spacings = {
    'trailing': np.arange(1, steps + 1) * count / steps - 1.0,
    'leading': np.arange(steps) * ratio + schedule.steps_offset,
  }
  found = [
    name for name, theirs in spacings.items() if np.allclose(timesteps, theirs, rtol=0.0, atol=1e-2)
  ]
  if count % steps or not found:
    raise _refuse(
      f'DDIMScheduler cannot represent its {steps} steps: their number must divide {count}, and the grid must be '
      'uniform or leading'
    )
  return {
    '_class_name': 'DDIMScheduler',
    'num_train_timesteps': count,
    'beta_schedule': schedule.betas,
    'beta_start': schedule.beta_start,
    'beta_end': schedule.beta_end,
    'rescale_betas_zero_snr': schedule.zero_snr,
    'steps_offset': schedule.steps_offset,
    'timestep_spacing': found[0],
    'prediction_type': diffusers.PREDICTIONS[drawer.denoise.output],
    'clip_sample': drawer.clip_x,
    'clip_sample_range': 1.0,
    'set_alpha_to_one': True,
    'thresholding': False,
  }


def _reader(drawer: Drawer, grid: np.ndarray, folder: pathlib.Path) -> Draw:
  found = diffusers.read(folder, len(grid) - 1)
  again = dataclasses.replace(
    drawer, denoise=found.denoise, schedule=found.schedule, clip_x=found.clip_x
  )

  @jax.jit
  def draw(params: Params, z: jax.Array, keys: jax.Array, cond: Any) -> jax.Array:
    typed = jax.random.wrap_key_data(keys, impl='threefry2x32')
    x = sampling.from_noise(again, params, jnp.asarray(grid, jnp.float32), z, typed, cond)
    return again.space.decode(x)

  def images(z: np.ndarray, keys: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    cond = None if labels is None else {'label': jnp.asarray(labels)}
    return np.asarray(draw(found.params, z, keys, cond))

  return images
