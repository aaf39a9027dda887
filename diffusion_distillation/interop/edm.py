"""Reads NVIDIA's EDM models (Karras et al. 2022): the public .pkl files, or a state dict with the constructor's arguments.

`NAME.pkl` is a pickle that contains the source code of its classes; `pickles.Machine` reads it without executing anything.
`NAME.safetensors` contains the state dict, and `NAME.json` the arguments: {"class": "EDMPrecond", "img_resolution": 32, ...}.
"""

import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.config import choose
from diffusion_distillation.diffusion.process import SIGMA_DATA
from diffusion_distillation.diffusion.schedules import Karras, LinearBeta, Schedule
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.dhariwal_unet import DhariwalUNet
from diffusion_distillation.networks.edm_blocks import EdmUNet
from diffusion_distillation.networks.song_unet import SongUNet
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system.pickles import TENSORS, Inert, Machine, mapping
from diffusion_distillation.training.state import Params

Arrays = dict[str, np.ndarray]

# The constructors' arguments with their defaults, or None for no default. A value must have its default's type.
_OF_ALL: dict[str, Any] = {
  'img_resolution': None,
  'img_channels': None,
  'label_dim': 0,
  'use_fp16': False,
}
_CLASSES: dict[str, dict[str, Any]] = {
  'EDMPrecond': {
    **{'sigma_min': 0.0, 'sigma_max': math.inf, 'sigma_data': 0.5},
    'model_type': 'DhariwalUNet',
  },
  'VPPrecond': {
    **{'beta_d': 19.9, 'beta_min': 0.1, 'M': 1000, 'epsilon_t': 1e-5},
    'model_type': 'SongUNet',
  },
  'VEPrecond': {'sigma_min': 0.02, 'sigma_max': 100.0, 'model_type': 'SongUNet'},
}
_OF_NETWORKS: dict[str, Any] = {
  'channel_mult_emb': 4,
  'dropout': 0.1,
  'label_dropout': 0.0,
  'augment_dim': 0,
}
_NETWORKS: dict[str, tuple[type[EdmUNet], dict[str, Any]]] = {
  'SongUNet': (
    SongUNet,
    {
      **{'model_channels': 128, 'channel_mult': [1, 2, 2, 2], 'num_blocks': 4, 'attn_resolutions': [16]},
      **{'embedding_type': 'positional', 'channel_mult_noise': 1, 'encoder_type': 'standard'},
      **{'decoder_type': 'standard', 'resample_filter': [1, 1]},
    },
  ),
  'DhariwalUNet': (
    DhariwalUNet,
    {
      **{'model_channels': 192, 'channel_mult': [1, 2, 3, 4], 'num_blocks': 3},
      'attn_resolutions': [32, 16, 8],
    },
  ),
}
_MOST = 100_000  # maximum of every integer
_MOST_BYTES = 2  # maximum bytes of all tensors for each byte of the file


def read(path: pathlib.Path) -> StoredModel:
  """Reads the model in a file as float32; nothing in the file is executed.

  It is sampled as published, by EDM's Heun method on EDM's grid: in 18 steps for up to 32 pixels, otherwise in 40.

  Raises:
    UserError: the file does not exist, is not an EDM model, or contains something that is not supported, which is named.
  """
  try:
    arguments, arrays = (_read_pair if path.suffix == '.safetensors' else _read_pickle)(path)
    return to_model(arguments, arrays)
  except OSError as error:
    raise UserError(f'--checkpoint={path}: {error.filename}: {error.strerror}') from error
  except (Unsupported, UserError) as error:
    raise UserError(f'--checkpoint={path}: {_one_line(error)}') from error
  except Exception as error:  # unpickling unknown content may raise anything
    raise UserError(
      f'--checkpoint={path} cannot be read as an EDM model, a .pkl file of its release or a .safetensors file with a '
      f'.json file next to it ({type(error).__name__}: {_one_line(error)})'
    ) from error


class Unsupported(ValueError):
  """The file can be read, but its content is not valid or not supported."""


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


# Files.


def _read_pair(path: pathlib.Path) -> tuple[dict[str, Any], Arrays]:
  arguments = json.loads(path.with_suffix('.json').read_text())
  if not isinstance(arguments, dict):
    raise Unsupported(f'{path.with_suffix(".json")} holds no object')
  return arguments, safetensors.numpy.load(path.read_bytes())


_MODULES = [f'torch.nn.modules.container.{name}' for name in ('ModuleDict', 'ModuleList', 'Sequential')]


def _persistent(meta: Mapping[str, Any]) -> Inert:
  """Builds an object of `torch_utils.persistence`; its source code is not executed."""
  if not isinstance(meta['class_name'], str) or not isinstance(meta['state'], dict):
    raise ValueError('an object has no class or no state')
  return Inert(meta['class_name'][:80], meta['state'])


def _inert(name: str) -> Any:
  return lambda *arguments: Inert(name)


_CALLS = {
  **TENSORS,
  'torch_utils.persistence._reconstruct_persistent_obj': _persistent,
  'dnnlib.util.EasyDict': lambda items=(): mapping(items),
  **{name: _inert(name.rpartition('.')[-1]) for name in _MODULES},
}


