"""The transformer blocks of diffusers' UNet2DConditionModel, in which pixels attend to each other and to a text.

Modules have the names of its state dict; see `unet2d_condition`.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.layers import Dense, HalvedDense, attention
from diffusion_distillation.networks.unet2d import Style

_EPSILON = 1e-6  # of the group norm before the blocks, whatever that of the residual blocks is
_WIDEST_FUSED = 128  # channels of a head that the fused kernel of attention takes


@dataclasses.dataclass(frozen=True)
class TransformerStyle:
  """The hyper-parameters that the transformers of a network share; see `UNet2DCondition`."""

  dtype: Any
  kernel: str
  linear: bool
  upcast: bool

  def norm(self, name: str) -> nn.LayerNorm:
    """Returns a layer normalization."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name)


class CrossAttention(nn.Module):
  """Attention of tokens to `context`, or to themselves (Vaswani et al. 2017)."""

  num_heads: int
  style: TransformerStyle

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    """x: (B, N, C); context: (B, T, D) or None. Returns (B, N, C)."""
    batch, tokens, ch = x.shape
    dense = functools.partial(Dense, ch, dtype=self.style.dtype)
    source = x if context is None else context
    projected = (
      dense(use_bias=False, name=f'to_{name}')(h)
      for name, h in zip('qkv', (x, source, source), strict=True)
    )
    q, k, v = (h.reshape(batch, -1, self.num_heads, ch // self.num_heads) for h in projected)
    if self.style.upcast:
      q, k = q.astype(jnp.float32), k.astype(jnp.float32)
      h = attention(q, k, v, 'xla')  # the fused kernel wants one dtype
    else:  # attention to a text is cheap, and the fused kernel takes no wider heads
      fused = context is None and q.shape[-1] <= _WIDEST_FUSED
      h = attention(q, k, v, self.style.kernel if fused else 'xla')
    return dense(name='to_out.0')(h.reshape(batch, tokens, ch))


class TransformerBlock(nn.Module):
  """Self-attention (or, with `cross_only`, cross-attention twice), cross-attention, and a gated MLP (Shazeer 2020, GEGLU)."""

  num_heads: int
  style: TransformerStyle
  cross_only: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    """x: (B, N, C); text: (B, T, D). Returns (B, N, C)."""
    style, ch = self.style, x.shape[-1]
    attend = functools.partial(CrossAttention, self.num_heads, style)
    x = x + attend(name='attn1')(style.norm('norm1')(x), text if self.cross_only else None)
    x = x + attend(name='attn2')(style.norm('norm2')(x), text)
    h, gate = HalvedDense(4 * ch, dtype=style.dtype, name='ff.net.0.proj')(style.norm('norm3')(x))
    h = h * nn.gelu(gate, approximate=False)
    return x + Dense(ch, dtype=style.dtype, name='ff.net.2')(h)


class Transformer(nn.Module):
  """diffusers' Transformer2DModel: transformer blocks over all pixels, with a residual connection around them."""

  num_heads: int
  num_layers: int
  style: TransformerStyle
  resnet_style: Style
  cross_only: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    """x: (B, H, W, C); text: (B, T, D). Returns (B, H, W, C)."""
    batch, height, width, ch = x.shape
    style = self.style
    norm = dataclasses.replace(self.resnet_style, epsilon=_EPSILON).norm('norm')

    def project(name: str, h: jax.Array) -> jax.Array:
      if style.linear:
        return Dense(ch, dtype=style.dtype, name=name)(h)
      return nn.Conv(ch, (1, 1), dtype=style.dtype, name=name)(h)

    h = project('proj_in', norm(x)).reshape(batch, height * width, ch)
    for i in range(self.num_layers):
      name = f'transformer_blocks.{i}'
      h = TransformerBlock(self.num_heads, style, self.cross_only, name=name)(h, text)
    return x + project('proj_out', h.reshape(x.shape))
