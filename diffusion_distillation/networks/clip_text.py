"""The text encoders of CLIP (Radford et al. 2021), as transformers' CLIPTextModel stores them.

Modules have the names of its state dict: `encoder.layers.0/self_attn.q_proj/kernel` here is
`encoder.layers.0.self_attn.q_proj.weight` there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.checks import check_choices
from diffusion_distillation.networks.unet import DTYPES


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), an approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'quick_gelu': quick_gelu,
  'gelu': functools.partial(nn.gelu, approximate=False),
}
# Files from before the end token was recorded say 2; there the end token is the one with the highest number.
_UNRECORDED_END = 2


class Encoded(NamedTuple):
  """The output of a text encoder for a text of T tokens.

  Attributes:
    last: (B, T, D), the embeddings after the last layer that is not skipped and the final norm.
    pooled: (B, D), the one of `last` at the first end token.
    layers: num_layers + 1 arrays (B, T, D), the embeddings before the first layer and after each, without the final norm.
  """

  last: jax.Array
  pooled: jax.Array
  layers: tuple[jax.Array, ...]


class Layer(nn.Module):
  """A transformer layer of CLIP.

  Attributes:
    num_heads: number of attention heads.
    intermediate_size: width of the hidden layer of the MLP.
    activation: its activation function, a name in ACTIVATIONS.
    epsilon: added to the variance of the norms.
    dtype: dtype of activations, 'float32' or 'bfloat16'.
    is_causal: whether each token attends only to itself and to those before it.
  """

  num_heads: int
  intermediate_size: int
  activation: str
  epsilon: float
  dtype: str
  is_causal: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype, (batch, tokens, ch) = DTYPES[self.dtype], x.shape
    norm = functools.partial(nn.LayerNorm, self.epsilon, use_fast_variance=False, dtype=dtype)
    dense = functools.partial(nn.Dense, dtype=dtype)
    h = norm(name='layer_norm1')(x)
    shape = (batch, tokens, self.num_heads, ch // self.num_heads)
    q, k, v = (dense(ch, name=f'self_attn.{name}_proj')(h).reshape(shape) for name in 'qkv')
    h = jax.nn.dot_product_attention(q, k, v, is_causal=self.is_causal).reshape(x.shape)
    x = x + dense(ch, name='self_attn.out_proj')(h)
    h = dense(self.intermediate_size, name='mlp.fc1')(norm(name='layer_norm2')(x))
    return x + dense(ch, name='mlp.fc2')(ACTIVATIONS[self.activation](h))


class CLIPText(nn.Module):
  """Maps the token numbers of texts to embeddings.

  Attributes:
    vocab_size: number of tokens that exist.
    hidden_size: width D of an embedding.
    intermediate_size: width of the hidden layer of each MLP.
    num_hidden_layers: number of transformer layers.
    num_attention_heads: attention heads of each layer.
    max_position_embeddings: the largest number of tokens of a text.
    hidden_act: activation function of the MLPs, a name in ACTIVATIONS.
    layer_norm_eps: added to the variance of every layer norm.
    eos_token_id: number of the end token, whose embedding is `Encoded.pooled`; 2 for the highest number in the text, as
      transformers reads it.
    dtype: dtype of activations, 'float32' or 'bfloat16'.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407
  dtype: str = 'float32'

  def check(self) -> None:
    """Raises ValueError, saying what to change, if the hyper-parameters describe no text encoder."""
    check_choices({'dtype': (self.dtype, DTYPES), 'hidden_act': (self.hidden_act, ACTIVATIONS)})
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f'num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}'
      )

  @nn.compact
  def __call__(self, tokens: jax.Array, skip: int = 0) -> Encoded:
    """tokens: (B, T) integers, T at most `max_position_embeddings`; the final norm leaves out the last `skip` layers."""
    if tokens.shape[1] > self.max_position_embeddings:
      raise ValueError(f'{tokens.shape[1]} tokens are more than {self.max_position_embeddings}')
    dtype = DTYPES[self.dtype]
    embed = functools.partial(nn.Embed, features=self.hidden_size, dtype=dtype)
    token = embed(self.vocab_size, name='embeddings.token_embedding')
    position = embed(self.max_position_embeddings, name='embeddings.position_embedding')
    h = token(tokens) + position(jnp.arange(tokens.shape[1]))[None]
    layers = [h]
    for i in range(self.num_hidden_layers):
      layer = Layer(
        num_heads=self.num_attention_heads,
        intermediate_size=self.intermediate_size,
        activation=self.hidden_act,
        epsilon=self.layer_norm_eps,
        dtype=self.dtype,
        name=f'encoder.layers.{i}',
      )
      h = layer(h)
      layers.append(h)
    last = nn.LayerNorm(
      self.layer_norm_eps, use_fast_variance=False, dtype=dtype, name='final_layer_norm'
    )(layers[-1 - skip])
    return Encoded(last, last[jnp.arange(len(tokens)), self._end(tokens)], tuple(layers))

  def _end(self, tokens: jax.Array) -> jax.Array:
    """Returns the position (B,) of each text's first end token; 0 if there is none."""
    if self.eos_token_id == _UNRECORDED_END:
      return jnp.argmax(tokens, axis=1)
    return jnp.argmax(tokens == self.eos_token_id, axis=1)