def _read_pickle(path: pathlib.Path) -> tuple[dict[str, Any], Arrays]:
  found = Machine(_CALLS).run(io.BytesIO(path.read_bytes()))
  network = found.get('ema') if isinstance(found, dict) else None
  if not isinstance(network, Inert):
    raise ValueError('there is no network under the key ema')
  given, arguments = network.state.get('_init_args'), network.state.get('_init_kwargs')
  if given or not isinstance(arguments, dict):
    raise ValueError(f'{network.name} does not have the arguments of its constructor by name')
  arrays = _state_dict(network, '', set())
  size = sum(getattr(value, 'nbytes', 0) for value in arrays.values())
  if size > _MOST_BYTES * path.stat().st_size:  # views of one storage, of which each becomes an array
    raise ValueError(f'its tensors would take {size} bytes, far more than the file has')
  return {'class': network.name, **arguments}, arrays


def _state_dict(module: Inert, prefix: str, seen: set[int]) -> Arrays:
  """Returns the parameters and buffers of a module and its submodules, by torch's names."""
  if not isinstance(module, Inert) or id(module) in seen:
    raise ValueError(f'{prefix or "the network"!r} is not a module, or is one a second time')
  seen.add(id(module))
  found: Arrays = {}
  for part in ('_parameters', '_buffers', '_modules'):
    for name, value in module.state.get(part, {}).items():
      if not isinstance(name, str) or len(name) > 80:
        raise ValueError(f'{prefix or "the network"!r} has a part without a proper name')
      if value is not None and part == '_modules':
        found |= _state_dict(value, f'{prefix}{name}.', seen)
      elif value is not None:
        found[f'{prefix}{name}'] = value
  return found


# Contents.


def to_model(arguments: dict[str, Any], arrays: Arrays) -> StoredModel:
  """Builds a model from the constructor's arguments (and `class`) and the state dict."""
  kind = _word(arguments.pop('class', None))
  of_class = choose('class', kind, _CLASSES)
  model_type = _word(arguments.get('model_type', of_class['model_type']))
  _, of_network = choose('model_type', model_type, _NETWORKS)
  known = {**_OF_ALL, **of_class, **_OF_NETWORKS, **of_network}
  for name in arguments:
    if name not in known:
      raise Unsupported(f'{_word(name)} is not a supported argument')
  given = {
    name: _checked(name, arguments.get(name, default), default) for name, default in known.items()
  }
  _check_widths(given, arrays)
  shape = (given['img_resolution'],) * 2 + (given['img_channels'],)
  network = _network(kind, given, arrays)
  schedule = _schedule(kind, given)
  try:
    network.check(shape)
  except ValueError as error:
    raise Unsupported(error) from error
  denoise = Denoiser(network, 'edm' if kind == 'EDMPrecond' else 'eps')
  wanted = jax.eval_shape(lambda rng: denoise.init(rng, shape), jax.random.key(0))
  return StoredModel(
    denoise=denoise,
    params=_fit(arrays, wanted, given),
    schedule=schedule,
    space=Pixels(),
    image_shape=shape,
    sampler='edm_heun',
    num_steps=18 if given['img_resolution'] <= 32 else 40,
    times='karras',
    clip_x=False,
    cond_dropout=given['label_dropout'],
    provenance={'class': kind},
  )


def _word(value: Any) -> str:
  """Returns short strings unchanged, and a short text for any other value."""
  return value if isinstance(value, str) and len(value) <= 80 else brief(value)


def _check_widths(given: Mapping[str, Any], arrays: Arrays) -> None:
  """Raises Unsupported for a network that is deeper or wider than its tensors, because tracing it may take very long."""
  if given['num_blocks'] * max(1, len(given['channel_mult'])) > len(arrays):
    raise Unsupported(f'num_blocks={given["num_blocks"]} are more blocks than there are tensors')
  found = [value for value in arrays.values() if isinstance(value, np.ndarray) and value.size]
  widest = max((size for value in found for size in value.shape), default=0)
  for name in ('channel_mult', 'channel_mult_emb', 'channel_mult_noise'):
    factor = given.get(name, 1)
    width = given['model_channels'] * max(factor if isinstance(factor, tuple) else (factor,), default=0)
    if width > widest:
      raise Unsupported(f'{name} asks for {width} channels, but no tensor has more than {widest}')
  if given['label_dim'] > widest:
    raise Unsupported(f'label_dim={given["label_dim"]} is more than any tensor has ({widest})')


def _checked(name: str, value: Any, default: Any) -> Any:
  """Returns `value` if it has its default's type (an integer for None); otherwise raises a ValueError that names it."""

  def whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= _MOST

  if isinstance(default, bool | str):
    right = isinstance(value, type(default))
  elif isinstance(default, float):
    right = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
  elif isinstance(default, list):
    right = isinstance(value, list | tuple) and len(value) <= 64 and all(map(whole, value))
  else:
    right = whole(value) and (value > 0 or default == 0)
  if value is None or not right:
    raise Unsupported(
      f'{name} is missing' if value is None else f'{name}={brief(value)} is not supported'
    )
  return tuple(value) if isinstance(default, list) else value


