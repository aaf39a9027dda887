"""Layers of the networks, written so that they compile to few passes over memory.

Their parameters have the names and shapes of flax's own layers.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.networks.conditioning import WEIGHT, Cond

# XLA's own code; or cuDNN's fused kernel for 16-bit types on GPUs, which does not store the attention weights.
ATTENTION_KERNELS = ('xla', 'cudnn')
_HARMONICS = (
  6  # half periods over the range of the guidance weight: its Fourier features have 1, 2, ... of them
)


class GroupNorm(nn.Module):
  """Group normalization (Wu & He 2018), optionally followed by a scale and shift per example and channel.

  The first pass over the input sums each channel; the second is a multiply-add per channel that does the rest. Both are
  computed in float32 or better.

  Attributes:
    num_groups: number of groups; must divide the number of channels.
    dtype: type of the result; None for the input's.
    epsilon: added to the variance.
    shifted: whether squares are summed around the first pixel of each channel instead of 0, which keeps the digits of
      the variance where an input is nearly constant.
  """

  num_groups: int
  dtype: Any = None
  epsilon: float = 1e-6
  shifted: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None
  ) -> jax.Array:
    """Returns y (1 + scale) + shift of the normalized y. x: (B, H, W, C); scale, shift: (B, C)."""
    ch = x.shape[-1]
    gain = self.param('scale', nn.initializers.ones, (ch,))
    bias = self.param('bias', nn.initializers.zeros, (ch,))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, variance = self._moments(wide)
    factor = jax.lax.rsqrt(variance + self.epsilon) * gain[None]
    term = bias[None] - mean * factor
    if scale is not None:
      factor, term = factor * (1.0 + scale), term * (1.0 + scale)
    if shift is not None:
      term = term + shift
    y = wide * factor[:, None, None] + term[:, None, None]
    return y.astype(self.dtype or x.dtype)

  def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel's group, both (B, C)."""
    if not self.shifted:
      mean = self._of_groups(x.mean((1, 2)))
      return mean, jnp.maximum(self._of_groups(jnp.square(x).mean((1, 2))) - jnp.square(mean), 0.0)
    pixel = jax.lax.stop_gradient(x[:, 0, 0])
    apart = x - pixel[:, None, None]
    shift = apart.mean((1, 2))
    of_channels = jnp.maximum(jnp.square(apart).mean((1, 2)) - jnp.square(shift), 0.0)
    mean = self._of_groups(pixel + shift)
    return mean, self._of_groups(of_channels + jnp.square(pixel + shift - mean))

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


class Dense(nn.Dense):
  """`nn.Dense` as a product of two matrices, whatever the number of axes of its input.

  On CPUs, XLA computes the gradient of the kernel faster for two axes than for more.
  """

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """inputs: (..., D). Returns (..., features)."""
    rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
    return rows.reshape(*inputs.shape[:-1], self.features)


class HalvedDense(nn.Module):
  """The two halves of the output of `nn.Dense`, such as a scale and a shift.

  The product and the bias are halved before they are added. If their sum were halved, XLA's code for CPUs would compute it
  in a function that is called for each element, which prevents vectorization.

  Attributes:
    features: number of features of each output.
    dtype: type of the outputs; None for that of the input and the parameters.
    kernel_init: initializer of the kernel.
  """

  features: int
  dtype: Any = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """inputs: (..., D). Returns two arrays (..., features)."""
    rows, width = inputs.reshape(-1, inputs.shape[-1]), 2 * self.features
    kernel = self.param('kernel', self.kernel_init, (rows.shape[-1], width))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    rows, kernel, bias = nn.dtypes.promote_dtype(rows, kernel, bias, dtype=self.dtype)
    products, biases = jnp.split(rows @ kernel, 2, axis=1), jnp.split(bias, 2)
    shape = (*inputs.shape[:-1], self.features)
    first, second = (p + b[None] for p, b in zip(products, biases, strict=True))
    return first.reshape(shape), second.reshape(shape)


class WeightEmbedding(nn.Module):
  """Embedding of the weight of guidance, to be added to the embedding of time (Meng et al. 2023).

  Fourier features of the weight pass through two dense layers. The last one starts with zeros, so that a student with
  this input starts as the same function as its teacher without it.

  Attributes:
    width: width of the embedding.
    low, high: range of the weight.
  """

  width: int
  low: float
  high: float

  @nn.compact
  def __call__(self, weight: jax.Array) -> jax.Array:
    """weight: (B,). Returns (B, width)."""
    part = (weight - self.low) / (self.high - self.low)
    angles = math.pi * part[:, None] * jnp.arange(1, 1 + _HARMONICS)[None, :]
    h = jnp.concatenate([part[:, None], jnp.sin(angles), jnp.cos(angles)], axis=-1)
    h = nn.swish(nn.Dense(self.width, name='dense0')(h))
    return nn.Dense(self.width, kernel_init=nn.initializers.zeros, name='dense1')(h)


def add_weight(emb: jax.Array, range_: tuple[float, ...], cond: Cond) -> jax.Array:
  """Returns the embedding of time (B, D) plus that of the weight of guidance; called inside a module's `__call__`.

  Args:
    emb: the embedding of time.
    range_: (low, high), or () for a network without this input, whose embedding does not change.
    cond: has the weight (B,) as `guidance`.
  """
  if not range_:
    return emb
  if cond is None or WEIGHT not in cond:
    raise ValueError('a network with the weight of guidance as an input needs `guidance` in cond')
  return emb + WeightEmbedding(emb.shape[-1], *range_, name='guidance_emb')(cond[WEIGHT])
