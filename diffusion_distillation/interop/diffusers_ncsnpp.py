"""Reads the form of UNet2DModel that is NCSN++ (Song et al. 2021), such as google/ncsnpp-*, as the SongUNet that it is.

It differs from EDM's VE models in names and in scale: it works on images in [0, 1], in which noise of scale sigma is noise of
scale 2 sigma in [-1, 1], and its output is divided by sigma, which makes it a score, -eps / sigma.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import edm
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.stages.model import StoredModel

DOWN_BLOCKS = {'SkipDownBlock2D': False, 'AttnSkipDownBlock2D': True}  # whether there is attention
UP_BLOCKS = {'SkipUpBlock2D': False, 'AttnSkipUpBlock2D': True}
SCHEDULER = 'ScoreSdeVeScheduler'
# Supported values of the keys of config.json, and diffusers' default for a file that lacks the key.
_ONLY: dict[str, tuple[Any, Any]] = {
  'center_input_sample': (True, False),
  'act_fn': ('silu', 'silu'),
  'attention_head_dim': (None, 8),
  'norm_num_groups': (None, 32),
  'norm_eps': (1e-6, 1e-5),
  'attn_norm_num_groups': (None, None),
  'resnet_time_scale_shift': ('default', 'default'),
  'add_attention': (True, True),
  'mid_block_type': ('UNetMidBlock2D', 'UNetMidBlock2D'),
  'class_embed_type': (None, None),
  'num_class_embeds': (None, None),
  'in_channels': (3, 3),
  'out_channels': (3, 3),
}
_LEAST_WIDTH = 128  # of levels with attention, whose norm there always has 32 groups
# EDM's names of the layers of a block.
_LAYERS = {
  'norm1': 'norm0',
  'conv1': 'conv0',
  'time_emb_proj': 'affine',
  'norm2': 'norm1',
  'conv2': 'conv1',
  'conv_shortcut': 'skip',
  'group_norm': 'norm2',
  'to_out.0': 'proj',
}


def read(
  path: pathlib.Path,
  config: Mapping[str, Any],
  settings: Mapping[str, Any],
  state: Mapping[str, np.ndarray],
) -> StoredModel:
  """Returns the model, to be sampled like EDM's VE models: by Heun's method on EDM's grid of noise levels.

  Args:
    path: path of config.json, for messages.
    config: contents of config.json; known keys have the right types.
    settings: contents of the scheduler's config; {} if there is none.
    state: the state dict, with the current names of attention layers.

  Raises:
    UserError: a key or a weight is not supported; the message names it.
  """
  arguments = _arguments(path, config) | _noise_levels(path, settings)
  if arguments['num_blocks'] > len(state):
    raise _refuse(
      path, 'layers_per_block', arguments['num_blocks'], f'at most {len(state)} for these weights'
    )
  try:
    return edm.to_model(arguments, _renamed(state, arguments))
  except edm.Unsupported as error:
    raise UserError(f'{path}: as a SongUNet of EDM, whose names follow: {error}') from error


def _refuse(path: pathlib.Path, key: str, value: Any, known: str) -> UserError:
  return UserError(
    f'{path}: {key}={brief(value)} is not supported with time_embedding_type=fourier; supported: {known}'
  )


def _arguments(path: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of EDM's constructor."""
  for key, (known, default) in _ONLY.items():
    if config.get(key, default) != known:
      raise _refuse(path, key, config.get(key, default), str(known))
  divisor = config.get('mid_block_scale_factor', 1)
  if abs(divisor - math.sqrt(2.0)) > 1e-6:
    raise _refuse(path, 'mid_block_scale_factor', divisor, 'the square root of 2')
  widths = config.get('block_out_channels', [224, 448, 672, 896])
  attends = _attends(path, config, len(widths))
  if any(width % widths[0] for width in widths):
    raise _refuse(path, 'block_out_channels', widths, 'multiples of the first')
  for width, attend in zip(widths, attends, strict=True):
    if attend and width < _LEAST_WIDTH:
      raise _refuse(
        path, 'block_out_channels', widths, f'{_LEAST_WIDTH} or more where there is attention'
      )
  emb_ch = config.get('time_embedding_dim') or 4 * widths[0]
  if emb_ch % widths[0]:
    raise _refuse(path, 'time_embedding_dim', emb_ch, 'a multiple of the first of block_out_channels')
  size = config.get('sample_size')
  height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
  if height != width or type(height) is not int or not 0 < height <= 10_000:
    raise _refuse(path, 'sample_size', size, 'one number, such as 256')
  return {
    'class': 'VEPrecond',
    'model_type': 'SongUNet',
    'img_resolution': height,
    'img_channels': 3,
    'model_channels': widths[0],
    'channel_mult': [width // widths[0] for width in widths],
    'channel_mult_emb': emb_ch // widths[0],
    'channel_mult_noise': 2,
    'num_blocks': config.get('layers_per_block', 2),
    'attn_resolutions': [height >> level for level, attend in enumerate(attends) if attend],
    'embedding_type': 'fourier',
    'encoder_type': 'skip',
    'decoder_type': 'skip',
    'resample_filter': [1, 3, 3, 1],
    'dropout': float(config.get('dropout', 0.0)),
  }


def _attends(path: pathlib.Path, config: Mapping[str, Any], levels: int) -> list[bool]:
  """Returns whether there is attention at each level, from the finest."""
  found = []
  for key, known in (('down_block_types', DOWN_BLOCKS), ('up_block_types', UP_BLOCKS)):
    types = config.get(key, ())
    if len(types) != levels or any(block not in known for block in types):
      raise _refuse(path, key, types, f'one of {", ".join(known)} for each level')
    found.append([known[block] for block in types])
  down, up = found
  if down != up[::-1]:
    raise _refuse(
      path, 'up_block_types', config['up_block_types'], 'attention where down_block_types has it'
    )
  return down


def _noise_levels(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the bounds of sigma for images in [-1, 1]."""
  if settings.get('_class_name', SCHEDULER) != SCHEDULER:
    raise _refuse(path, "the scheduler's _class_name", settings['_class_name'], SCHEDULER)
  bounds = {'sigma_min': 0.01, 'sigma_max': 1348.0}
  for key in bounds:
    value = settings.get(key, bounds[key])
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise _refuse(path, key, value, 'a number')
    bounds[key] = 2.0 * value
  return bounds


def _renamed(state: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the state dict by EDM's names; names that are not known stay, and are refused later."""
  modules = _modules(arguments)
  found = {_name(name, modules): value for name, value in state.items()}
  for name in [name for name in found if name.rpartition('.')[0].endswith('.to_q')]:
    block, _, kind = name.rpartition('.to_q.')
    names = [f'{block}.to_{part}.{kind}' for part in 'qkv']
    parts = [found[name] for name in names if name in found]
    if len(parts) == 3 and len({part.shape for part in parts}) == 1:  # else the names are refused
      rows = np.stack(parts, axis=1)  # EDM's rows are (channel, q/k/v)
      found = {name: value for name, value in found.items() if name not in names}
      found[f'{block}.qkv.{kind}'] = rows.reshape(-1, *rows.shape[2:])
  return found


def _modules(arguments: Mapping[str, Any]) -> dict[str, str]:
  """Returns EDM's name of each module outside blocks, and of each block, or half of a block, with other names inside."""
  levels, count = len(arguments['channel_mult']), arguments['num_blocks']
  at = [f'{(size := arguments["img_resolution"] >> level)}x{size}' for level in range(levels)]
  found = {
    'time_embedding.linear_1': 'map_layer0',
    'time_embedding.linear_2': 'map_layer1',
    'conv_in': f'enc.{at[0]}_conv',
    'conv_norm_out': f'dec.{at[0]}_aux_norm',
    'conv_out': f'dec.{at[0]}_aux_conv',
    'mid_block.resnets.0': f'dec.{at[-1]}_in0',
    'mid_block.attentions.0': f'dec.{at[-1]}_in0',
    'mid_block.resnets.1': f'dec.{at[-1]}_in1',
  }
  for level in range(levels):
    down, up = f'down_blocks.{level}', f'up_blocks.{levels - 1 - level}'
    for i in range(count):
      found |= dict.fromkeys(
        (f'{down}.resnets.{i}', f'{down}.attentions.{i}'), f'enc.{at[level]}_block{i}'
      )
    found |= {f'{up}.resnets.{i}': f'dec.{at[level]}_block{i}' for i in range(count + 1)}
    found[f'{up}.attentions.0'] = f'dec.{at[level]}_block{count}'  # it follows the last block
    if level < levels - 1:
      found[f'{down}.resnet_down'] = f'enc.{at[level + 1]}_down'
      found[f'{down}.skip_conv'] = f'enc.{at[level + 1]}_aux_skip'
    if level:
      found[f'{up}.resnet_up'] = f'dec.{at[level - 1]}_up'
      found[f'{up}.skip_norm'] = f'dec.{at[level]}_aux_norm'
      found[f'{up}.skip_conv'] = f'dec.{at[level]}_aux_conv'
  return found


def _name(name: str, modules: Mapping[str, str]) -> str:
  """Returns EDM's name of a weight; to_q, to_k and to_v keep their names within a block."""
  if name == 'time_proj.weight':
    return 'model.map_noise.freqs'
  parts = name.split('.')
  for length in range(len(parts) - 1, 0, -1):
    if (module := modules.get('.'.join(parts[:length]))) is not None:
      layer = '.'.join(parts[length:-1])
      return '.'.join(filter(None, ('model', module, _LAYERS.get(layer, layer), parts[-1])))
  return name
