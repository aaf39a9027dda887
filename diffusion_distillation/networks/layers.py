"""Layers of the networks, written so that they compile to few passes over memory.

Their parameters have the names and shapes of flax's own layers.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# XLA's own code; or cuDNN's fused kernel for 16-bit types on GPUs, which does not store the attention weights.
ATTENTION_KERNELS = ('xla', 'cudnn')


class GroupNorm(nn.Module):
  """Group normalization (Wu & He 2018), optionally followed by a scale and shift per example and channel.

  The first pass over the input sums each channel; the second is a multiply-add per channel that does the rest. Both are
  computed in float32 or better.

  Attributes:
    num_groups: must divide the number of channels.
    dtype: of the result; None for the input's.
    epsilon: is added to the variance.
  """

  num_groups: int
  dtype: Any = None
  epsilon: float = 1e-6

  @nn.compact
  def __call__(
    self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None
  ) -> jax.Array:
    """Returns y (1 + scale) + shift of the normalized y. x: (B, H, W, C); scale, shift: (B, C)."""
    ch = x.shape[-1]
    gain = self.param('scale', nn.initializers.ones, (ch,))
    bias = self.param('bias', nn.initializers.zeros, (ch,))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = self._of_groups(wide.mean((1, 2)))
    variance = jnp.maximum(self._of_groups(jnp.square(wide).mean((1, 2))) - jnp.square(mean), 0.0)
    factor = jax.lax.rsqrt(variance + self.epsilon) * gain[None]
    term = bias[None] - mean * factor
    if scale is not None:
      factor, term = factor * (1.0 + scale), term * (1.0 + scale)
    if shift is not None:
      term = term + shift
    y = wide * factor[:, None, None] + term[:, None, None]
    return y.astype(self.dtype or x.dtype)

  def _of_groups(self, of_channels: jax.Array) -> jax.Array:
    """The mean over each group of channels, repeated for each of its channels: (B, C)."""
    batch, ch = of_channels.shape
    means = of_channels.reshape(batch, self.num_groups, -1).mean(-1)
    return jnp.repeat(means, ch // self.num_groups, axis=1)


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) that uses one random byte per activation.

  The threshold, 256 times the rate, is rounded up or down at random, once per example, so that the rate is exact on average.

  Attributes:
    rate: probability in [0, 1) that an activation is set to 0.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    """x: (B, ...). Draws from the stream 'dropout', unless `deterministic`."""
    if deterministic or not self.rate:
      return x
    rng_bytes, rng_round = jax.random.split(self.make_rng('dropout'))
    batch, size = x.shape[0], math.prod(x.shape[1:])
    words = jax.random.bits(rng_bytes, (batch, -(-size // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, -1)[:, :size]
    threshold = jnp.floor(256.0 * self.rate + jax.random.uniform(rng_round, (batch, 1)))
    keep = (octets >= threshold.astype(jnp.uint16)).reshape(x.shape)
    return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, kernel: str = 'xla') -> jax.Array:
  """softmax(q kᵀ / sqrt(D)) v for each head (Vaswani et al. 2017).

  Args:
    q, k, v: (B, N, heads, D). The softmax is computed in float32 and converted to their type.
    kernel: a name in ATTENTION_KERNELS.

  Returns:
    (B, N, heads, D).
  """
  if kernel == 'cudnn':
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  if q.shape[2] == 1:  # without a head axis, matrix products need no transposition
    return _one_head(q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None]
  return jax.vmap(_one_head, in_axes=2, out_axes=2)(q, k, v)


def _one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  logits = jnp.einsum('bqd,bkd->bqk', q / math.sqrt(q.shape[-1]), k)
  weights = jax.nn.softmax(logits.astype(jnp.promote_types(q.dtype, jnp.float32)))
  return jnp.einsum('bqk,bkd->bqd', weights.astype(v.dtype), v)
