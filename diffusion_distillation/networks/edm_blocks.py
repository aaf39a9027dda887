"""The common parts of the networks of Karras et al. (2022): blocks, resampling, and noise conditioning.

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
from diffusion_distillation.networks.conditioning import Cond, Conditioning, conditions
from diffusion_distillation.networks.layers import (
  ATTENTION_KERNELS,
  Dense,
  Dropout,
  GroupNorm,
  HalvedDense,
  attention,
)
from diffusion_distillation.networks.unet import DTYPES, downsample, upsample

PRECONDITIONINGS = ('edm', 'vp', 've')
MOST_CHANNELS = 2**16  # of embeddings
MOST_BLOCKS = 1024  # on the way down
uniform = nn.initializers.variance_scaling


@dataclasses.dataclass(frozen=True)
class EdmSection:
  """The hyper-parameters of EDM's networks that the U-Net does not have."""

  preconditioning: str = key(
    'edm',
    'Input scaling and time input (Karras et al. 2022, Table 1) of the networks `song_unet` and `dhariwal_unet`: as in '
    "EDM, or as in the VP or VE models. Networks that predict F of EDM's preconditioning use `edm`.",
    choices=PRECONDITIONINGS,
  )


@dataclasses.dataclass(frozen=True)
class Style:
  """The differences between the blocks of the two architectures.

  Attributes:
    epsilon: epsilon of group norms.
    residual_scale: factor of the sum of shortcut and residual.
    scale_shift: whether the embedding scales and shifts after the second norm instead of being added before it.
    project: whether the shortcut of a resampling block has a 1x1 convolution even if the width does not change.
    head_dim: minimum number of channels per attention head; None for one head.
    init, init_last, init_qkv: initializers of weights in general; of the last convolution of a block or network; of attention.
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
    """Returns the number of heads at a width of `ch`: 0, and thus no attention, for a width below `head_dim`."""
    return 1 if self.head_dim is None else ch // self.head_dim


def num_groups(ch: int) -> int:
  """Returns the number of groups of a group norm: 32, or fewer so that each has at least 4 channels."""
  return min(32, ch // 4)


def resample(h: jax.Array, way: str | None, taps: tuple[int, ...], pad: bool = True) -> jax.Array:
  """Halves ('down') or doubles ('up') height and width with a separable filter; for `way` None, returns h unchanged.

  Args:
    h: (B, H, W, C).
    way: 'down', 'up' or None.
    taps: taps of the filter, an even number of them; they are normalized.
    pad: whether 'down' pads with zeros, so that it halves exactly; else the result has only fully covered pixels.
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
  """A residual block with optional resampling and self-attention.

  Attributes:
    out_ch: width of the output.
    style: see `Style`.
    way: 'down', 'up' or None.
    taps: taps of the resampling filter.
    attends: whether self-attention over all pixels follows.
    dropout: dropout rate before the second convolution.
    dtype: dtype of activations.
    kernel: kernel of attention.
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
    """x: (B, H, W, C); emb: (B, E), already activated."""
    style, dtype, ch = self.style, self.dtype, self.out_ch
    h = resample(nn.swish(self._norm(x.shape[-1], 'norm0')(x)), self.way, self.taps)
    h = nn.Conv(ch, (3, 3), kernel_init=style.init, dtype=dtype, name='conv0')(h)
    if style.scale_shift:
      scale, shift = HalvedDense(ch, dtype, style.init, name='affine')(emb)
      h = self._norm(ch, 'norm1')(h, scale, shift)
    else:
      term = Dense(ch, kernel_init=style.init, dtype=dtype, name='affine')(emb)
      h = self._norm(ch, 'norm1')(h + term[:, None, None])
    h = Dropout(self.dropout)(nn.swish(h), deterministic)
    h = nn.Conv(ch, (3, 3), kernel_init=style.init_last, dtype=dtype, name='conv1')(h)
    shortcut = resample(x, self.way, self.taps)
    if x.shape[-1] != ch or (self.way and style.project):
      shortcut = Dense(ch, kernel_init=style.init, dtype=dtype, name='skip')(shortcut)
    h = style.residual_scale * (h + shortcut)
    heads = style.num_heads(ch)
    return style.residual_scale * (h + self._attention(h, heads)) if self.attends and heads else h

  def _norm(self, ch: int, name: str) -> GroupNorm:
    return GroupNorm(num_groups(ch), self.dtype, self.style.epsilon, name=name)

  def _attention(self, x: jax.Array, heads: int) -> jax.Array:
    batch, height, width, ch = x.shape
    h = self._norm(ch, 'norm2')(x).reshape(-1, ch)
    features, init = (3, heads, ch // heads), self.style.init_qkv
    qkv = nn.DenseGeneral(features, kernel_init=init, dtype=self.dtype, name='qkv')(h)
    q, k, v = jnp.moveaxis(qkv.reshape(batch, height * width, *features), 2, 0)
    project = Dense(ch, kernel_init=self.style.init_last, dtype=self.dtype, name='proj')
    return project(attention(q, k, v, self.kernel).reshape(x.shape))


class Layer(NamedTuple):
  """The description of a block.

  Attributes:
    level: 0 for the finest.
    name: 'block0' and so on, 'down', 'up', 'in0', 'in1'.
    in_ch, out_ch: widths; in the decoder, in_ch includes the skip connection.
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
  """Returns the blocks of the encoder and of the decoder, whose 'block's take the skip connections in reverse order.

  Args:
    first: width of the first convolution.
    widths: widths of the levels, from the finest to the coarsest.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
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
  """Base class of the two networks; see `denoiser.Network`.

  Attributes:
    out_ch: channels of the output.
    ch: base width; level i has ch * ch_mult[i] channels.
    emb_ch: width of the embedding of time and class.
    ch_mult: one factor per level.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    attn_resolutions: heights at which there is attention; the innermost block always has attention.
    dropout: dropout rate inside residual blocks.
    num_classes: number of classes; 0 for an unconditional network.
    guidance: (low, high), the weights of guidance that the network takes as an input; () for no such input.
    preconditioning: 'edm', 'vp' or 've'; see `noise_input`.
    beta_d, beta_min, timesteps: for 'vp': beta rises from beta_min by beta_d, and t = 1 is timestep timesteps - 1.
    dtype, remat, attention: see `unet.UNet`.
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
  guidance: tuple[float, ...] = ()
  preconditioning: str = 'edm'
  beta_d: float = 19.9
  beta_min: float = 0.1
  timesteps: int = 1000
  dtype: str = 'float32'
  remat: bool = False
  attention: str = 'xla'

  @property
  def conditioning(self) -> Conditioning:
    """The class of the image, as `label`, if there are classes, and the weight of guidance, if it is an input."""
    return conditions(self.num_classes, self.guidance)

  def layers(self) -> tuple[list[Layer], list[Layer]]:
    """See `layers_of`."""
    widths = tuple(self.ch * mult for mult in self.ch_mult)
    return layers_of(self.first_ch, widths, self.num_res_blocks)

  @property
  def first_ch(self) -> int:
    """Width of the first convolution."""
    raise NotImplementedError

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, unless the network accepts images of shape (H, W, C)."""
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
    """Returns c_noise (Karras et al. 2022, Table 1) of s = sigma / alpha: (B,).

    EDM: log(s) / 4. VE: log(s / 2). VP: (timesteps - 1) t(s). For VP, the sum 1 + s^2 is rounded as in the released code,
    with which its models were trained; this matters at low noise.
    """
    if self.preconditioning == 'edm':
      return -0.125 * logsnr
    if self.preconditioning == 've':
      return -0.5 * logsnr - math.log(2.0)
    integral = jnp.log(1.0 + jnp.exp(-logsnr))
    root = jnp.sqrt(self.beta_min**2 + 2.0 * self.beta_d * integral)
    return (self.timesteps - 1) * ((root - self.beta_min) / self.beta_d)

  def scaled_input(self, z: jax.Array, logsnr: jax.Array) -> jax.Array:
    """Returns c_in y for y = z / alpha (Table 1): y itself for VE, z for VP. EDM's input is already scaled."""
    if self.preconditioning != 've':
      return z
    return z * jnp.sqrt(1.0 + jnp.exp(-logsnr))[:, None, None, None]

  def one_hot(self, cond: Cond) -> jax.Array:
    """Returns the class as one-hot vectors (B, num_classes); zeros for no class."""
    if cond is None:
      raise ValueError(f'a network with {self.num_classes} classes needs labels')
    return jax.nn.one_hot(cond['label'], self.num_classes)

  def block(
    self, layer: Layer, height: int, part: str, attends: bool, taps: tuple[int, ...] = (1, 1)
  ) -> Callable[..., jax.Array]:
    """Returns the module of a layer, to be called with (x, emb, deterministic); `height` is the height of its output."""
    cls = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
    size = f'{height}x{height}'
    args = (layer.out_ch, self.STYLE, layer.way, taps, attends, self.dropout, DTYPES[self.dtype])
    return cls(*args, self.attention, name=f'{part}.{size}_{layer.name}')

  def conv(self, ch: int, name: str, init: Any = None, **given: Any) -> nn.Conv:
    """A 3x3 convolution."""
    return nn.Conv(ch, (3, 3), kernel_init=init or self.STYLE.init, name=name, **given)


def sinusoids(c_noise: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Returns sines and cosines of c_noise (B,) times each of the frequencies (F,), each (B, F)."""
  angles = c_noise[:, None] * jnp.asarray(frequencies, c_noise.dtype)[None, :]
  return jnp.sin(angles), jnp.cos(angles)


def octaves(count: int, endpoint: bool) -> np.ndarray:
  """Returns frequencies from 1 to 1/10000, which is included if `endpoint`; (count,) float32."""
  exponent = np.arange(count, dtype=np.float32) / np.float32(count - endpoint)
  return np.power(np.float32(1e-4), exponent)
