"""DDPM++ and NCSN++ (Song et al. 2021) in the versions of Karras et al. (2022), the networks of EDM's CIFAR-10 models."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import POSITIVE, key
from diffusion_distillation.networks.checks import check_choices
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import BOTTLENECK, ENCODED, INNERMOST
from diffusion_distillation.networks.edm_blocks import (
  MOST_CHANNELS,
  EdmSection,
  EdmUNet,
  Style,
  num_groups,
  octaves,
  resample,
  sinusoids,
  uniform,
)
from diffusion_distillation.networks.layers import Dense, GroupNorm, add_weight
from diffusion_distillation.networks.unet import DTYPES

EMBEDDINGS = ('positional', 'fourier')
ENCODERS = ('standard', 'skip', 'residual')
DECODERS = ('standard', 'skip')
MOST_TAPS = 64
SCALE = 16.0  # standard deviation of random frequencies


@dataclasses.dataclass(frozen=True)
class SongUNetSection(EdmSection):
  """The hyper-parameters that only a SongUNet has."""

  embedding: str = key(
    'positional',
    '`song_unet`: embedding of time: sinusoids of fixed (DDPM++) or random frequencies (NCSN++).',
    choices=EMBEDDINGS,
  )
  noise_mult: int = key(
    1, '`song_unet`: width of the embedding of time in multiples of `model.ch`; 2 for NCSN++.', POSITIVE
  )
  encoder: str = key(
    'standard',
    '`song_unet`: whether a pyramid of the input is added in the encoder, through 1x1 convolutions of the image (`skip`) or '
    'through successive convolutions, one per level (`residual`, NCSN++).',
    choices=ENCODERS,
  )
  decoder: str = key(
    'standard',
    '`song_unet`: whether every level contributes to the output (`skip`), or only the last one.',
    choices=DECODERS,
  )
  resample_filter: tuple[int, ...] = key(
    (1, 1),
    '`song_unet`: taps of the resampling filter, an even number of them; (1, 3, 3, 1) for NCSN++.',
    POSITIVE,
  )


@functools.cache
def random_frequencies(count: int) -> tuple[float, ...]:
  """Returns normal random numbers times SCALE, the same ones at each call."""
  numbers = np.random.Generator(np.random.Philox(0)).standard_normal(count)
  return tuple(float(number) for number in (SCALE * numbers).astype(np.float32))


class SongUNet(EdmUNet):
  """Maps (z, logsnr, cond) to an output of `out_ch` channels; see `denoiser.Network` and `edm_blocks.EdmUNet`.

  Attributes:
    embedding: 'positional' or 'fourier'.
    noise_mult: width of the embedding of time in multiples of `ch`, unless `frequencies` says otherwise.
    frequencies: frequencies of 'fourier' per unit of c_noise; empty for `random_frequencies`. They are not trained.
    encoder: 'standard', 'skip' or 'residual'.
    decoder: 'standard' or 'skip'.
    resample_filter: taps of the resampling filter, an even number of them.
  """

  Section = SongUNetSection
  STYLE = Style(
    epsilon=1e-6,
    residual_scale=math.sqrt(0.5),
    scale_shift=False,
    project=True,
    head_dim=None,
    init=uniform(1.0, 'fan_avg', 'uniform'),
    init_last=uniform(1e-10, 'fan_avg', 'uniform'),
    init_qkv=uniform(0.2, 'fan_avg', 'uniform'),
  )

  embedding: str = 'positional'
  noise_mult: int = 1
  frequencies: tuple[float, ...] = ()
  encoder: str = 'standard'
  decoder: str = 'standard'
  resample_filter: tuple[int, ...] = (1, 1)

  @property
  def first_ch(self) -> int:
    """Width of the first convolution."""
    return self.ch

  def check(self, image_shape: tuple[int, ...]) -> None:
    """See `denoiser.Network`."""
    check_choices(
      {
        'embedding': (self.embedding, EMBEDDINGS),
        'encoder': (self.encoder, ENCODERS),
        'decoder': (self.decoder, DECODERS),
      }
    )
    if len(self.resample_filter) % 2 or not sum(self.resample_filter):
      raise ValueError(
        f'resample_filter={self.resample_filter} must have an even number of taps, with a sum other than 0'
      )
    if len(self.resample_filter) > MOST_TAPS:
      raise ValueError(
        f'resample_filter has {len(self.resample_filter)} taps, but at most {MOST_TAPS} are supported'
      )
    if not 0 < self.ch * self.noise_mult <= MOST_CHANNELS:
      raise ValueError(
        f'ch={self.ch} times noise_mult={self.noise_mult} must be from 1 to {MOST_CHANNELS}, the width of the embedding of time'
      )
    super().check(image_shape)

  @nn.compact
  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond = None, deterministic: bool = True
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,); cond: `label` (B,) integers if conditional. Returns (B, H, W, out_ch)."""
    emb, x = self._embed(logsnr, cond), self.scaled_input(z, logsnr)
    dtype, taps = DTYPES[self.dtype], self.resample_filter
    down, up = self.layers()
    aux, height = x, x.shape[1]
    h = self.conv(self.ch, f'enc.{height}x{height}_conv', dtype=dtype)(x)
    skips = [h]
    for layer in down:
      at = height >> layer.level
      attends = layer.way is None and at in self.attn_resolutions
      h = self.block(layer, at, 'enc', attends, taps)(h, emb, deterministic)
      if layer.way and self.encoder != 'standard':
        h, aux = self._join(h, aux, f'enc.{at}x{at}_aux')
      skips.append(h)
    self.sow(BOTTLENECK, ENCODED, h)
    out = None
    for layer in up:
      at, last = height >> layer.level, layer.name == f'block{self.num_res_blocks}'
      if layer.name.startswith('block'):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
      attends = layer.name == 'in0' or (last and at in self.attn_resolutions)
      h = self.block(layer, at, 'dec', attends, taps)(h, emb, deterministic)
      if layer.name == 'in1':
        self.sow(BOTTLENECK, INNERMOST, h)
      if last and (self.decoder == 'skip' or not layer.level):
        auxiliary = self._head(h, f'dec.{at}x{at}_aux', z.dtype)
        out = auxiliary if out is None else auxiliary + resample(out, 'up', taps)
    assert out is not None
    return -out if self.preconditioning == 've' else out

  def _embed(self, logsnr: jax.Array, cond: Cond) -> jax.Array:
    """Returns the embedding of time and class, (B, emb_ch)."""
    frequencies = octaves(self.ch * self.noise_mult // 2, endpoint=True)
    if self.embedding == 'fourier':
      drawn = self.frequencies or random_frequencies(self.ch * self.noise_mult // 2)
      frequencies = np.float32(2.0 * np.pi) * np.array(drawn, np.float32)
    emb = jnp.concatenate(sinusoids(self.noise_input(logsnr), frequencies), axis=-1)
    init = self.STYLE.init
    if self.num_classes:
      label = math.sqrt(self.num_classes) * self.one_hot(cond)
      emb = emb + nn.Dense(emb.shape[-1], kernel_init=init, name='map_label')(label)
    emb = add_weight(emb, self.guidance, cond)
    for name in ('map_layer0', 'map_layer1'):
      emb = nn.swish(nn.Dense(self.emb_ch, kernel_init=init, name=name)(emb))
    return emb

  def _join(self, h: jax.Array, aux: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """Adds the pyramid of the input at the next level to h; returns the sum and the pyramid."""
    ch, dtype, taps, init = h.shape[-1], DTYPES[self.dtype], self.resample_filter, self.STYLE.init
    if self.encoder == 'skip':
      aux = resample(aux, 'down', taps)
      return h + Dense(ch, kernel_init=init, dtype=dtype, name=f'{name}_skip')(aux), aux
    margin = 1 + (len(taps) - 1) // 2
    padding = ((margin, margin), (margin, margin))
    wide = self.conv(ch, f'{name}_residual', padding=padding, dtype=dtype)(aux)
    h = math.sqrt(0.5) * (h + resample(wide, 'down', taps, pad=False))
    return h, h

  def _head(self, h: jax.Array, name: str, dtype: jnp.dtype) -> jax.Array:
    """Returns a level's contribution to the output."""
    norm = GroupNorm(num_groups(h.shape[-1]), DTYPES[self.dtype], 1e-6, name=f'{name}_norm')
    h = nn.swish(norm(h)).astype(dtype)
    return self.conv(self.out_ch, f'{name}_conv', self.STYLE.init_last)(h)
