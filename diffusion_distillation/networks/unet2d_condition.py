"""diffusers' UNet2DConditionModel: the U-Net of Stable Diffusion 1.x and 2.x (Rombach et al. 2022).

Modules have the names of its state dict: `mid_block.attentions.0/transformer_blocks.0/attn2/to_q/kernel` here is
`mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight` there.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.config import POSITIVE, key
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.checks import check_choices, check_sides
from diffusion_distillation.networks.conditioning import Cond, Conditioning, Text, conditions
from diffusion_distillation.networks.denoiser import BOTTLENECK, ENCODED, INNERMOST
from diffusion_distillation.networks.layers import ATTENTION_KERNELS, add_weight
from diffusion_distillation.networks.transformer import Transformer, TransformerStyle
from diffusion_distillation.networks.unet import DTYPES, upsample
from diffusion_distillation.networks.unet2d_blocks import (
  ACTIVATIONS,
  Resnet,
  Style,
  check_blocks,
  check_groups,
  timestep_embedding,
)

# By name of the block: whether its residual blocks are followed by transformers.
DOWN_BLOCKS = {'CrossAttnDownBlock2D': True, 'DownBlock2D': False}
UP_BLOCKS = {'CrossAttnUpBlock2D': True, 'UpBlock2D': False}
MID_BLOCKS = ('UNetMidBlock2DCrossAttn', None)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionSection:
  """The hyper-parameters of a network that is not imported; the files of an imported one take their place."""

  block_out_channels: tuple[int, ...] = key(
    (32, 64),
    '`unet2d_condition`: channels of each level, from the finest to the coarsest; every level after the first halves height '
    'and width.',
    POSITIVE,
  )
  down_block_types: tuple[str, ...] = key(
    ('CrossAttnDownBlock2D',) * 2,
    '`unet2d_condition`: blocks of each level on the way down, with or without attention to the text.',
    choices=DOWN_BLOCKS,
  )
  up_block_types: tuple[str, ...] = key(
    ('CrossAttnUpBlock2D',) * 2,
    '`unet2d_condition`: blocks of each level on the way up, from the coarsest to the finest.',
    choices=UP_BLOCKS,
  )
  layers_per_block: int = key(
    1,
    '`unet2d_condition`: residual blocks per level on the way down; there is one more on the way up.',
    POSITIVE,
  )
  attention_head_dim: int = key(
    4,
    '`unet2d_condition`: number of attention heads, under the name that it has in diffusers.',
    POSITIVE,
  )
  norm_num_groups: int = key(
    8,
    '`unet2d_condition`: groups of every GroupNorm; must divide the channels of every level.',
    POSITIVE,
  )


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
  """Returns a hyper-parameter's value for each level: a tuple as it is, or one value repeated."""
  return tuple(value) if isinstance(value, tuple | list) else (value,) * levels


