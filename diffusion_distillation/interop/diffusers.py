"""Reads UNet2DModel folders and pipeline folders of diffusers: JSON and safetensors, of which nothing is executed.

FOLDER/model_index.json, FOLDER/unet/, FOLDER/scheduler/scheduler_config.json   a pipeline
FOLDER/config.json, FOLDER/*.safetensors, FOLDER/scheduler_config.json          a network, and perhaps its schedule
"""

import logging
import math
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from diffusion_distillation.diffusion.discrete import BETAS, Discrete
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers_config, diffusers_ncsnpp
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet2d import TIME_EMBEDDINGS, UNet2D
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.training.state import Params

_log = logging.getLogger(__name__)

WEIGHTS = 'diffusion_pytorch_model.safetensors'
# Supported values of these keys, diffusers' default first.
_ONLY = {
  '_class_name': ('UNet2DModel',),
  'time_embedding_type': TIME_EMBEDDINGS,
  'class_embed_type': (None,),
  'mid_block_type': ('UNetMidBlock2D',),
}
# diffusers' defaults for keys that a file lacks.
_NETWORK = {
  'block_out_channels': (224, 448, 672, 896),
  'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
  'up_block_types': ('AttnUpBlock2D', 'AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
}
_OUTPUTS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x'}
PREDICTIONS = {ours: theirs for theirs, ours in _OUTPUTS.items()}
_SCHEDULE = {
  'beta_schedule': 'betas',
  'num_train_timesteps': 'num_timesteps',
  'beta_start': 'beta_start',
  'beta_end': 'beta_end',
  'rescale_betas_zero_snr': 'zero_snr',
  'steps_offset': 'steps_offset',
}
# Schedulers that clip x by default.
_CLIPS = ('DDPMScheduler', 'DDIMScheduler')
_OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def read(folder: pathlib.Path, num_steps: int) -> StoredModel:
  """Reads the model in a folder, to be sampled by DDIM in `num_steps` steps.

  Raises:
    UserError: there is no model, or it is not supported; the message names the key or the weight.
  """
  unet, scheduler = diffusers_config.find(folder)
  config = diffusers_config.read_json(unet / 'config.json')
  settings: Mapping[str, Any] = {}
  if scheduler.is_file():
    settings = diffusers_config.read_json(scheduler)
  else:
    _log.warning(
      "%s is missing: the schedule and prediction type are DDPMScheduler's defaults", scheduler
    )
  if config.get('time_embedding_type') == 'fourier':
    kinds = {key: kind for key, kind in diffusers_config.NETWORK.items() if key != 'norm_num_groups'}
    diffusers_config.check(unet / 'config.json', config, kinds)
    state = load_state(weights_file(unet))
    return diffusers_ncsnpp.read(
      unet / 'config.json', config, settings, {_renamed(name): value for name, value in state.items()}
    )
  schedule, output = read_schedule(scheduler, settings)
  _tell_what_does_not_apply(scheduler, settings)
  network = _network(unet / 'config.json', config, schedule)
  shape = (*image_size(unet / 'config.json', config), network.out_ch)
  try:
    network.check(shape)
  except ValueError as error:
    raise UserError(f'{unet / "config.json"}: {error}') from error
  denoise = Denoiser(network, output)
  return StoredModel(
    denoise=denoise.without_dropout(),
    params=_weights(unet, denoise, shape),
    schedule=schedule,
    space=Pixels(),
    image_shape=shape,
    sampler='ddim',
    num_steps=num_steps,
    clip_x=settings.get('clip_sample', settings.get('_class_name', 'DDPMScheduler') in _CLIPS),
  )


def image_size(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, int]:
  """Returns the height and width of a network's input."""
  size: Any = config.get('sample_size')
  sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
  if not all(type(side) is int and 0 < side <= 10_000 for side in sides):
    raise UserError(f'{path}: sample_size={brief(size)} must be the size of the images, such as 32')
  return sides[0], sides[1]


def refuse(path: pathlib.Path, key: str, value: Any, known: Any) -> UserError:
  """Returns the error about a value that is not supported."""
  names = ', '.join(map(str, known))
  return UserError(f'{path}: {key}={brief(value)} is not supported; supported: {names}')


def read_schedule(path: pathlib.Path, settings: Mapping[str, Any]) -> tuple[Discrete, str]:
  """Returns the schedule, and the output that the network predicts."""
  diffusers_config.check(path, settings, diffusers_config.SCHEDULE)
  prediction = settings.get('prediction_type', 'epsilon')
  if prediction not in _OUTPUTS:
    raise refuse(path, 'prediction_type', prediction, _OUTPUTS)
  if brief(settings.get('variance_type')).startswith("'learned"):
    raise UserError(
      f'{path}: variance_type={brief(settings["variance_type"])}: a network that predicts a variance is not supported'
    )
  betas = settings.get('beta_schedule', 'linear')
  if betas not in BETAS:
    raise refuse(path, 'beta_schedule', betas, BETAS)
  trained = tuple(settings.get('trained_betas') or ())
  if settings and not trained and 'beta_schedule' not in settings and 'beta_start' not in settings:
    name = settings.get('_class_name')
    raise UserError(
      f'{path}: _class_name={name!r} has no betas; supported: DDPMScheduler, DDIMScheduler and others'
    )
  given = {ours: settings[theirs] for theirs, ours in _SCHEDULE.items() if theirs in settings}
  try:
    return Discrete(**given, trained_betas=trained), _OUTPUTS[prediction]
  except (TypeError, ValueError) as error:
    raise UserError(f'{path}: {error}') from error


def _tell_what_does_not_apply(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  if settings.get('thresholding') or settings.get('clip_sample_range', 1.0) != 1.0:
    _log.warning('%s: thresholding and clip_sample_range do not apply: x is clipped to [-1, 1]', path)
  if settings.get('set_alpha_to_one') is False:
    _log.warning('%s: set_alpha_to_one=false does not apply: the last step ends at clean data', path)


def _network(path: pathlib.Path, config: Mapping[str, Any], schedule: Discrete) -> UNet2D:
  """Builds the network that a config describes."""
  for key, known in _ONLY.items():
    if config.get(key, known[0]) not in known:
      raise refuse(path, key, config[key], known)
  diffusers_config.check(path, config, diffusers_config.NETWORK)
  channels, outputs = config.get('in_channels', 3), config.get('out_channels', 3)
  if outputs == 2 * channels:
    raise UserError(
      f'{path}: out_channels={outputs} for in_channels={channels}: a network that predicts a variance is not supported'
    )
  if outputs != channels:
    raise refuse(path, 'out_channels', outputs, (channels,))
  given: dict[str, Any] = {
    field: tuple(value) if isinstance(value, list) else value
    for field, value in {**_NETWORK, **config}.items()
    if field in diffusers_config.FIELDS
  }
  return UNet2D(
    **given,
    out_ch=outputs,
    num_classes=config.get('num_class_embeds') or 0,
    schedule=schedule,
  )


def _weights(folder: pathlib.Path, denoise: Denoiser, shape: tuple[int, ...]) -> Params:
  """Reads the parameters of the network, float32, from the folder's safetensors file."""
  path = weights_file(folder)
  found = load_state(path)
  _check_widths(denoise.network, found, path)
  try:
    expected = jax.eval_shape(lambda rng: denoise.init(rng, shape), jax.random.key(0))
  except (ArithmeticError, TypeError, ValueError) as error:
    text = ' '.join(str(error).split())[:200]
    raise UserError(f'{folder / "config.json"} describes no network ({text})') from error
  return convert(found, expected, path)


def load_state(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the state dict in a safetensors file, float32; raises UserError if the file is damaged."""
  try:
    return {
      name: np.asarray(value, np.float32) for name, value in safetensors.flax.load_file(path).items()
    }
  except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
    raise UserError(f'{path} is damaged or not a safetensors file ({error})') from error


def _check_widths(network: UNet2D, found: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
  """Raises UserError for a network that is deeper or wider than the weights, because tracing it may take very long."""
  widest = max((size for value in found.values() if value.size for size in value.shape), default=0)
  counts = {'layers_per_block': network.layers_per_block * len(network.block_out_channels)}
  sizes = {
    'block_out_channels': max(network.block_out_channels),
    'time_embedding_dim': network.time_embedding_dim or 0,
    'num_train_timesteps': network.num_train_timesteps or 0
    if network.time_embedding_type == 'learned'
    else 0,
    'num_class_embeds': network.num_classes,
    'out_channels': network.out_ch,
  }
  for key, value, most in (
    *((key, value, len(found)) for key, value in counts.items()),
    *((key, value, widest) for key, value in sizes.items()),
  ):
    if value > most:
      raise UserError(f'{path}: {key} ({value}) asks for more than the weights have ({most})')


def weights_file(folder: pathlib.Path, name: str = WEIGHTS) -> pathlib.Path:
  """Returns the folder's safetensors file, by default called `name`; raises UserError, saying what to do, if it has none."""
  if (folder / name).is_file():
    return folder / name
  if (folder / f'{name}.index.json').is_file():
    raise UserError(
      f'{folder / name}.index.json: weights in several files are not supported; save them in one'
    )
  found = sorted(folder.glob('*.safetensors'))
  if len(found) == 1:
    return found[0]
  pickled = sorted(folder.glob('*.bin')) + sorted(folder.glob('*.pt')) + sorted(folder.glob('*.pth'))
  if pickled and not found:
    raise UserError(
      f'{pickled[0]} is a pickle, which could run any code and is not opened; {_conversion(pickled[0], name)}'
    )
  if not found:
    raise UserError(f'{folder}: there is no {name} and no other file of safetensors')
  names = ', '.join(path.name for path in found)
  raise UserError(f'{folder}: there is no {name}, but {names}; rename the one to read')


def _conversion(path: pathlib.Path, name: str) -> str:
  """Says how to convert a pickle; gives a command only if the file name is safe in a shell and in Python."""
  if not re.fullmatch(r'[\w.-]+', path.name, re.ASCII):
    return f'save its state dict as {name} with safetensors.torch.save_file, where torch is installed'
  return (
    f'convert it where torch is installed: cd {shlex.quote(str(path.parent))} && '
    f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path.name}', "
    f"map_location='cpu', weights_only=True), '{name}')\""
  )


def convert(found: Mapping[str, np.ndarray], expected: Params, path: pathlib.Path) -> Params:
  """Converts a state dict of diffusers or transformers to the parameters of the same network here.

  Args:
    found: the state dict, with the current or the older names of attention layers.
    expected: the network's parameters, or their shapes.
    path: path of the file, for messages.

  Raises:
    UserError: a weight is missing, unexpected, of the wrong shape or not finite; the message names it.
  """
  state = {_renamed(name): value for name, value in found.items()}
  wanted = traverse_util.flatten_dict(expected, sep='/')
  names = {their_name(name): name for name in wanted}
  problems = [f'{name} is missing' for name in sorted(names.keys() - state.keys())]
  problems += [f'{name} is not a weight of this network' for name in sorted(state.keys() - names.keys())]
  params = {}
  for theirs in sorted(names.keys() & state.keys()):
    ours, value = names[theirs], state[theirs]
    shape = wanted[ours].shape
    value = _arranged(ours, value, shape)
    if value.shape != shape:
      problems.append(f'{theirs} has shape {state[theirs].shape}, which config.json does not describe')
    elif not np.isfinite(value).all():
      problems.append(f'{theirs} is not finite')
    params[ours] = np.ascontiguousarray(value)
  if problems:
    more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
    raise UserError(f'{path}: {"; ".join(problems[:3])}{more}')
  return traverse_util.unflatten_dict(params, sep='/')


def state_dict(params: Params) -> dict[str, np.ndarray]:
  """Converts parameters to the state dict of the same network in diffusers or transformers; the inverse of `convert`."""
  flat = traverse_util.flatten_dict(params, sep='/')
  return {
    their_name(name): np.ascontiguousarray(_turned(name, np.asarray(value)))
    for name, value in flat.items()
  }


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a parameter of `shape` in diffusers' and transformers' state dicts."""
  return _turned(name, np.broadcast_to(np.zeros(()), shape)).shape


def _turned(name: str, value: np.ndarray) -> np.ndarray:
  """Converts a weight to diffusers' order of axes; the inverse of `_arranged`."""
  if not name.endswith('/kernel') or name.startswith('class_embedding'):
    return value
  return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def _renamed(name: str) -> str:
  """Returns the name of a weight in current versions of diffusers."""
  parts = name.split('.')
  return '.'.join(_OLD_NAMES.get(part, part) for part in parts) if 'attentions' in parts else name


def their_name(name: str) -> str:
  """Returns the name of a parameter, given as a path with slashes, in diffusers' and transformers' state dicts."""
  module, _, kind = name.replace('/', '.').rpartition('.')
  return f'{module}.{"bias" if kind == "bias" else "weight"}'


def _arranged(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Converts a weight to our order of axes: (out, in, h, w) to (h, w, in, out), (out, in) to (in, out)."""
  if not name.endswith('/kernel') or name.startswith('class_embedding'):
    return value
  if len(shape) == 2:  # a 1x1 convolution in older files
    return (
      value.reshape(value.shape[:2]).T if math.prod(value.shape[2:]) == 1 and value.ndim >= 2 else value
    )
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
