"""The format `diffusers`: a pipeline folder that DDIMPipeline loads, for networks that a UNet2DModel can express."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.samplers import DDIM, SAMPLERS, DDIMKeepEps
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.interop import diffusers, diffusers_config, diffusers_unet
from diffusion_distillation.interop.stablehlo import Draw
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet import UNet
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
  drawer, params, grid = _as_theirs(drawer, params, grid)
  assert isinstance(drawer.schedule, Discrete)  # as every UNet2D has
  settings = scheduler(drawer.schedule, drawer.denoise.output, grid, drawer.clip_x)
  contents: dict[str, Any] = {
    'model_index.json': {
      '_class_name': 'DDIMPipeline',
      'scheduler': ['diffusers', 'DDIMScheduler'],
      'unet': ['diffusers', 'UNet2DModel'],
    },
    'unet/config.json': _network(drawer),
    'scheduler/scheduler_config.json': settings,
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


def _as_theirs(drawer: Drawer, params: Params, grid: np.ndarray) -> tuple[Drawer, Params, np.ndarray]:
  """Returns the same sampler with a `UNet2D` in discrete time; raises UserError, naming each part that diffusers lacks."""
  network, schedule = drawer.denoise.network, drawer.schedule
  if problems := _problems(drawer):
    raise refuse('; '.join(problems))
  if not isinstance(network, UNet):
    return drawer, params, grid
  try:
    theirs = diffusers_unet.express(network, params, schedule, grid, drawer.image_shape)
  except ValueError as error:
    raise refuse(str(error)) from error
  denoise = dataclasses.replace(drawer.denoise, network=theirs.network)
  drawer = dataclasses.replace(drawer, denoise=denoise, schedule=theirs.schedule)
  return drawer, theirs.params, grid if theirs.schedule == schedule else times.uniform(len(grid) - 1)


def _problems(drawer: Drawer) -> list[str]:
  """Returns the parts of a model that diffusers lacks, in words."""
  network, found = drawer.denoise.network, []
  if isinstance(network, UNet):
    found += diffusers_unet.problems(network, drawer.image_shape)
  elif not isinstance(network, UNet2D):
    found.append(f'the network {type(network).__name__} is not a UNet2DModel')
  if drawer.denoise.output not in diffusers.PREDICTIONS:
    found.append(f'a network that predicts {drawer.denoise.output} has no prediction_type')
  if type(drawer.sampler) not in (DDIM, DDIMKeepEps):
    found.append(f'the sampler {type(drawer.sampler).__name__} is not DDIM')
  if not isinstance(drawer.space, Pixels):
    found.append(f'the space {type(drawer.space).__name__} needs more than a network and a scheduler')
  return found


def refuse(what: str, elsewhere: str = '; --format=jax exports every model') -> UserError:
  """Returns the error about a model that cannot be written in this format."""
  return UserError(f'--format=diffusers: {what}{elsewhere}')


def _network(drawer: Drawer) -> dict[str, Any]:
  """Returns config.json of the network."""
  network = drawer.denoise.network
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


def scheduler(
  schedule: Discrete, output: str, grid: np.ndarray, clip_x: bool, to_first: bool = False
) -> dict[str, Any]:
  """Returns scheduler_config.json: the schedule, and the spacing of timesteps that matches `grid`.

  With set_alpha_to_one, the last step of DDIMScheduler ends at clean data, as ours does; without, at the first timestep.

  Args:
    schedule: the schedule in discrete time.
    output: what the network predicts, a name in `diffusers.PREDICTIONS`.
    grid: the times (N + 1,).
    clip_x: whether x is clipped.
    to_first: whether the grid may end at the first timestep.

  Raises:
    UserError: DDIMScheduler does not have these times.
  """
  count, steps = schedule.num_timesteps, len(grid) - 1
  at_first = bool(to_first and np.isclose(grid[0], 1.0 / count))
  timesteps = np.float64(grid[1:]) * count - 1.0
  ratio = count // steps
  spacings = {
    'trailing': np.arange(1, steps + 1) * count / steps - 1.0,
    'leading': np.arange(steps) * ratio + schedule.steps_offset,
  }
  found = [
    name for name, theirs in spacings.items() if np.allclose(timesteps, theirs, rtol=0.0, atol=1e-2)
  ]
  if count % steps or not found or (grid[0] > 0.0 and not at_first):
    raise refuse(
      f'DDIMScheduler cannot represent its {steps} steps: their number must divide {count}, and the grid must be '
      'uniform or leading'
    )
  return {
    '_class_name': 'DDIMScheduler',
    'num_train_timesteps': count,
    'beta_schedule': schedule.betas,
    'beta_start': schedule.beta_start,
    'beta_end': schedule.beta_end,
    'trained_betas': list(schedule.trained_betas) or None,
    'rescale_betas_zero_snr': schedule.zero_snr,
    'steps_offset': schedule.steps_offset,
    'timestep_spacing': found[0],
    'prediction_type': diffusers.PREDICTIONS[output],
    'clip_sample': clip_x,
    'clip_sample_range': 1.0,
    'set_alpha_to_one': not at_first,
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