def _network(kind: str, given: Mapping[str, Any], arrays: Arrays) -> EdmUNet:
  """Builds the network, without dropout, as for a teacher."""
  cls, _ = _NETWORKS[given['model_type']]
  fields: dict[str, Any] = {
    'out_ch': given['img_channels'],
    'ch': given['model_channels'],
    'emb_ch': given['model_channels'] * given['channel_mult_emb'],
    'ch_mult': given['channel_mult'],
    'num_res_blocks': given['num_blocks'],
    'attn_resolutions': given['attn_resolutions'],
    'num_classes': given['label_dim'],
    'preconditioning': kind.removesuffix('Precond').lower(),
  }
  if kind == 'VPPrecond':
    fields |= {'beta_d': given['beta_d'], 'beta_min': given['beta_min'], 'timesteps': given['M']}
  if cls is SongUNet:
    fields |= {name: given[f'{name}_type'] for name in ('embedding', 'encoder', 'decoder')}
    fields |= {'noise_mult': given['channel_mult_noise'], 'resample_filter': given['resample_filter']}
  if given.get('embedding_type') == 'fourier':
    count = given['model_channels'] * given['channel_mult_noise'] // 2
    frequencies = _taken(arrays, 'model.map_noise.freqs', (count,))
    fields['frequencies'] = tuple(float(f) for f in frequencies)
  return cls(**fields)


def _schedule(kind: str, given: Mapping[str, Any]) -> Schedule:
  """Returns the noise levels that the network was trained for; for EDM, which has no bounds, those used in sampling."""
  if given.get('sigma_data', SIGMA_DATA) != SIGMA_DATA:
    raise Unsupported(f'sigma_data={given["sigma_data"]} is not supported, only {SIGMA_DATA}')
  try:
    if kind == 'VPPrecond':
      beta_d, beta_min, least = (given[name] for name in ('beta_d', 'beta_min', 'epsilon_t'))
      logsnr_max = -math.log(math.expm1(0.5 * beta_d * least**2 + beta_min * least))
      return LinearBeta(beta_min, beta_min + beta_d, logsnr_max)
    if kind == 'VEPrecond':
      return Karras(given['sigma_min'], given['sigma_max'])
    return Karras(max(0.002, given['sigma_min']), min(80.0, given['sigma_max']))
  except (ArithmeticError, ValueError) as error:
    named = ', '.join(f'{name}={given[name]}' for name in _CLASSES[kind] if name != 'model_type')
    raise Unsupported(f'its noise levels are not supported ({named}): {error}') from error


# Parameters.


def _fit(arrays: Arrays, wanted: Params, given: Mapping[str, Any]) -> Params:
  """Converts the state dict to the names and shapes of our network."""
  flat, params, used = traverse_util.flatten_dict(wanted), {}, set()
  for path, leaf in flat.items():
    module, last = '.'.join(path[:-1]), 'bias' if path[-1] == 'bias' else 'weight'
    name = f'model.{module}.{last}'
    params[path] = _converted(arrays, name, leaf.shape)
    used.add(name)
  if given.get('embedding_type') == 'fourier':
    used.add('model.map_noise.freqs')
  if given['augment_dim']:  # zero in sampling; the layer has no bias, so it is not needed
    used.add('model.map_augment.weight')
  for name in arrays.keys() - used:
    if not name.endswith('.resample_filter'):
      raise Unsupported(f'{name} is not a parameter of this network')
  tree: Params = traverse_util.unflatten_dict(params)
  return tree


def _converted(arrays: Arrays, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Converts a parameter of torch to Flax's `shape`: (out, in, ...) to (..., in, out)."""
  if '.qkv.' in name:  # rows are (head, channel, q/k/v)
    *inputs, _, heads, width = shape
    rows = _taken(arrays, name, (3 * heads * width, *inputs))
    return np.moveaxis(rows.reshape(heads, width, 3, *inputs), (2, 0, 1), (-3, -2, -1)).copy()
  if len(shape) == 1:
    return _taken(arrays, name, shape)
  *kernel, inputs_, outputs = shape
  values = _taken(arrays, name, (outputs, inputs_, *kernel))
  return np.moveaxis(values, (1, 0), (-2, -1)).copy()


def _taken(arrays: Arrays, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns an array of this name and shape as float32; for a matrix, also accepts the shape of a 1x1 convolution."""
  if name not in arrays:
    raise Unsupported(f'{name} is missing')
  values = arrays[name]
  if not isinstance(values, np.ndarray):
    raise Unsupported(f'{name} is not a tensor')
  shapes = {shape, (*shape, 1, 1)} if len(shape) == 2 else {shape}
  if values.shape not in shapes:
    raise Unsupported(f'{name} has shape {values.shape}, the network needs {shape}')
  if not np.issubdtype(values.dtype, np.floating) and values.dtype.name != 'bfloat16':
    raise Unsupported(f'{name} holds {values.dtype} instead of floating-point numbers')
  values = np.array(values, np.float32).reshape(shape)
  if not np.isfinite(values).all():
    raise Unsupported(f'{name} is not finite')
  return values
