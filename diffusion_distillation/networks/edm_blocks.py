"""What the networks of Karras et al. (2022) have in common: their blocks, resampling, and what they are told of the noise.

Modules have the names of the released checkpoints: 'enc.32x32_block0' with 'norm0', 'conv0', 'affine' and so on.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import key
from diffusion_distillation.networks.checks import check_choices, check_sides
from diffusion_distillation.networks.conditioning import Classes, Cond, Conditioning
from diffusion_distillation.networks.layers import ATTENTION_KERNELS, Dropout, GroupNorm, attention
from diffusion_distillation.networks.unet import DTYPES, downsample, upsample

PRECONDITIONINGS = ('edm', 'vp', 've')
MOST_CHANNELS = 2**16  # of embeddings
MOST_BLOCKS = 1024  # on the way down
uniform = nn.initializers.variance_scaling


@dataclasses.dataclass(frozen=True)
class EdmSection:
  """What EDM's networks have beside the hyper-parameters that they share with the U-Net."""

  preconditioning: str = key(
    'edm',
    'Input scaling and time input (Karras et al. 2022, Table 1) of the networks `song_unet` and `dhariwal_unet`: those '
    "of EDM, of the VP or of the VE models. A network with output F of EDM's preconditioning has `edm`.",
    choices=PRECONDITIONINGS,
  )


@dataclasses.dataclass(frozen=True)
class Style:
  """In what the blocks of two architectures differ.

  Attributes:
    epsilon: of group norms.
    residual_scale: factor of the sum of shortcut and residual.
    scale_shift: whether the embedding scales and shifts after the second norm, or is added before it.
    project: whether the shortcut of a block that resamples has a 1x1 convolution even if the width stays.
    head_dim: channels of an attention head, at least; None for one head.
    init, init_last, init_qkv: of the weights; of the last convolution of a block and of a network; of attention.
  """

  epsilon: float
  residual_scale: float
  scale_shift: bool
  project: bool
  head_dim: int | None
  init: Callable[..., jax.Array]
  init_last: Callable[..., jax.Array]
  init_qkv: Callable[..., jax.Array]

  def num_heads(self, ch: int) -> int:
    """Heads at a width of `ch`: none, and thus no attention, for a width below `head_dim`."""
    return 1 if self.head_dim is None else ch // self.head_dim


