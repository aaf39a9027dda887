"""The U-Net of the papers, as a linen module.

Module names follow the parameter tree of the released checkpoints, so that those load leaf by leaf.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.config import FRACTION, POSITIVE, key
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.checks import check_choices, check_sides
from diffusion_distillation.networks.conditioning import Cond, Conditioning, conditions
from diffusion_distillation.networks.denoiser import BOTTLENECK, ENCODED, INNERMOST
from diffusion_distillation.networks.layers import (
  ATTENTION_KERNELS,
  Dense,
  Dropout,
  GroupNorm,
  HalvedDense,
  add_weight,
  attention,
)


def inverse_cosine(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """arctan(exp(-logsnr / 2)) / (pi / 2), which is t itself under the unclipped cosine schedule."""
  del schedule
  return jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -20.0, 20.0))) / (0.5 * math.pi)


def linear(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """logsnr itself, [-10, 10] scaled to [0, 1]."""
  del schedule
  return (logsnr + 10.0) / 20.0


def sigmoid(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """alpha^2."""
  del schedule
  return jax.nn.sigmoid(logsnr)


def c_noise(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """EDM's c_noise (Karras et al. 2022, Table 1), a quarter of log(sigma / alpha), divided by 1000, by which the embedding
  multiplies it: the angles are c_noise times the frequencies, as in EDM's networks."""
  del schedule
  return -0.125e-3 * logsnr


