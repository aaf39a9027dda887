"""diffusers' AutoencoderKL: the autoencoder of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G).

Modules have the names of its state dict: `encoder/down_blocks.0.resnets.1/conv1/kernel` here is
`encoder.down_blocks.0.resnets.1.conv1.weight` there.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.checks import check_choices
from diffusion_distillation.networks.unet import DTYPES, upsample
from diffusion_distillation.networks.unet2d_blocks import (
  ACTIVATIONS,
  Attention,
  Resnet,
  Style,
  check_blocks,
  check_groups,
)

DOWN_BLOCKS = ('DownEncoderBlock2D',)
UP_BLOCKS = ('UpDecoderBlock2D',)
_EPSILON = 1e-6  # of every GroupNorm
_LOG_VARIANCE = (-30.0, 20.0)


class Gaussian(NamedTuple):
  """A Gaussian with independent components.

  Attributes:
    mean: (B, h, w, C).
    log_variance: (B, h, w, C), in [-30, 20].
  """

  mean: jax.Array
  log_variance: jax.Array

  def sample(self, rng: jax.Array) -> jax.Array:
    """Draws from the distribution, (B, h, w, C)."""
    noise = jax.random.normal(rng, self.mean.shape, self.mean.dtype)
    return self.mean + jnp.exp(0.5 * self.log_variance) * noise

  def divergence(self) -> jax.Array:
    """Returns the KL divergence from a standard normal distribution, (B,), in nats (Kingma & Welling 2014, appendix B)."""
    parts = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
    return 0.5 * jnp.sum(parts, axis=tuple(range(1, parts.ndim)))


def _out(h: jax.Array, out_ch: int, style: Style) -> jax.Array:
  """Applies the last layers of encoder and decoder, as modules of the caller; SiLU, whatever the activation of the blocks is."""
  h = nn.silu(style.norm('conv_norm_out')(h))
  return nn.Conv(out_ch, (3, 3), dtype=style.dtype, name='conv_out')(h)


def _middle(h: jax.Array, style: Style, attend: bool) -> jax.Array:
  """Applies the blocks of the lowest resolution, as modules of the caller."""
  ch = h.shape[-1]
  h = Resnet(ch, style, name='mid_block.resnets.0')(h, None, True)
  if attend:
    h = Attention(ch, style, style.num_groups, name='mid_block.attentions.0')(h)
  return Resnet(ch, style, name='mid_block.resnets.1')(h, None, True)


class Encoder(nn.Module):
  """Maps images (B, H, W, C) in [-1, 1] to activations (B, h, w, out_ch)."""

  out_ch: int
  block_out_channels: tuple[int, ...]
  layers_per_block: int
  style: Style
  attend: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    style, dtype = self.style, self.style.dtype
    h = nn.Conv(self.block_out_channels[0], (3, 3), dtype=dtype, name='conv_in')(x)
    for level, ch in enumerate(self.block_out_channels):
      block = f'down_blocks.{level}'
      for i in range(self.layers_per_block):
        h = Resnet(ch, style, name=f'{block}.resnets.{i}')(h, None, True)
      if level < len(self.block_out_channels) - 1:
        down = nn.Conv(
          ch, (3, 3), 2, padding=[(0, 1)] * 2, dtype=dtype, name=f'{block}.downsamplers.0.conv'
        )
        h = down(h)
    return _out(_middle(h, style, self.attend), self.out_ch, style)


class Decoder(nn.Module):
  """Maps activations (B, h, w, C) to images (B, H, W, out_ch), about in [-1, 1]."""

  out_ch: int
  block_out_channels: tuple[int, ...]
  layers_per_block: int
  style: Style
  attend: bool

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    style, dtype, levels = self.style, self.style.dtype, len(self.block_out_channels)
    h = nn.Conv(self.block_out_channels[-1], (3, 3), dtype=dtype, name='conv_in')(z)
    h = _middle(h, style, self.attend)
    for place, ch in enumerate(reversed(self.block_out_channels)):
      block = f'up_blocks.{place}'
      for i in range(self.layers_per_block + 1):
        h = Resnet(ch, style, name=f'{block}.resnets.{i}')(h, None, True)
      if place < levels - 1:
        h = nn.Conv(ch, (3, 3), dtype=dtype, name=f'{block}.upsamplers.0.conv')(upsample(h))
    return _out(h, self.out_ch, style)


class AutoencoderKL(nn.Module):
  """Images to Gaussians of latents, and latents to images.

  Latents here are the autoencoder's own; what a diffusion model works on is (latent - shift_factor) scaling_factor.

  Attributes:
    in_channels: channels of the images.
    out_channels: channels of the decoded images.
    latent_channels: channels of the latents.
    block_out_channels: channels of each level, from the finest to the coarsest.
    down_block_types: names in DOWN_BLOCKS, one per level.
    up_block_types: names in UP_BLOCKS, one per level.
    layers_per_block: residual blocks per level of the encoder; the decoder has one more.
    act_fn: activation function of residual blocks, a name in `unet2d_blocks.ACTIVATIONS`; the outputs use SiLU.
    norm_num_groups: groups of every GroupNorm.
    mid_block_add_attention: whether there is attention at the lowest resolution.
    use_quant_conv: whether the encoder is followed by a 1x1 convolution.
    use_post_quant_conv: whether the decoder is preceded by a 1x1 convolution.
    scaling_factor: latents of diffusion models are multiplied by this, which makes their variance about 1.
    shift_factor: latents of diffusion models are reduced by this first.
    dtype: dtype of activations, 'float32' or 'bfloat16'.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (64,)
  down_block_types: tuple[str, ...] = ('DownEncoderBlock2D',)
  up_block_types: tuple[str, ...] = ('UpDecoderBlock2D',)
  layers_per_block: int = 1
  act_fn: str = 'silu'
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  dtype: str = 'float32'

  @property
  def factor(self) -> int:
    """The ratio of the sides of images and latents."""
    return int(2 ** (len(self.block_out_channels) - 1))

  def check(self) -> None:
    """Raises ValueError, saying what to change, if the hyper-parameters describe no autoencoder."""
    check_choices({'dtype': (self.dtype, DTYPES), 'act_fn': (self.act_fn, ACTIVATIONS)})
    levels = len(self.block_out_channels)
    check_blocks('down_block_types', self.down_block_types, DOWN_BLOCKS, levels)
    check_blocks('up_block_types', self.up_block_types, UP_BLOCKS, levels)
    check_groups(self.norm_num_groups, self.block_out_channels)
    if not self.scaling_factor > 0.0:
      raise ValueError(f'scaling_factor={self.scaling_factor} must be positive')

  def setup(self) -> None:
    """Creates encoder and decoder; linen calls this."""
    dtype = DTYPES[self.dtype]
    style = Style(
      num_groups=self.norm_num_groups,
      epsilon=_EPSILON,
      activation=self.act_fn,
      scale_shift=False,
      dropout=0.0,
      dtype=dtype,
      kernel='xla',
    )
    shared: tuple[Any, ...] = (
      *(self.block_out_channels, self.layers_per_block),
      *(style, self.mid_block_add_attention),
    )
    channels = self.latent_channels
    self.encoder = Encoder(2 * channels, *shared)
    self.decoder = Decoder(self.out_channels, *shared)
    if self.use_quant_conv:
      self.quant_conv = nn.Conv(2 * channels, (1, 1), dtype=dtype)
    if self.use_post_quant_conv:
      self.post_quant_conv = nn.Conv(channels, (1, 1), dtype=dtype)

  def encode(self, image: jax.Array) -> Gaussian:
    """Returns the distribution of the latents (B, h, w, latent_channels) of images (B, H, W, C) in [-1, 1]."""
    h = self.encoder(image)
    h = self.quant_conv(h) if self.use_quant_conv else h
    mean, log_variance = jnp.split(h.astype(image.dtype), 2, axis=-1)
    return Gaussian(mean, jnp.clip(log_variance, *_LOG_VARIANCE))

  def decode(self, latent: jax.Array) -> jax.Array:
    """Returns images (B, H, W, out_channels), about in [-1, 1], of latents (B, h, w, latent_channels)."""
    h = self.post_quant_conv(latent) if self.use_post_quant_conv else latent
    return self.decoder(h).astype(latent.dtype)

  def scaled(self, latent: jax.Array) -> jax.Array:
    """Converts latents to what diffusion models work on; the same shape."""
    return (latent - (self.shift_factor or 0.0)) * self.scaling_factor

  def unscaled(self, x: jax.Array) -> jax.Array:
    """Converts what diffusion models work on to latents; the inverse of `scaled`."""
    return x / self.scaling_factor + (self.shift_factor or 0.0)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Decodes the mean of the latents of images (B, H, W, C); the same shape. Calls all layers, so it serves to initialize."""
    return self.decode(self.encode(image).mean)
