"""The blocks that diffusers' networks share: residual blocks, self-attention and the embedding of timesteps."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.layers import (
  Dense,
  Dropout,
  GroupNorm,
  HalvedDense,
  attention,
)
from diffusion_distillation.networks.unet import downsample, upsample

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': nn.silu,
  'swish': nn.silu,
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'mish': jax.nn.mish,
}


def timestep_embedding(
  timestep: jax.Array, dim: int, cosines_first: bool, freq_shift: float
) -> jax.Array:
  """Returns sinusoids of `timestep` (B,) at frequencies from 1 to 1e-4, (B, dim); for odd `dim`, the last entry is zero."""
  half = dim // 2
  frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - freq_shift))
  angles = timestep[:, None] * frequencies[None, :]
  halves = [jnp.sin(angles), jnp.cos(angles)]
  found = jnp.concatenate(halves[::-1] if cosines_first else halves, axis=1)
  return jnp.pad(found, ((0, 0), (0, dim % 2)))


def check_blocks(name: str, types: Sequence[str | None], known: Collection[str], levels: int) -> None:
  """Raises ValueError unless there is one known type of blocks for each level; `name` is that of the hyper-parameter."""
  if len(types) != levels:
    raise ValueError(f'{name} has {len(types)} entries, but block_out_channels has {levels}')
  if unknown := [block for block in types if block not in known]:
    raise ValueError(f'{name}: {unknown[0]!r} is not one of {", ".join(known)}')


def check_groups(num_groups: int | None, channels: Sequence[int]) -> None:
  """Raises ValueError unless GroupNorm can divide each of these numbers of channels into `num_groups` groups."""
  if not num_groups or num_groups < 1:
    raise ValueError(f'norm_num_groups={num_groups} must be positive')
  for ch in channels:
    if ch % num_groups:
      raise ValueError(f'norm_num_groups={num_groups} does not divide {ch} channels')


@dataclasses.dataclass(frozen=True)
class Style:
  """The hyper-parameters that all blocks of a network share; see `UNet2D`."""

  num_groups: int
  epsilon: float
  activation: str
  scale_shift: bool
  dropout: float
  dtype: Any
  kernel: str

  def norm(self, name: str, num_groups: int | None = None) -> GroupNorm:
    """Returns a group normalization."""
    return GroupNorm(num_groups or self.num_groups, self.dtype, self.epsilon, shifted=True, name=name)

  def act(self, h: jax.Array) -> jax.Array:
    """Applies the activation function."""
    return ACTIVATIONS[self.activation](h)


class Resnet(nn.Module):
  """Residual block with optional resampling; its output is divided by `divisor`. Without `emb`, it does not depend on the time."""

  out_ch: int
  style: Style
  way: str | None = None
  divisor: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, emb: jax.Array | None, deterministic: bool) -> jax.Array:
    style, dtype = self.style, self.style.dtype
    resample = {'down': downsample, 'up': upsample, None: lambda h: h}[self.way]
    h = resample(style.act(style.norm('norm1')(x)))
    h = nn.Conv(self.out_ch, (3, 3), dtype=dtype, name='conv1')(h)
    if emb is None:
      h = style.norm('norm2')(h)
    elif style.scale_shift:
      scale, shift = HalvedDense(self.out_ch, dtype, name='time_emb_proj')(style.act(emb))
      h = style.norm('norm2')(h, scale, shift)
    else:
      term = Dense(self.out_ch, dtype=dtype, name='time_emb_proj')(style.act(emb))
      h = style.norm('norm2')(h + term[:, None, None])
    h = Dropout(style.dropout)(style.act(h), deterministic)
    h = nn.Conv(self.out_ch, (3, 3), dtype=dtype, name='conv2')(h)
    x = resample(x)
    if x.shape[-1] != self.out_ch:
      x = nn.Conv(self.out_ch, (1, 1), dtype=dtype, name='conv_shortcut')(x)
    return (x + h) / self.divisor


class Attention(nn.Module):
  """Self-attention over all pixels with heads of `head_dim` channels; without a norm if `num_groups` is None."""

  head_dim: int
  style: Style
  num_groups: int | None
  divisor: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, ch = x.shape
    dtype = self.style.dtype
    h = x if self.num_groups is None else self.style.norm('group_norm', self.num_groups)(x)
    h = h.reshape(batch, height * width, ch)
    shape = (batch, height * width, ch // self.head_dim, self.head_dim)
    q, k, v = (Dense(ch, dtype=dtype, name=f'to_{name}')(h).reshape(shape) for name in 'qkv')
    h = attention(q, k, v, self.style.kernel).reshape(batch, height * width, ch)
    h = Dense(ch, dtype=dtype, name='to_out.0')(h)
    return (x + h.reshape(x.shape)) / self.divisor
