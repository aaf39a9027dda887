"""ADM (Dhariwal & Nichol 2021) in the version of Karras et al. (2022), the network of EDM's ImageNet-64 model."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import BOTTLENECK, ENCODED, INNERMOST
from diffusion_distillation.networks.edm_blocks import (
  EdmSection,
  EdmUNet,
  Style,
  num_groups,
  octaves,
  sinusoids,
  uniform,
)
from diffusion_distillation.networks.layers import GroupNorm, add_weight
from diffusion_distillation.networks.unet import DTYPES


class DhariwalUNet(EdmUNet):
  """Maps (z, logsnr, cond) to an output of `out_ch` channels; see `denoiser.Network` and `edm_blocks.EdmUNet`.

  There is one attention head for every 64 channels; layers with fewer channels have no attention.
  """

  Section = EdmSection
  STYLE = Style(
    epsilon=1e-5,
    residual_scale=1.0,
    scale_shift=True,
    project=False,
    head_dim=64,
    init=uniform(1 / 3, 'fan_in', 'uniform'),
    init_last=nn.initializers.zeros,
    init_qkv=uniform(1 / 3, 'fan_in', 'uniform'),
  )

  @property
  def first_ch(self) -> int:
    """Width of the first convolution."""
    return self.ch * self.ch_mult[0]

  @nn.compact
  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond = None, deterministic: bool = True
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,); cond: see `conditioning`. Returns (B, H, W, out_ch)."""
    emb, x, dtype = self._embed(logsnr, cond), self.scaled_input(z, logsnr), DTYPES[self.dtype]
    down, up = self.layers()
    height = x.shape[1]
    h = self.conv(self.first_ch, f'enc.{height}x{height}_conv', dtype=dtype)(x)
    skips = [h]
    for layer in down:
      at = height >> layer.level
      attends = layer.way is None and at in self.attn_resolutions
      h = self.block(layer, at, 'enc', attends)(h, emb, deterministic)
      skips.append(h)
    self.sow(BOTTLENECK, ENCODED, h)
    for layer in up:
      at, joins = height >> layer.level, layer.name.startswith('block')
      if joins:
        h = jnp.concatenate([h, skips.pop()], axis=-1)
      attends = layer.name == 'in0' or (joins and at in self.attn_resolutions)
      h = self.block(layer, at, 'dec', attends)(h, emb, deterministic)
      if layer.name == 'in1':
        self.sow(BOTTLENECK, INNERMOST, h)
    norm = GroupNorm(num_groups(h.shape[-1]), dtype, self.STYLE.epsilon, name='out_norm')
    h = nn.swish(norm(h)).astype(z.dtype)
    out = self.conv(self.out_ch, 'out_conv', self.STYLE.init_last)(h)
    return -out if self.preconditioning == 've' else out

  def _embed(self, logsnr: jax.Array, cond: Cond) -> jax.Array:
    """Returns the embedding of time and class, (B, emb_ch)."""
    sines, cosines = sinusoids(self.noise_input(logsnr), octaves(self.ch // 2, endpoint=False))
    emb = jnp.concatenate([cosines, sines], axis=-1)
    init = self.STYLE.init
    emb = nn.swish(nn.Dense(self.emb_ch, kernel_init=init, name='map_layer0')(emb))
    emb = nn.Dense(self.emb_ch, kernel_init=init, name='map_layer1')(emb)
    if self.num_classes:
      normal = nn.initializers.normal(1.0)
      dense = nn.Dense(self.emb_ch, use_bias=False, kernel_init=normal, name='map_label')
      emb = emb + dense(self.one_hot(cond))
    return nn.swish(add_weight(emb, self.guidance, cond))
