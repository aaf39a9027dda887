"""diffusers' UNet2DModel: the U-Net of DDPM and of most unconditional and class-conditional models on the hub.

Modules have the names of its state dict: `down_blocks.0.resnets.1/conv1/kernel` here is
`down_blocks.0.resnets.1.conv1.weight` there.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.checks import check_choices, check_sides
from diffusion_distillation.networks.conditioning import Cond, Conditioning, conditions
from diffusion_distillation.networks.denoiser import BOTTLENECK, ENCODED, INNERMOST
from diffusion_distillation.networks.layers import (
  ATTENTION_KERNELS,
  add_weight,
)
from diffusion_distillation.networks.unet import DTYPES, upsample
from diffusion_distillation.networks.unet2d_blocks import (
  ACTIVATIONS,
  Attention,
  Resnet,
  Style,
  check_blocks,
  check_groups,
  timestep_embedding,
)

# By name of the block: whether its residual blocks are followed by attention, and how it resamples unless
# `downsample_type` or `upsample_type` says so.
DOWN_BLOCKS = {
  'DownBlock2D': (False, 'conv'),
  'ResnetDownsampleBlock2D': (False, 'resnet'),
  'AttnDownBlock2D': (True, None),
}
UP_BLOCKS = {
  'UpBlock2D': (False, 'conv'),
  'ResnetUpsampleBlock2D': (False, 'resnet'),
  'AttnUpBlock2D': (True, None),
}
RESAMPLING = ('conv', 'resnet')
TIME_EMBEDDINGS = ('positional', 'learned')


@dataclasses.dataclass(frozen=True)
class UNet2DSection:
  """No keys: the network is described by the files of the model."""


class UNet2D(nn.Module):
  """Maps (z, logsnr, cond) to an output of `out_ch` channels; see `denoiser.Network`.

  Attributes:
    out_ch: channels of the output.
    block_out_channels: channels of each level, from the finest to the coarsest.
    down_block_types: names in DOWN_BLOCKS, one per level.
    up_block_types: names in UP_BLOCKS, one per level, from the coarsest to the finest.
    layers_per_block: residual blocks per level of the encoder; the decoder has one more.
    attention_head_dim: channels per attention head; None for one head.
    norm_num_groups: groups of every GroupNorm.
    norm_eps: added to the variance of every GroupNorm.
    act_fn: activation function of residual blocks, a name in ACTIVATIONS; the embedding and the output use SiLU.
    resnet_time_scale_shift: time conditioning of residual blocks: 'default' adds a shift, 'scale_shift' scales as well.
    downsample_padding: padding of convolutions that halve the resolution: 1 on all sides, or 0, which only pads right and bottom.
    downsample_type, upsample_type: resampling of blocks with attention: 'conv' or 'resnet'.
    flip_sin_to_cos: whether the time embedding has its cosines first.
    freq_shift: 1 if the lowest frequency of the time embedding is 1e-4, 0 if 1e-4 would be the next one.
    time_embedding_dim: width of the embedding of time and class; None for four times the first level's channels.
    time_embedding_type: features of the timestep: 'positional', sinusoids; or 'learned', a row of a table for each timestep,
      where a fractional timestep has the row of the nearest one.
    num_train_timesteps: rows of the table of 'learned'.
    mid_block_scale_factor: divisor of the outputs of the middle blocks.
    add_attention: whether the middle has attention.
    attn_norm_num_groups: groups of the middle attention's norm; None: norm_num_groups, or no norm under 'scale_shift'.
    center_input_sample: whether the network first maps its input from [0, 1] to [-1, 1].
    dropout: dropout rate inside residual blocks.
    num_classes: number of classes; 0 for an unconditional network.
    guidance: (low, high), the weights of guidance that the network takes as an input; () for no such input.
    dtype: dtype of activations, 'float32' or 'bfloat16'; see `unet.UNet`.
    remat: whether each block's activations are recomputed in the backward pass instead of being stored.
    attention: attention kernel, a name in `layers.ATTENTION_KERNELS`.
    schedule: t to logsnr, in discrete time; the network's time input is the timestep.
  """

  Section = UNet2DSection

  out_ch: int
  block_out_channels: tuple[int, ...]
  down_block_types: tuple[str, ...]
  up_block_types: tuple[str, ...]
  layers_per_block: int = 2
  attention_head_dim: int | None = 8
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  act_fn: str = 'silu'
  resnet_time_scale_shift: str = 'default'
  downsample_padding: int = 1
  downsample_type: str = 'conv'
  upsample_type: str = 'conv'
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  time_embedding_dim: int | None = None
  time_embedding_type: str = 'positional'
  num_train_timesteps: int | None = None
  mid_block_scale_factor: float = 1.0
  add_attention: bool = True
  attn_norm_num_groups: int | None = None
  center_input_sample: bool = False
  dropout: float = 0.0
  num_classes: int = 0
  guidance: tuple[float, ...] = ()
  dtype: str = 'float32'
  remat: bool = False
  attention: str = 'xla'
  schedule: Schedule | None = None

  @property
  def conditioning(self) -> Conditioning:
    """The class of the image, as `label`, if there are classes, and the weight of guidance, if it is an input."""
    return conditions(self.num_classes, self.guidance)

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, unless the network accepts images of shape (H, W, C)."""
    if not isinstance(self.schedule, Discrete):
      raise ValueError('a UNet2DModel takes a timestep as input and needs a schedule in discrete time')
    check_choices(
      {
        'dtype': (self.dtype, DTYPES),
        'attention': (self.attention, ATTENTION_KERNELS),
        'act_fn': (self.act_fn, ACTIVATIONS),
        'resnet_time_scale_shift': (self.resnet_time_scale_shift, ('default', 'scale_shift')),
        'downsample_type': (self.downsample_type, RESAMPLING),
        'upsample_type': (self.upsample_type, RESAMPLING),
        'time_embedding_type': (self.time_embedding_type, TIME_EMBEDDINGS),
        'downsample_padding': (self.downsample_padding, (0, 1)),
      }
    )
    if self.time_embedding_type == 'learned':
      rows, timesteps = self.num_train_timesteps or 0, self.schedule.num_timesteps
      if rows < timesteps:
        raise ValueError(
          f'num_train_timesteps={self.num_train_timesteps} is less than the {timesteps} timesteps of the schedule'
        )
    levels = len(self.block_out_channels)
    check_blocks('down_block_types', self.down_block_types, DOWN_BLOCKS, levels)
    check_blocks('up_block_types', self.up_block_types, UP_BLOCKS, levels)
    check_sides(image_shape, levels, 'block_out_channels')
    check_groups(self.norm_num_groups, self.block_out_channels)
    for ch in self._attending():
      if ch % (self.attention_head_dim or ch):
        raise ValueError(f'attention_head_dim={self.attention_head_dim} does not divide {ch} channels')
    if self.add_attention and self.block_out_channels[-1] % (self.attn_norm_num_groups or 1):
      raise ValueError(
        f'attn_norm_num_groups={self.attn_norm_num_groups} does not divide {self.block_out_channels[-1]} channels'
      )

  def _attending(self) -> list[int]:
    """Returns the widths at which there is attention."""
    widths = self.block_out_channels
    down = [ch for ch, block in zip(widths, self.down_block_types, strict=True) if DOWN_BLOCKS[block][0]]
    up = [ch for ch, block in zip(widths[::-1], self.up_block_types, strict=True) if UP_BLOCKS[block][0]]
    return down + up + [widths[-1]] * self.add_attention

  def _style(self) -> Style:
    return Style(
      num_groups=self.norm_num_groups,
      epsilon=self.norm_eps,
      activation=self.act_fn,
      scale_shift=self.resnet_time_scale_shift == 'scale_shift',
      dropout=self.dropout,
      dtype=DTYPES[self.dtype],
      kernel=self.attention,
    )

  def _resnet(self, ch: int, name: str, way: str | None = None, divisor: float = 1.0) -> Any:
    cls = nn.remat(Resnet, static_argnums=(3,)) if self.remat else Resnet
    return cls(ch, self._style(), way, divisor, name=name)

  def _attend(self, ch: int, name: str, num_groups: int | None, divisor: float = 1.0) -> Any:
    cls = nn.remat(Attention) if self.remat else Attention
    return cls(self.attention_head_dim or ch, self._style(), num_groups, divisor, name=name)

  def _embedding(self, logsnr: jax.Array, cond: Cond) -> jax.Array:
    """Returns the embedding of time and class, (B, D) float32."""
    assert isinstance(self.schedule, Discrete)
    first = self.block_out_channels[0]
    width = self.time_embedding_dim or 4 * first
    timestep = self.schedule.timestep(logsnr)
    if self.time_embedding_type == 'learned':
      rows = nn.Embed(self.num_train_timesteps or 0, first, name='time_proj')
      emb = rows(jnp.round(timestep).astype(jnp.int32))
    else:
      emb = timestep_embedding(timestep, first, self.flip_sin_to_cos, self.freq_shift)
    emb = nn.silu(nn.Dense(width, name='time_embedding.linear_1')(emb))
    emb = nn.Dense(width, name='time_embedding.linear_2')(emb)
    if self.num_classes:
      if cond is None:
        raise ValueError(f'a network with {self.num_classes} classes needs labels')
      one_hot = jax.nn.one_hot(cond['label'], self.num_classes)
      emb = emb + nn.Dense(width, use_bias=False, name='class_embedding')(one_hot)
    return add_weight(emb, self.guidance, cond)

  @nn.compact
  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond = None, deterministic: bool = True
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,); cond: see `conditioning`. Returns (B, H, W, out_ch)."""
    det, dtype, style = deterministic, DTYPES[self.dtype], self._style()
    emb = self._embedding(logsnr, cond)
    levels = list(enumerate(self.block_out_channels))

    def layer(h: jax.Array, ch: int, block: str, i: int, attend: bool) -> jax.Array:
      h = self._resnet(ch, f'{block}.resnets.{i}')(h, emb, det)
      return self._attend(ch, f'{block}.attentions.{i}', style.num_groups)(h) if attend else h

    h = 2.0 * z - 1.0 if self.center_input_sample else z
    h = nn.Conv(self.block_out_channels[0], (3, 3), dtype=dtype, name='conv_in')(h)
    skips = [h]
    for level, ch in levels:
      attend, how = DOWN_BLOCKS[self.down_block_types[level]]
      block = f'down_blocks.{level}'
      for i in range(self.layers_per_block):
        h = layer(h, ch, block, i, attend)
        skips.append(h)
      if level < len(levels) - 1:
        name = f'{block}.downsamplers.0'
        if (how or self.downsample_type) == 'resnet':
          h = self._resnet(ch, name, 'down')(h, emb, det)
        else:
          padding = [(self.downsample_padding, 1)] * 2
          h = nn.Conv(ch, (3, 3), strides=2, padding=padding, dtype=dtype, name=f'{name}.conv')(h)
        skips.append(h)

    self.sow(BOTTLENECK, ENCODED, h)
    ch, divisor = self.block_out_channels[-1], self.mid_block_scale_factor
    h = self._resnet(ch, 'mid_block.resnets.0', divisor=divisor)(h, emb, det)
    if self.add_attention:
      groups = self.attn_norm_num_groups or (None if style.scale_shift else style.num_groups)
      h = self._attend(ch, 'mid_block.attentions.0', groups, divisor)(h)
    h = self._resnet(ch, 'mid_block.resnets.1', divisor=divisor)(h, emb, det)
    self.sow(BOTTLENECK, INNERMOST, h)

    for place, (level, ch) in enumerate(reversed(levels)):
      attend, how = UP_BLOCKS[self.up_block_types[place]]
      block = f'up_blocks.{place}'
      for i in range(self.layers_per_block + 1):
        h = layer(jnp.concatenate([h, skips.pop()], axis=-1), ch, block, i, attend)
      if level > 0:
        name = f'{block}.upsamplers.0'
        if (how or self.upsample_type) == 'resnet':
          h = self._resnet(ch, name, 'up')(h, emb, det)
        else:
          h = nn.Conv(ch, (3, 3), dtype=dtype, name=f'{name}.conv')(upsample(h))

    h = nn.silu(style.norm('conv_norm_out')(h)).astype(z.dtype)  # whatever act_fn is
    return nn.Conv(self.out_ch, (3, 3), name='conv_out')(h)