def edm(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """c_noise itself, so that the angles are 1000 times EDM's; for models that were trained with it."""
  del schedule
  return -0.125 * logsnr


def schedule_time(logsnr: jax.Array, schedule: Schedule | None = None) -> jax.Array:
  """The schedule's own t, which the embedding multiplies by 1000: DDPM's timestep, including fractions of a step."""
  if schedule is None:
    raise ValueError("time_input='t' needs the schedule of the network")
  return schedule.inverse(logsnr)


DTYPES = {'float32': None, 'bfloat16': jnp.bfloat16}  # None: the dtype of the input and the parameters
TIME_INPUTS = {
  'inv_cos': inverse_cosine,
  'linear': linear,
  'sigmoid': sigmoid,
  'c_noise': c_noise,
  'edm': edm,
  't': schedule_time,
}


@dataclasses.dataclass(frozen=True)
class UNetSection:
  """The hyper-parameters of a U-Net."""

  ch: int = key(128, 'Number of channels at the highest resolution.', POSITIVE)
  emb_ch: int = key(512, 'Width of the embedding of time and class.', POSITIVE)
  ch_mult: tuple[int, ...] = key(
    (1, 2, 2),
    'Number of channels per resolution, from the highest resolution to the lowest, in multiples of `model.ch`.',
    POSITIVE,
  )
  num_res_blocks: int = key(2, 'Number of residual blocks per resolution.', POSITIVE)
  attn_resolutions: tuple[int, ...] = key(
    (8,), 'Heights of the feature maps at which every residual block is followed by self-attention.'
  )
  num_heads: int | None = key(
    None,
    'Number of attention heads. Set this or `model.head_dim`, not both; if neither is set, there is one head.',
    POSITIVE,
  )
  head_dim: int | None = key(None, 'Number of channels per attention head.', POSITIVE)
  num_groups: int = key(
    32,
    'Number of groups of every GroupNorm; must divide the number of channels at every resolution.',
    POSITIVE,
  )
  dropout: float = key(
    0.0,
    'Dropout rate inside residual blocks during base training. Teachers and students have no dropout.',
    FRACTION,
  )
  time_input: str = key(
    'inv_cos',
    'Function of logsnr that the network receives as time: the t of the cosine schedule, logsnr itself, its sigmoid, '
    "EDM's c_noise, 1000 times that (`edm`, for models that were trained with it), or the t of the run's own schedule.",
    choices=TIME_INPUTS,
  )
  resblock_resample: bool = key(
    True, 'Whether residual blocks do the down- and upsampling, instead of separate convolutions.'
  )


def time_embedding(u: jax.Array, dim: int) -> jax.Array:
  """Returns sinusoids of 1000 times the time input `u` (B,): (B, dim), sines first.

  The frequencies range from 1 to 1e-4 inclusive, as in the papers' networks and in EDM's DDPM++, which also has this order.
  EDM's ADM leaves out the last frequency, with (1e-4)^(k / half), and has the cosines first.
  """
  half = dim // 2
  frequencies = jnp.exp(-jnp.arange(half) * (math.log(10000.0) / (half - 1)))
  angles = 1000.0 * u[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def downsample(h: jax.Array) -> jax.Array:
  """Averages 2x2 pixels: (B, H, W, C) to (B, H/2, W/2, C)."""
  return nn.avg_pool(h, (2, 2), (2, 2))


def upsample(h: jax.Array) -> jax.Array:
  """Repeats each pixel 2x2: (B, H, W, C) to (B, 2H, 2W, C)."""
  return jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)


RESAMPLE = {'down': downsample, 'up': upsample, None: lambda h: h}


class ResBlock(nn.Module):
  """Residual block with scale-shift GroupNorm and optional resampling inside it (BigGAN)."""

  out_ch: int
  num_groups: int
  dropout: float
  resample: str | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
    resample = RESAMPLE[self.resample]
    dtype = self.dtype
    h = resample(nn.swish(GroupNorm(self.num_groups, dtype, name='norm1')(x)))
    h = nn.Conv(self.out_ch, (3, 3), dtype=dtype, name='conv1')(h)
    scale, shift = HalvedDense(self.out_ch, dtype, name='temb_proj')(nn.swish(emb))
    h = nn.swish(GroupNorm(self.num_groups, dtype, name='norm2')(h, scale, shift))
    h = Dropout(self.dropout)(h, deterministic)
    zeros = nn.initializers.zeros
    h = nn.Conv(self.out_ch, (3, 3), kernel_init=zeros, dtype=dtype, name='conv2')(h)
    shortcut = resample(x)
    if x.shape[-1] != self.out_ch:
      shortcut = Dense(self.out_ch, dtype=dtype, name='nin_shortcut')(shortcut)
    return shortcut + h


class AttnBlock(nn.Module):
  """Self-attention over all pixels; one head unless `num_heads` or `head_dim` says otherwise."""

  num_groups: int
  num_heads: int | None
  head_dim: int | None
  dtype: Any = None
  kernel: str = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, ch = x.shape
    num_heads = self.num_heads or ch // (self.head_dim or ch)
    features = (num_heads, ch // num_heads)
    dtype = self.dtype
    h = GroupNorm(self.num_groups, dtype, name='norm')(x).reshape(-1, ch)
    q, k, v = (nn.DenseGeneral(features, dtype=dtype, name=name)(h) for name in ('q', 'k', 'v'))
    q, k, v = (part.reshape(batch, height * width, *features) for part in (q, k, v))
    h = attention(q, k, v, self.kernel).reshape(-1, *features)
    zeros = nn.initializers.zeros
    h = nn.DenseGeneral(ch, axis=(-2, -1), kernel_init=zeros, dtype=dtype, name='proj_out')(h)
    return x + h.reshape(x.shape)


class UNet(nn.Module):
  """Maps (z, logsnr, cond) to an output of `out_ch` channels; see `denoiser.Network`.

  Attributes:
    out_ch: channels of the output.
    ch: base number of channels; level i has ch * ch_mult[i] channels.
    emb_ch: width of the time and class embedding.
    ch_mult: one factor per level.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attn_resolutions: heights at which each block is followed by attention.
    num_heads, head_dim: attention heads, by number or by size; at most one of them.
    num_groups: groups of every GroupNorm; must divide every width.
    dropout: dropout rate inside residual blocks.
    num_classes: number of classes; 0 for an unconditional network.
    guidance: (low, high), the weights of guidance that the network takes as an input; () for no such input.
    time_input: time input of the network: 'inv_cos', 'linear' (in logsnr), 'sigmoid' (alpha^2), 'c_noise' (EDM), 'edm'
      (1000 times c_noise), or 't', the schedule's time.
    resblock_resample: whether to resample inside residual blocks instead of by separate convolutions.
    dtype: dtype of activations, 'float32' or 'bfloat16'; parameters, the embedding of time and class, and the output stay
      float32, as do the statistics of norms and the softmax of attention.
    remat: whether each block's activations are recomputed in the backward pass instead of being stored.
    attention: attention kernel, a name in `layers.ATTENTION_KERNELS`.
    schedule: t to logsnr, for the time input 't'.
  """

  Section = UNetSection

  out_ch: int
  ch: int
  emb_ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...] = ()
  num_heads: int | None = None
  head_dim: int | None = None
  num_groups: int = 32
  dropout: float = 0.0
  num_classes: int = 0
  time_input: str = 'inv_cos'
  resblock_resample: bool = True
  dtype: str = 'float32'
  remat: bool = False
  attention: str = 'xla'
  guidance: tuple[float, ...] = ()
  schedule: Schedule | None = None

  @property
  def conditioning(self) -> Conditioning:
    """The class of the image, as `label`, if there are classes, and the weight of guidance, if it is an input."""
    return conditions(self.num_classes, self.guidance)

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, unless the network accepts images of shape (H, W, C)."""
    check_choices(
      {
        'dtype': (self.dtype, DTYPES),
        'time_input': (self.time_input, TIME_INPUTS),
        'attention': (self.attention, ATTENTION_KERNELS),
      }
    )
    check_sides(image_shape, len(self.ch_mult), 'ch_mult')
    if self.time_input == 't' and self.schedule is None:
      raise ValueError("time_input='t' needs the schedule of the network")
    for ch in (self.ch * mult for mult in self.ch_mult):
      if ch % self.num_groups:
        raise ValueError(f'num_groups={self.num_groups} does not divide a width of {ch} channels')
      if ch % (self.num_heads or self.head_dim or 1):
        raise ValueError(f'attention heads do not divide a width of {ch} channels')
    if self.num_heads and self.head_dim:
      raise ValueError('set num_heads or head_dim, not both')
    if self.ch % 2 or self.ch < 4:
      raise ValueError(f'ch={self.ch} must be even and at least 4: half sines, half cosines')

  def _res_block(self, ch: int, name: str, way: str | None = None) -> Callable[..., jax.Array]:
    cls = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
    return cls(ch, self.num_groups, self.dropout, way, DTYPES[self.dtype], name=name)

  def _attention(self, name: str) -> Callable[..., jax.Array]:
    cls = nn.remat(AttnBlock) if self.remat else AttnBlock
    dtype = DTYPES[self.dtype]
    return cls(self.num_groups, self.num_heads, self.head_dim, dtype, self.attention, name=name)

  def _resample(self, h: jax.Array, emb: jax.Array, way: str, name: str, det: bool) -> jax.Array:
    ch, dtype = h.shape[-1], DTYPES[self.dtype]
    if self.resblock_resample:
      return self._res_block(ch, name, way)(h, emb, det)
    if way == 'down':
      return nn.Conv(ch, (3, 3), strides=2, dtype=dtype, name=name)(h)
    return nn.Conv(ch, (3, 3), dtype=dtype, name=name)(upsample(h))

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    logsnr: jax.Array,
    cond: Cond = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,); cond: see `conditioning`. Returns (B, H, W, out_ch)."""
    det, dtype = deterministic, DTYPES[self.dtype]
    emb = time_embedding(TIME_INPUTS[self.time_input](logsnr, self.schedule), self.ch)
    emb = nn.swish(nn.Dense(self.emb_ch, name='dense0')(emb))
    emb = nn.Dense(self.emb_ch, name='dense1')(emb)
    if self.num_classes:
      if cond is None:
        raise ValueError(f'a network with {self.num_classes} classes needs labels')
      one_hot = jax.nn.one_hot(cond['label'], self.num_classes)
      emb = emb + nn.Dense(self.emb_ch, name='class_emb')(one_hot)
    emb = add_weight(emb, self.guidance, cond)

    def block(h: jax.Array, level: int, name: str) -> jax.Array:
      ch = self.ch * self.ch_mult[level]
      h = self._res_block(ch, name)(h, emb, det)
      if h.shape[1] in self.attn_resolutions:
        h = self._attention(name.replace('block', 'attn'))(h)
      return h

    levels = len(self.ch_mult)
    h = nn.Conv(self.ch, (3, 3), dtype=dtype, name='conv_in')(z)
    skips = [h]
    for level in range(levels):
      for b in range(self.num_res_blocks):
        h = block(h, level, f'down_{level}.block_{b}')
        skips.append(h)
      if level < levels - 1:
        h = self._resample(h, emb, 'down', f'down_{level}.downsample', det)
        skips.append(h)

    self.sow(BOTTLENECK, ENCODED, h)
    ch = h.shape[-1]
    h = self._res_block(ch, 'mid.block_1')(h, emb, det)
    h = self._attention('mid.attn_1')(h)
    h = self._res_block(ch, 'mid.block_2')(h, emb, det)
    self.sow(BOTTLENECK, INNERMOST, h)

    for level in reversed(range(levels)):
      for b in range(self.num_res_blocks + 1):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f'up_{level}.block_{b}')
      if level > 0:
        h = self._resample(h, emb, 'up', f'up_{level}.upsample', det)

    h = nn.swish(GroupNorm(self.num_groups, dtype, name='norm_out')(h)).astype(z.dtype)
    return nn.Conv(self.out_ch, (3, 3), kernel_init=nn.initializers.zeros, name='conv_out')(h)
