"""The image encoders of CLIP (Radford et al. 2021), as transformers' CLIPModel stores them.

Modules have the names of its state dict without `vision_model.`: `encoder.layers.0/self_attn.q_proj/kernel` here is
`vision_model.encoder.layers.0.self_attn.q_proj.weight` there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.checks import check_choices
from diffusion_distillation.networks.clip_text import ACTIVATIONS, Layer
from diffusion_distillation.networks.unet import DTYPES


class CLIPVision(nn.Module):
  """Maps images to embeddings in the space that CLIP shares between images and texts.

  Attributes:
    projection_dim: width P of this space; 0 to leave out the projection.
    hidden_size: width D of the transformer.
    intermediate_size: width of the hidden layer of each MLP.
    num_hidden_layers: number of transformer layers.
    num_attention_heads: attention heads of each layer.
    num_channels: channels of the images.
    image_size: height and width of the images in pixels.
    patch_size: height and width of the patches that become tokens, in pixels.
    hidden_act: activation function of the MLPs, a name in ACTIVATIONS.
    layer_norm_eps: added to the variance of every layer norm.
    dtype: dtype of activations, 'float32' or 'bfloat16'.
  """

  projection_dim: int = 512
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  dtype: str = 'float32'

  def check(self) -> None:
    """Raises ValueError, saying what to change, if the hyper-parameters describe no image encoder."""
    check_choices({'dtype': (self.dtype, DTYPES), 'hidden_act': (self.hidden_act, ACTIVATIONS)})
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f'num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}'
      )
    if self.patch_size > self.image_size:
      raise ValueError(f'patch_size={self.patch_size} is larger than image_size={self.image_size}')

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """images: (B, H, W, C), normalized as `preprocessor_config.json` says; returns (B, P), or (B, D) without projection."""
    dtype, size, side = DTYPES[self.dtype], self.patch_size, self.image_size // self.patch_size
    patches = nn.Conv(
      *(self.hidden_size, (size, size), size),
      padding='VALID',
      use_bias=False,
      dtype=dtype,
      name='embeddings.patch_embedding',
    )(images)
    begin = self.param('embeddings.class_embedding', nn.initializers.normal(), (self.hidden_size,))
    begin = jnp.broadcast_to(begin.astype(dtype), (len(images), 1, self.hidden_size))
    h = jnp.concatenate([begin, patches.reshape(len(images), side * side, -1)], axis=1)
    position = nn.Embed(
      side * side + 1, self.hidden_size, dtype=dtype, name='embeddings.position_embedding'
    )
    h = h + position(jnp.arange(side * side + 1))[None]
    h = self._norm('pre_layrnorm')(h)  # the name has this mistake in transformers
    for i in range(self.num_hidden_layers):
      h = Layer(
        num_heads=self.num_attention_heads,
        intermediate_size=self.intermediate_size,
        activation=self.hidden_act,
        epsilon=self.layer_norm_eps,
        dtype=self.dtype,
        is_causal=False,
        name=f'encoder.layers.{i}',
      )(h)
    h = self._norm('post_layernorm')(h[:, 0])
    if not self.projection_dim:
      return h
    return nn.Dense(self.projection_dim, use_bias=False, dtype=dtype, name='visual_projection')(h)

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
      self.layer_norm_eps, use_fast_variance=False, dtype=DTYPES[self.dtype], name=name
    )