def num_groups(ch: int) -> int:
  """Groups of every group norm: 32, or so many that each has 4 channels."""
  return min(32, ch // 4)


def resample(h: jax.Array, way: str | None, taps: tuple[int, ...], pad: bool = True) -> jax.Array:
  """Halves ('down') or doubles ('up') height and width by a separable filter; `way` None leaves them as they are.

  Args:
    h: (B, H, W, C).
    way: 'down', 'up' or None.
    taps: of the filter, an even number of them; their sum does not matter.
    pad: whether 'down' pads with zeros, so that it halves; else there are only pixels that the filter covers.
  """
  size, ch = len(taps), h.shape[-1]
  if way is None:
    return h
  if taps == (1, 1):
    return downsample(h) if way == 'down' else upsample(h)
  row = np.array(taps, np.float64) / sum(taps)
  kernel = np.outer(row, row)
  margin = (size - 1) // 2 if pad else 0
  strides, dilation, padding = (2, 2), (1, 1), margin
  if way == 'up':
    kernel = 4.0 * kernel[::-1, ::-1]
    strides, dilation, padding = (1, 1), (2, 2), size - 1 - margin
  return jax.lax.conv_general_dilated(
    h,
    jnp.asarray(np.broadcast_to(kernel[:, :, None, None], (size, size, 1, ch)), h.dtype),
    window_strides=strides,
    padding=((padding, padding), (padding, padding)),
    lhs_dilation=dilation,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=ch,
  )


class Block(nn.Module):
  """A residual block with resampling and self-attention where asked.

  Attributes:
    out_ch: width of the output.
    style: see `Style`.
    way: 'down', 'up' or None.
    taps: of the resampling filter.
    attends: whether self-attention over all pixels follows.
    dropout: before the second convolution.
    dtype: of activations.
    kernel: of attention.
  """

  out_ch: int
  style: Style
  way: str | None
  taps: tuple[int, ...]
  attends: bool
  dropout: float
  dtype: Any = None
  kernel: str = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
    """x: (B, H, W, C); emb: (B, E), activated already."""
    style, dtype, ch = self.style, self.dtype, self.out_ch
    h = resample(nn.swish(self._norm(x.shape[-1], 'norm0')(x)), self.way, self.taps)
    h = nn.Conv(ch, (3, 3), kernel_init=style.init, dtype=dtype, name='conv0')(h)
    wide = 2 * ch if style.scale_shift else ch
    told = nn.Dense(wide, kernel_init=style.init, dtype=dtype, name='affine')(emb)
    if style.scale_shift:
      h = self._norm(ch, 'norm1')(h, *jnp.split(told, 2, axis=-1))
    else:
      h = self._norm(ch, 'norm1')(h + told[:, None, None])
    h = Dropout(self.dropout)(nn.swish(h), deterministic)
    h = nn.Conv(ch, (3, 3), kernel_init=style.init_last, dtype=dtype, name='conv1')(h)
    shortcut = resample(x, self.way, self.taps)
    if x.shape[-1] != ch or (self.way and style.project):
      shortcut = nn.Dense(ch, kernel_init=style.init, dtype=dtype, name='skip')(shortcut)
    h = style.residual_scale * (h + shortcut)
    heads = style.num_heads(ch)
    return style.residual_scale * (h + self._attention(h, heads)) if self.attends and heads else h

  def _norm(self, ch: int, name: str) -> GroupNorm:
    return GroupNorm(num_groups(ch), self.dtype, self.style.epsilon, name=name)

  def _attention(self, x: jax.Array, heads: int) -> jax.Array:
    batch, height, width, ch = x.shape
    h = self._norm(ch, 'norm2')(x).reshape(batch, height * width, ch)
    features, init = (3, heads, ch // heads), self.style.init_qkv
    qkv = nn.DenseGeneral(features, kernel_init=init, dtype=self.dtype, name='qkv')(h)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    h = attention(q, k, v, self.kernel).reshape(batch, height * width, ch)
    h = nn.Dense(ch, kernel_init=self.style.init_last, dtype=self.dtype, name='proj')(h)
    return h.reshape(x.shape)


class Layer(NamedTuple):
  """A block of a network.

  Attributes:
    level: 0 for the finest.
    name: 'block0' and so on, 'down', 'up', 'in0', 'in1'.
    in_ch, out_ch: widths; of a block on the way up, the first counts the skip connection.
  """

  level: int
  name: str
  in_ch: int
  out_ch: int

  @property
  def way(self) -> str | None:
    """Of its resampling."""
    return self.name if self.name in ('down', 'up') else None


def layers_of(
  first: int, widths: tuple[int, ...], num_res_blocks: int
) -> tuple[list[Layer], list[Layer]]:
  """The blocks on the way down and on the way up; the latter's 'block's are given the skip connections, last first.

  Args:
    first: width of the first convolution.
    widths: of the levels, the finest first.
    num_res_blocks: a level on the way down; one more on the way up.
  """
  down: list[Layer] = []
  width, skips = first, [first]
  for level, ch in enumerate(widths):
    names = ['down'] if level else []
    for name in [*names, *(f'block{b}' for b in range(num_res_blocks))]:
      down.append(Layer(level, name, width, width if name == 'down' else ch))
      width = down[-1].out_ch
      skips.append(width)
  up: list[Layer] = []
  for level, ch in reversed(list(enumerate(widths))):
    names = ['up'] if level < len(widths) - 1 else ['in0', 'in1']
    up += [Layer(level, name, width, width) for name in names]
    for b in range(num_res_blocks + 1):
      up.append(Layer(level, f'block{b}', width + skips.pop(), ch))
      width = ch
  return down, up


class EdmUNet(nn.Module):
  """Base of the two networks; see `denoiser.Network`.

  Attributes:
    out_ch: channels of the output.
    ch: width of level i is ch * ch_mult[i].
    emb_ch: width of the embedding of time and class.
    ch_mult: one factor a level.
    num_res_blocks: residual blocks a level on the way down; one more on the way up.
    attn_resolutions: heights at which there is attention; in the innermost block it is in any case.
    dropout: rate inside residual blocks.
    num_classes: 0 for an unconditional network.
    preconditioning: 'edm', 'vp' or 've'; see `noise_input`.
    beta_d, beta_min, timesteps: of 'vp': beta rises from beta_min by beta_d, and t = 1 counts as timesteps - 1.
    dtype, remat, attention: as of `unet.UNet`.
  """

  STYLE: ClassVar[Style]

  out_ch: int
  ch: int
  emb_ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...] = ()
  dropout: float = 0.0
  num_classes: int = 0
  preconditioning: str = 'edm'
  beta_d: float = 19.9
  beta_min: float = 0.1
  timesteps: int = 1000
  dtype: str = 'float32'
  remat: bool = False
  attention: str = 'xla'

  @property
  def conditioning(self) -> Conditioning:
    """The class of the image, as `label`, if there are classes."""
    return {'label': Classes(self.num_classes)} if self.num_classes else {}

  def layers(self) -> tuple[list[Layer], list[Layer]]:
    """See `layers_of`."""
    widths = tuple(self.ch * mult for mult in self.ch_mult)
    return layers_of(self.first_ch, widths, self.num_res_blocks)

  @property
  def first_ch(self) -> int:
    """Width of the first convolution."""
    raise NotImplementedError

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, unless images (H, W, C) go through this network."""
    check_choices(
      {
        'dtype': (self.dtype, DTYPES),
        'preconditioning': (self.preconditioning, PRECONDITIONINGS),
        'attention': (self.attention, ATTENTION_KERNELS),
      }
    )
    if min(self.beta_d, self.beta_min) <= 0.0 or self.timesteps < 2:
      raise ValueError(
        f'beta_d={self.beta_d} and beta_min={self.beta_min} must be positive, and timesteps={self.timesteps} at least 2'
      )
    if not 0 < len(self.ch_mult) * max(self.num_res_blocks, 1) <= MOST_BLOCKS:
      raise ValueError(
        f'num_res_blocks={self.num_res_blocks} at {len(self.ch_mult)} levels (ch_mult) must give 1 to {MOST_BLOCKS} blocks'
      )
    if self.emb_ch > MOST_CHANNELS:
      raise ValueError(f'emb_ch={self.emb_ch} must be at most {MOST_CHANNELS}')
    check_sides(image_shape, len(self.ch_mult), 'ch_mult')
    if self.ch % 2 or self.ch < 4:
      raise ValueError(f'ch={self.ch} must be even and at least 4: half sines, half cosines')
    for layer in (layer for way in self.layers() for layer in way):
      for ch in (layer.in_ch, layer.out_ch):
        if ch < 4 or ch % num_groups(ch):
          raise ValueError(
            f'a width of {ch} channels does not divide into {num_groups(ch)} groups of a group norm; change ch or ch_mult'
          )
      at = image_shape[0] >> layer.level
      attends = layer.name == 'in0' or (layer.name.startswith('block') and at in self.attn_resolutions)
      if attends and layer.out_ch % (self.STYLE.num_heads(layer.out_ch) or 1):
        raise ValueError(f'attention heads do not divide a width of {layer.out_ch} channels')

  def noise_input(self, logsnr: jax.Array) -> jax.Array:
    """c_noise (Karras et al. 2022, Table 1), of s = sigma / alpha: (B,).

    EDM: log(s) / 4. VE: log(s / 2). VP: (timesteps - 1) t(s), with the sum 1 + s^2 rounded as the released code does,
    which is what its models were trained with; at the least noise this counts.
    """
    if self.preconditioning == 'edm':
      return -0.125 * logsnr
    if self.preconditioning == 've':
      return -0.5 * logsnr - math.log(2.0)
    integral = jnp.log(1.0 + jnp.exp(-logsnr))
    root = jnp.sqrt(self.beta_min**2 + 2.0 * self.beta_d * integral)
    return (self.timesteps - 1) * ((root - self.beta_min) / self.beta_d)

  def scaled_input(self, z: jax.Array, logsnr: jax.Array) -> jax.Array:
    """c_in y of y = z / alpha (Table 1): y itself for VE; z for VP. EDM's is scaled before it comes here."""
    if self.preconditioning != 've':
      return z
    return z * jnp.sqrt(1.0 + jnp.exp(-logsnr))[:, None, None, None]

  def one_hot(self, cond: Cond) -> jax.Array:
    """The class as (B, num_classes); zeros where it is not told."""
    if cond is None:
      raise ValueError(f'a network with {self.num_classes} classes needs labels')
    return jax.nn.one_hot(cond['label'], self.num_classes)

  def block(
    self, layer: Layer, height: int, part: str, attends: bool, taps: tuple[int, ...] = (1, 1)
  ) -> Callable[..., jax.Array]:
    """The module of a layer, called with (x, emb, deterministic); `height` is that of its output."""
    cls = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
    size = f'{height}x{height}'
    args = (layer.out_ch, self.STYLE, layer.way, taps, attends, self.dropout, DTYPES[self.dtype])
    return cls(*args, self.attention, name=f'{part}.{size}_{layer.name}')

  def conv(self, ch: int, name: str, init: Any = None, **given: Any) -> nn.Conv:
    """A 3x3 convolution."""
    return nn.Conv(ch, (3, 3), kernel_init=init or self.STYLE.init, name=name, **given)


def sinusoids(c_noise: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines of c_noise (B,) times each of the frequencies (F,): (B, F) each."""
  angles = c_noise[:, None] * jnp.asarray(frequencies, c_noise.dtype)[None, :]
  return jnp.sin(angles), jnp.cos(angles)


def octaves(count: int, endpoint: bool) -> np.ndarray:
  """Frequencies from 1 to 1/10000, the latter included if `endpoint`; (count,) float32."""
  exponent = np.arange(count, dtype=np.float32) / np.float32(count - endpoint)
  return np.power(np.float32(1e-4), exponent)