class UNet2DCondition(nn.Module):
  """Maps (z, logsnr, cond) to an output of `out_ch` channels; see `denoiser.Network`.

  Attributes:
    out_ch: channels of the output.
    block_out_channels: channels of each level, from the finest to the coarsest.
    down_block_types: names in DOWN_BLOCKS, one per level.
    up_block_types: names in UP_BLOCKS, one per level, from the coarsest to the finest.
    mid_block_type: a name in MID_BLOCKS; None for no blocks in the middle.
    layers_per_block: residual blocks per level of the encoder, of all levels or each; the decoder has one more.
    transformer_layers_per_block: transformer blocks after each residual block, of all levels or each.
    attention_head_dim: the number of attention heads, of all levels or each. The name is a mistake of diffusers' that
      its files keep.
    only_cross_attention: whether the first attention of a transformer block also looks at the text, of all levels or each.
    cross_attention_dim: width of the text's embeddings.
    text_length: number of tokens of a text; the weights do not depend on it.
    use_linear_projection: whether transformers are entered and left by a matrix instead of a 1x1 convolution.
    upcast_attention: whether the logits of attention are computed in float32.
    norm_num_groups: groups of every GroupNorm.
    norm_eps: added to the variance of every GroupNorm but those before transformers, which add 1e-6.
    act_fn: activation function of residual blocks, time embedding and output, a name in ACTIVATIONS.
    resnet_time_scale_shift: time conditioning of residual blocks: 'default' adds a shift, 'scale_shift' scales as well.
    downsample_padding: padding of convolutions that halve the resolution: 1 on all sides, or 0, which only pads right and bottom.
    flip_sin_to_cos: whether the time embedding has its cosines first.
    freq_shift: 1 if the lowest frequency of the time embedding is 1e-4, 0 if 1e-4 would be the next one.
    time_embedding_dim: width of the embedding of time and class; None for four times the first level's channels.
    mid_block_scale_factor: divisor of the outputs of the middle's residual blocks.
    center_input_sample: whether the network first maps its input from [0, 1] to [-1, 1].
    dropout: dropout rate inside residual blocks.
    num_classes: number of classes, which `label` selects beside the text; 0 for none.
    guidance: (low, high), the weights of guidance that the network takes as an input; () for no such input.
    dtype: dtype of activations, 'float32' or 'bfloat16'; see `unet.UNet`.
    remat: whether each block's activations are recomputed in the backward pass instead of being stored.
    attention: attention kernel, a name in `layers.ATTENTION_KERNELS`.
    schedule: t to logsnr, in discrete time; the network's time input is the timestep.
  """

  Section = UNet2DConditionSection

  out_ch: int
  block_out_channels: tuple[int, ...]
  down_block_types: tuple[str, ...]
  up_block_types: tuple[str, ...]
  cross_attention_dim: int
  mid_block_type: str | None = 'UNetMidBlock2DCrossAttn'
  layers_per_block: int | tuple[int, ...] = 2
  transformer_layers_per_block: int | tuple[int, ...] = 1
  attention_head_dim: int | tuple[int, ...] = 8
  only_cross_attention: bool | tuple[bool, ...] = False
  text_length: int = 77
  use_linear_projection: bool = False
  upcast_attention: bool = False
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  act_fn: str = 'silu'
  resnet_time_scale_shift: str = 'default'
  downsample_padding: int = 1
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  time_embedding_dim: int | None = None
  mid_block_scale_factor: float = 1.0
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
    """The embedding of the text as `text`, the class if there are classes, and the weight of guidance if it is an input."""
    text = {'text': Text(self.text_length, self.cross_attention_dim)}
    return {**text, **conditions(self.num_classes, self.guidance)}

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, unless the network accepts latents of shape (H, W, C)."""
    if not isinstance(self.schedule, Discrete):
      raise ValueError(
        'a UNet2DConditionModel takes a timestep as input and needs a schedule in discrete time'
      )
    check_choices(
      {
        'dtype': (self.dtype, DTYPES),
        'attention': (self.attention, ATTENTION_KERNELS),
        'act_fn': (self.act_fn, ACTIVATIONS),
        'mid_block_type': (self.mid_block_type, MID_BLOCKS),
        'resnet_time_scale_shift': (self.resnet_time_scale_shift, ('default', 'scale_shift')),
        'downsample_padding': (self.downsample_padding, (0, 1)),
      }
    )
    self._check_levels()
    check_sides(image_shape, len(self.block_out_channels), 'block_out_channels')
    check_groups(self.norm_num_groups, self.block_out_channels)
    attends = self._attends()
    for ch, heads, attending in zip(self.block_out_channels, self._heads(), attends, strict=True):
      if attending and (not heads or ch % heads):
        raise ValueError(
          f'attention_head_dim={heads}, the number of heads, does not divide {ch} channels'
        )

  def _check_levels(self) -> None:
    """Raises ValueError unless all hyper-parameters are those of the same number of levels."""
    levels = len(self.block_out_channels)
    check_blocks('down_block_types', self.down_block_types, DOWN_BLOCKS, levels)
    check_blocks('up_block_types', self.up_block_types, UP_BLOCKS, levels)
    for name in (
      *('layers_per_block', 'transformer_layers_per_block'),
      *('attention_head_dim', 'only_cross_attention'),
    ):
      if len(per_level(getattr(self, name), levels)) != levels:
        raise ValueError(
          f'{name} has {len(getattr(self, name))} entries, but block_out_channels has {levels}'
        )

  def _heads(self) -> tuple[int, ...]:
    return per_level(self.attention_head_dim, len(self.block_out_channels))

  def _attends(self) -> list[bool]:
    """Returns whether each level has transformers, on the way down or up or in the middle."""
    down = [DOWN_BLOCKS[block] for block in self.down_block_types]
    up = [UP_BLOCKS[block] for block in self.up_block_types][::-1]
    found = [one or other for one, other in zip(down, up, strict=True)]
    return [*found[:-1], found[-1] or self.mid_block_type is not None]

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

  def _resnet(self, ch: int, name: str, divisor: float = 1.0) -> Any:
    cls = nn.remat(Resnet, static_argnums=(3,)) if self.remat else Resnet
    return cls(ch, self._style(), None, divisor, name=name)

  def _transformer(self, level: int, name: str, middle: bool = False) -> Any:
    cls = nn.remat(Transformer) if self.remat else Transformer
    levels = len(self.block_out_channels)
    return cls(
      num_heads=self._heads()[level],
      num_layers=per_level(self.transformer_layers_per_block, levels)[level],
      style=TransformerStyle(
        DTYPES[self.dtype], self.attention, self.use_linear_projection, self.upcast_attention
      ),
      resnet_style=self._style(),
      cross_only=not middle and per_level(self.only_cross_attention, levels)[level],
      name=name,
    )

  def _embedding(self, logsnr: jax.Array, cond: Cond) -> jax.Array:
    """Returns the embedding of time, class and weight of guidance, (B, D) float32."""
    assert isinstance(self.schedule, Discrete)
    first, act = self.block_out_channels[0], ACTIVATIONS[self.act_fn]
    width = self.time_embedding_dim or 4 * first
    timestep = self.schedule.timestep(logsnr)
    emb = timestep_embedding(timestep, first, self.flip_sin_to_cos, self.freq_shift)
    emb = act(nn.Dense(width, name='time_embedding.linear_1')(emb))
    emb = nn.Dense(width, name='time_embedding.linear_2')(emb)
    if self.num_classes:
      one_hot = jax.nn.one_hot((cond or {})['label'], self.num_classes)
      emb = emb + nn.Dense(width, use_bias=False, name='class_embedding')(one_hot)
    return add_weight(emb, self.guidance, cond)

  @nn.compact
  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond = None, deterministic: bool = True
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,); cond: `text` (B, T, D). Returns (B, H, W, out_ch)."""
    missing = [key for key in self.conditioning if key not in (cond or {})]
    if missing:
      raise ValueError(f'this network needs cond[{missing[0]!r}]')
    dtype = DTYPES[self.dtype]
    text = jnp.asarray((cond or {})['text'], dtype or z.dtype)
    emb = self._embedding(logsnr, cond)
    levels = len(self.block_out_channels)
    layers = per_level(self.layers_per_block, levels)

    def layer(h: jax.Array, level: int, block: str, i: int, attend: bool) -> jax.Array:
      h = self._resnet(self.block_out_channels[level], f'{block}.resnets.{i}')(h, emb, deterministic)
      return self._transformer(level, f'{block}.attentions.{i}')(h, text) if attend else h

    h = 2.0 * z - 1.0 if self.center_input_sample else z
    h = nn.Conv(self.block_out_channels[0], (3, 3), dtype=dtype, name='conv_in')(h)
    skips = [h]
    for level, ch in enumerate(self.block_out_channels):
      block = f'down_blocks.{level}'
      for i in range(layers[level]):
        h = layer(h, level, block, i, DOWN_BLOCKS[self.down_block_types[level]])
        skips.append(h)
      if level < levels - 1:
        padding = [(self.downsample_padding, 1)] * 2
        name = f'{block}.downsamplers.0.conv'
        h = nn.Conv(ch, (3, 3), strides=2, padding=padding, dtype=dtype, name=name)(h)
        skips.append(h)

    self.sow(BOTTLENECK, ENCODED, h)
    if self.mid_block_type is not None:
      middle = functools.partial(
        self._resnet, self.block_out_channels[-1], divisor=self.mid_block_scale_factor
      )
      h = middle(name='mid_block.resnets.0')(h, emb, deterministic)
      h = self._transformer(levels - 1, 'mid_block.attentions.0', middle=True)(h, text)
      h = middle(name='mid_block.resnets.1')(h, emb, deterministic)
    self.sow(BOTTLENECK, INNERMOST, h)

    for place, level in enumerate(reversed(range(levels))):
      block = f'up_blocks.{place}'
      for i in range(layers[level] + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = layer(h, level, block, i, UP_BLOCKS[self.up_block_types[place]])
      if level > 0:
        ch = self.block_out_channels[level]
        h = nn.Conv(ch, (3, 3), dtype=dtype, name=f'{block}.upsamplers.0.conv')(upsample(h))

    style = self._style()
    h = style.act(style.norm('conv_norm_out')(h)).astype(z.dtype)
    return nn.Conv(self.out_ch, (3, 3), name='conv_out')(h)
