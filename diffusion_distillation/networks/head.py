"""Heads of a discriminator, which map a network's activations to one logit per example."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.denoiser import ENCODED, INNERMOST


class Head(nn.Module):
  """Maps innermost activations (B, h, w, c) to logits (B,), which are positive for images classified as real."""

  place: ClassVar[str] = INNERMOST

  @staticmethod
  def check(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless activations of `shape` (h, w, c) go through it."""
    if shape[-1] % 8:
      raise ValueError(
        f'its number of innermost channels must be divisible by 8; the model has {shape[-1]}'
      )

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    width = h.shape[-1]
    # At least two channels per group: normalizing a single channel discards its magnitude.
    groups = min(8, width // 2)
    for k in range(2):
      h = nn.Conv(width, (3, 3), name=f'conv{k}')(h)
      h = nn.swish(nn.GroupNorm(groups, name=f'norm{k}')(h))
    return nn.Dense(1, name='logit')(jnp.mean(h, (1, 2)))[:, 0]


class StridedHead(nn.Module):
  """The head of DMD2's code (Yin et al. 2024): maps activations after the encoder, (B, 8, 8, c), to logits (B,).

  Larger activations give logits at several positions, which are averaged. There are 32 groups, or at most one for every
  two channels: after the second convolution of 8x8 activations, a group of one channel would contain a single number, which
  would be normalized to 0.
  """

  place: ClassVar[str] = ENCODED

  @staticmethod
  def check(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless activations of `shape` (h, w, c) go through it."""
    height, width, channels = shape
    if min(height, width) < 8:
      raise ValueError(
        f'it needs activations of at least 8x8 after the encoder, but the model has {height}x{width}: choose '
        'gan_head=pooled, or a network with fewer levels'
      )
    if channels < 4 or channels % min(32, channels // 2):
      raise ValueError(
        f'32 groups, or half as many as channels, must divide the channels; the model has {channels}'
      )

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    width = h.shape[-1]
    groups = min(32, width // 2)
    h = nn.Conv(width, (4, 4), strides=2, padding=1, name='conv0')(h)
    h = nn.swish(nn.GroupNorm(groups, name='norm0')(h))
    h = nn.Conv(width, (4, 4), strides=4, padding=0, name='conv1')(h)
    h = nn.swish(nn.GroupNorm(groups, name='norm1')(h))
    return jnp.mean(nn.Conv(1, (1, 1), name='logit')(h), (1, 2, 3))


HEADS: dict[str, type[Head] | type[StridedHead]] = {'pooled': Head, 'strided': StridedHead}
