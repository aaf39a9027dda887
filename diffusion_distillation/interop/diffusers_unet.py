"""Expresses the U-Net of the papers (`networks/unet.py`), with its time input and its schedule, as a UNet2DModel of diffusers.

The layers are the same, in another order of names. The sinusoids of the time input become a table with a row for each
timestep (`time_embedding_type=learned`), and the schedule becomes the betas between these timesteps (`trained_betas`), so
that neither has to be one of those that diffusers computes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.unet import TIME_INPUTS, UNet, time_embedding
from diffusion_distillation.networks.unet2d import UNet2D
from diffusion_distillation.training.state import Params

TIMESTEPS = (
  1000  # the number of timesteps is the first multiple of the sampling steps that is at least this
)
NOISE_TOLERANCE = 1e-5  # of alpha and sigma at the sampling steps

_RESNET = {'temb_proj': 'time_emb_proj', 'nin_shortcut': 'conv_shortcut'}
_ATTENTION = {'norm': 'group_norm', 'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'proj_out': 'to_out.0'}
_OUTSIDE = {
  'conv_in': 'conv_in',
  'dense0': 'time_embedding.linear_1',
  'dense1': 'time_embedding.linear_2',
  'norm_out': 'conv_norm_out',
  'conv_out': 'conv_out',
}


class Expressed(NamedTuple):
  """A U-Net as a UNet2DModel in discrete time, in which the sampling steps are uniform."""

  network: UNet2D
  params: Params
  schedule: Discrete


def problems(network: UNet, image_shape: tuple[int, ...]) -> list[str]:
  """Returns the parts of a U-Net that no UNet2DModel has, in words; empty if there are none."""
  found = []
  if network.ch_mult[0] != 1:
    found.append(
      f'ch_mult={network.ch_mult}: its first convolution has {network.ch} channels, and the first level of a UNet2DModel '
      'as many as that convolution'
    )
  if len(_head_dims(network, image_shape)) > 1:
    found.append(
      f'num_heads={network.num_heads}: the width of its heads differs between the levels, and a UNet2DModel has one '
      'attention_head_dim'
    )
  found += [
    f'the condition {name!r} is no input of a UNet2DModel'
    for name in network.conditioning
    if name != 'label'
  ]
  return found


def express(
  network: UNet, params: Params, schedule: Schedule, grid: np.ndarray, image_shape: tuple[int, ...]
) -> Expressed:
  """Returns the UNet2DModel that computes the same at the timesteps that the times `grid` (N + 1,) become.

  Args:
    network: a U-Net without `problems`.
    params: its parameters.
    schedule: maps t to logsnr. A schedule in discrete time is kept, and `grid` then plays no part.
    grid: the times of the sampling steps, from 0 to 1.
    image_shape: (H, W, C).

  Raises:
    ValueError: float32 cannot hold the noise level of a sampling step; the message says which.
  """
  if isinstance(schedule, Discrete):
    discrete, logsnr = schedule, jnp.asarray(schedule.logsnr)
  else:
    discrete, logsnr = _discretized(schedule, grid)
  table = time_embedding(TIME_INPUTS[network.time_input](logsnr, network.schedule), network.ch)
  converted = _converted(params, len(network.ch_mult), network.resblock_resample)
  converted['time_proj'] = {'embedding': np.asarray(table)}
  return Expressed(_network(network, image_shape, discrete), converted, discrete)


def _network(network: UNet, image_shape: tuple[int, ...], schedule: Discrete) -> UNet2D:
  attends = _attends(network, image_shape)
  resample = 'resnet' if network.resblock_resample else 'conv'
  down, up = {
    'resnet': ('ResnetDownsampleBlock2D', 'ResnetUpsampleBlock2D'),
    'conv': ('DownBlock2D', 'UpBlock2D'),
  }[resample]
  (head_dim,) = _head_dims(network, image_shape)
  return UNet2D(
    out_ch=network.out_ch,
    block_out_channels=tuple(network.ch * mult for mult in network.ch_mult),
    down_block_types=tuple('AttnDownBlock2D' if attend else down for attend in attends),
    up_block_types=tuple('AttnUpBlock2D' if attend else up for attend in reversed(attends)),
    layers_per_block=network.num_res_blocks,
    attention_head_dim=head_dim,
    norm_num_groups=network.num_groups,
    attn_norm_num_groups=network.num_groups,
    norm_eps=1e-6,
    resnet_time_scale_shift='scale_shift',
    downsample_padding=0,
    downsample_type=resample,
    upsample_type=resample,
    time_embedding_dim=network.emb_ch,
    time_embedding_type='learned',
    num_train_timesteps=schedule.num_timesteps,
    num_classes=network.num_classes,
    schedule=schedule,
  )


def _attends(network: UNet, image_shape: tuple[int, ...]) -> list[bool]:
  """Returns whether the blocks of each level are followed by attention."""
  heights = [image_shape[0] // 2**level for level in range(len(network.ch_mult))]
  return [height in network.attn_resolutions for height in heights]


def _head_dims(network: UNet, image_shape: tuple[int, ...]) -> set[int | None]:
  """Returns the channels per attention head, None for one head, at all levels that have attention and in the middle."""
  if network.head_dim or (network.num_heads or 1) == 1:
    return {network.head_dim}
  attends = [*_attends(network, image_shape)[:-1], True]  # the middle attends at the last level's width
  widths = [network.ch * mult for mult, attend in zip(network.ch_mult, attends, strict=True) if attend]
  return {width // (network.num_heads or 1) for width in widths}


def _discretized(schedule: Schedule, grid: np.ndarray) -> tuple[Discrete, jax.Array]:
  """Returns the schedule at M timesteps, of which every (M / N)-th is a sampling step, and their logsnr (M,).

  Between two sampling steps, the timesteps are evenly spaced in t. Where float32 cannot tell their noise levels apart, as with
  EDM's grid, whose first step is at t = 1e-6, the sampling steps are the only timesteps.
  """
  steps = len(grid) - 1
  try:
    return _at_timesteps(schedule, grid, math.ceil(TIMESTEPS / steps))
  except ValueError:
    return _at_timesteps(schedule, grid, 1 if steps > 1 else TIMESTEPS)


def _at_timesteps(schedule: Schedule, grid: np.ndarray, every: int) -> tuple[Discrete, jax.Array]:
  """Does so for a sampling step at every `every`-th timestep; raises ValueError if float32 cannot hold the noise levels.

  Each beta is rounded to float32, as it will be in diffusers, and makes up for the rounding of those before it.
  """
  steps = len(grid) - 1
  count = steps * every
  t = np.interp(np.arange(1, count + 1) / count, np.arange(steps + 1) / steps, grid.astype(np.float64))
  logsnr = schedule(jnp.asarray(t, jnp.float32))
  targets = 1.0 / (1.0 + np.exp(-np.asarray(logsnr, np.float64)))
  betas, reached = [], 1.0
  for target in targets:
    beta = np.float32(1.0 - target / reached)
    betas.append(float(beta))
    reached *= float(np.float32(1.0) - beta)
  discrete = Discrete(num_timesteps=count, trained_betas=tuple(betas))
  _check_noise(discrete.alpha_bar[every - 1 :: every], targets[every - 1 :: every])
  return discrete, logsnr


def _check_noise(found: np.ndarray, wanted: np.ndarray) -> None:
  """Raises ValueError if alpha or sigma, computed from float32 alpha^2 as in diffusers, differ from those `wanted`."""
  held = np.float32(found).astype(np.float64)
  apart = np.maximum(
    np.abs(np.sqrt(held) - np.sqrt(wanted)), np.abs(np.sqrt(1.0 - held) - np.sqrt(1.0 - wanted))
  )
  if apart.max() > NOISE_TOLERANCE:
    k = int(apart.argmax())
    raise ValueError(
      f'alphas_cumprod, float32 in diffusers, misses the noise level of step {k + 1} of {len(wanted)} by {apart[k]:.1e}'
    )


def _converted(params: Params, levels: int, resample_in_resnets: bool) -> dict[str, Any]:
  """Converts parameters of `UNet` to those of `UNet2D`, without the table of `time_proj`."""
  flat = traverse_util.flatten_dict(params)
  found: dict[tuple[str, ...], np.ndarray] = {}
  for path, leaf in flat.items():
    if path[0] != 'class_emb':
      name = _name(path, levels, resample_in_resnets)
      found[name] = _reshaped(name, np.asarray(leaf))
  if 'class_emb' in params:  # the embedding of a UNet2DModel has no bias
    bias = ('time_embedding.linear_2', 'bias')
    found[bias] = found[bias] + np.asarray(params['class_emb']['bias'])
    found['class_embedding', 'kernel'] = np.asarray(params['class_emb']['kernel'])
  tree: dict[str, Any] = traverse_util.unflatten_dict(found)
  return tree


def _name(path: tuple[str, ...], levels: int, resample_in_resnets: bool) -> tuple[str, ...]:
  """Returns the name of a parameter: ('down_0.block_1', 'conv1', 'kernel') is ('down_blocks.0.resnets.1', 'conv1', 'kernel')."""
  module, *inner = path
  if module in _OUTSIDE:
    return (_OUTSIDE[module], *inner)
  place, part = module.split('.')
  if place == 'mid':
    block, index = 'mid_block', {'block_1': 0, 'attn_1': 0, 'block_2': 1}[part]
  else:
    way, level = place.split('_')
    block = f'{way}_blocks.{int(level) if way == "down" else levels - 1 - int(level)}'
    index = int(part.rpartition('_')[2]) if '_' in part else 0
  kind = part.partition('_')[0]
  if kind == 'attn':
    return (f'{block}.attentions.{index}', _ATTENTION[inner[0]], *inner[1:])
  if kind == 'block':
    return (f'{block}.resnets.{index}', _RESNET.get(inner[0], inner[0]), *inner[1:])
  name = f'{block}.{kind}rs.0'  # downsample or upsample
  if not resample_in_resnets:
    return (f'{name}.conv', *inner)
  return (name, _RESNET.get(inner[0], inner[0]), *inner[1:])


def _reshaped(name: tuple[str, ...], value: np.ndarray) -> np.ndarray:
  """Merges the head axes of attention, and makes a dense layer a 1x1 convolution where UNet2DModel has one."""
  layer, last = name[-2:]
  if layer == 'conv_shortcut' and last == 'kernel':
    return value[None, None]
  if layer in ('to_q', 'to_k', 'to_v'):
    return value.reshape(*value.shape[:-2], -1)
  if layer == 'to_out.0' and last == 'kernel':
    return value.reshape(-1, value.shape[-1])
  return value
