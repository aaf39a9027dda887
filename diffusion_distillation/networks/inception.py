"""The Inception v3 whose features define the Fréchet inception distance (FID), as a Flax module.

This is the network of the TensorFlow graph of 2015-12-05 (Szegedy et al. 2015; Heusel et al. 2017), in the form and with the
names of its PyTorch port, pytorch-fid. It differs from other Inceptions: 1008 logits, average pools that leave padding out of
the mean, and a max pool in the last block. Batch normalization is folded into the convolutions.
"""

from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar('Array', jax.Array, np.ndarray)

SIDE = 299  # height and width of the images inside the network
NUM_LOGITS = 1008
NUM_FEATURES = 2048  # of pool3
BATCH_NORM_EPSILON = 1e-3
_SPATIAL = 7  # number of channels of the spatial features


class Outputs(NamedTuple):
  """Outputs for n images, float32; the last three serve to compare the network with others.

  Attributes:
    pool3: (n, 2048), the features of the FID.
    logits: (n, 1008), the logits of classes; None without `fc`.
    spatial: (n, 2023), the features of the sFID (Nash et al. 2021) as ADM's evaluator (Dhariwal & Nichol 2021) has them: the
      first 7 channels of `mixed_6/conv`, the 1x1 branch of Mixed_6d, flattened from (17, 17, 7).
    pool64: (n, 73, 73, 64), after the first max pool.
    pool192: (n, 35, 35, 192), after the second max pool.
    mixed768: (n, 17, 17, 768), after Mixed_6e.
  """

  pool3: jax.Array
  logits: jax.Array | None
  spatial: jax.Array
  pool64: jax.Array | None
  pool192: jax.Array | None
  mixed768: jax.Array | None


def _taps(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns for each of SIDE new pixels the two old pixels that it lies between (int32) and the weight of the second."""
  # In float32, in this order, like the original: the weights are multiplied by pixels, so that their rounding counts.
  scale = np.float32(length) / np.float32(SIDE)
  at = scale * (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
  at = np.maximum(at, np.float32(0.0))
  low = np.minimum(at.astype(np.int32), length - 1)
  return low, np.minimum(low + 1, length - 1), np.clip(at - low, 0.0, 1.0).astype(np.float32)


def resize(images: Array) -> Array:
  """Resizes images (n, H, W, C) to (n, SIDE, SIDE, C): bilinear with half-pixel centers, and not antialiased if they shrink."""
  if images.shape[1:3] == (SIDE, SIDE):
    return images
  low, high, weight = _taps(images.shape[2])
  weight = weight[None, None, :, None]
  images = images[:, :, low] * (1.0 - weight) + images[:, :, high] * weight
  low, high, weight = _taps(images.shape[1])
  weight = weight[None, :, None, None]
  return images[:, low] * (1.0 - weight) + images[:, high] * weight


def preprocess(images: Array) -> Array:
  """Maps images (n, H, W, 1 or 3) uint8 to the network's input, (n, SIDE, SIDE, 3) float32 in [-1, 1].

  Arrays of NumPy are mapped by NumPy, so that images of any size need no program of their own.
  """
  resized = 2.0 * resize(images.astype(np.float32) / np.float32(255.0)) - 1.0
  return resized if resized.shape[-1] == 3 else resized.repeat(3, -1)


class Kernel(nn.Module):
  """The parameters of a convolution and of its batch normalization, folded: kernel (h, w, in, out) and bias (out,)."""

  features: int
  size: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
    kernel = self.param('kernel', nn.initializers.he_normal(), (*self.size, channels, self.features))
    return kernel, self.param('bias', nn.initializers.zeros, (self.features,))


def _convolve(
  x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int = 1, pad: tuple[int, int] = (0, 0)
) -> jax.Array:
  padding, layout = [(p, p) for p in pad], ('NHWC', 'HWIO', 'NHWC')
  # The highest precision, because GPUs would otherwise round the factors to 10 bits.
  found = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=layout, precision='highest'
  )
  return found + bias[None, None, None]


def _conv(x: jax.Array, name: str, features: int, size: int, stride: int = 1) -> jax.Array:
  """A square convolution without padding, and ReLU."""
  return nn.relu(_convolve(x, *Kernel(features, (size, size), name=name)(x.shape[-1]), stride))


def _same(x: jax.Array, name: str, features: int, height: int, width: int) -> jax.Array:
  """A convolution that keeps height and width, and ReLU."""
  kernel = Kernel(features, (height, width), name=name)(x.shape[-1])
  return nn.relu(_convolve(x, *kernel, pad=(height // 2, width // 2)))


def _pointwise(x: jax.Array, **features: int) -> list[jax.Array]:
  """Several 1x1 convolutions of the same input, by name, without ReLU; computed as one, which is faster."""
  kernels, biases = zip(*(Kernel(n, name=k)(x.shape[-1]) for k, n in features.items()), strict=True)
  found = _convolve(x, jnp.concatenate(kernels, -1), jnp.concatenate(biases))
  return jnp.split(found, np.cumsum([*features.values()])[:-1], -1)


def _max_pool(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2))


def _mean(x: jax.Array) -> jax.Array:
  """Returns the mean over 3x3 pixels, without those beyond the border.

  The original takes it before a 1x1 convolution. Both are linear and the weights of a mean add up to one, so that the order does
  not matter; after the convolution, there are fewer channels.
  """
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


class BlockA(nn.Module):
  """Mixed_5b to Mixed_5d, at 35x35."""

  pooled: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one, five, three, near = _pointwise(
      x, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=self.pooled
    )
    five = _same(nn.relu(five), 'branch5x5_2', 64, 5, 5)
    three = _same(nn.relu(three), 'branch3x3dbl_2', 96, 3, 3)
    three = _same(three, 'branch3x3dbl_3', 96, 3, 3)
    return jnp.concatenate([nn.relu(one), five, three, nn.relu(_mean(near))], -1)


class BlockB(nn.Module):
  """Mixed_6a, from 35x35 to 17x17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    double = _same(_conv(x, 'branch3x3dbl_1', 64, 1), 'branch3x3dbl_2', 96, 3, 3)
    double = _conv(double, 'branch3x3dbl_3', 96, 3, 2)
    return jnp.concatenate([_conv(x, 'branch3x3', 384, 3, 2), double, _max_pool(x)], -1)


class BlockC(nn.Module):
  """Mixed_6b to Mixed_6e, at 17x17. The first 192 channels are the 1x1 branch."""

  inner: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    one, seven, double, near = _pointwise(
      x, branch1x1=192, branch7x7_1=self.inner, branch7x7dbl_1=self.inner, branch_pool=192
    )
    seven = _same(nn.relu(seven), 'branch7x7_2', self.inner, 1, 7)
    seven = _same(seven, 'branch7x7_3', 192, 7, 1)
    double = nn.relu(double)
    for k, (height, width) in enumerate([(7, 1), (1, 7), (7, 1)], 2):
      double = _same(double, f'branch7x7dbl_{k}', self.inner, height, width)
    double = _same(double, 'branch7x7dbl_5', 192, 1, 7)
    return jnp.concatenate([nn.relu(one), seven, double, nn.relu(_mean(near))], -1)


class BlockD(nn.Module):
  """Mixed_7a, from 17x17 to 8x8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three, seven = map(nn.relu, _pointwise(x, branch3x3_1=192, branch7x7x3_1=192))
    three = _conv(three, 'branch3x3_2', 320, 3, 2)
    seven = _same(seven, 'branch7x7x3_2', 192, 1, 7)
    seven = _same(seven, 'branch7x7x3_3', 192, 7, 1)
    seven = _conv(seven, 'branch7x7x3_4', 192, 3, 2)
    return jnp.concatenate([three, seven, _max_pool(x)], -1)


class BlockE(nn.Module):
  """Mixed_7b and Mixed_7c, at 8x8; `maximum`: whether the last branch has a max pool instead of an average pool."""

  maximum: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = {'branch1x1': 320, 'branch3x3_1': 384, 'branch3x3dbl_1': 448}
    if self.maximum:
      one, three, double = _pointwise(x, **features)
      (near,) = _pointwise(nn.max_pool(x, (3, 3), padding='SAME'), branch_pool=192)
    else:
      one, three, double, near = _pointwise(x, **features, branch_pool=192)
      near = _mean(near)
    three, double = nn.relu(three), _same(nn.relu(double), 'branch3x3dbl_2', 384, 3, 3)
    branches = [
      nn.relu(one),
      _same(three, 'branch3x3_2a', 384, 1, 3),
      _same(three, 'branch3x3_2b', 384, 3, 1),
      _same(double, 'branch3x3dbl_3a', 384, 1, 3),
      _same(double, 'branch3x3dbl_3b', 384, 3, 1),
      nn.relu(near),
    ]
    return jnp.concatenate(branches, -1)


class Inception(nn.Module):
  """The network, from `preprocess`ed images (n, SIDE, SIDE, 3); `num_logits` is 0 for weights without `fc`."""

  num_logits: int = NUM_LOGITS

  @nn.compact
  def __call__(self, x: jax.Array) -> Outputs:
    x = _conv(x, 'Conv2d_1a_3x3', 32, 3, 2)
    x = _conv(x, 'Conv2d_2a_3x3', 32, 3)
    x = pool64 = _max_pool(_same(x, 'Conv2d_2b_3x3', 64, 3, 3))
    x = _conv(_conv(x, 'Conv2d_3b_1x1', 80, 1), 'Conv2d_4a_3x3', 192, 3)
    x = pool192 = _max_pool(x)
    for name, pooled in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
      x = BlockA(pooled, name=name)(x)
    x = BlockB(name='Mixed_6a')(x)
    for name, inner in (('Mixed_6b', 128), ('Mixed_6c', 160)):
      x = BlockC(inner, name=name)(x)
    x = BlockC(160, name='Mixed_6d')(x)
    spatial = x[..., :_SPATIAL].reshape(len(x), -1)
    x = mixed768 = BlockC(192, name='Mixed_6e')(x)
    x = BlockE(name='Mixed_7b')(BlockD(name='Mixed_7a')(x))
    pool3 = BlockE(maximum=True, name='Mixed_7c')(x).mean((1, 2))
    dense = nn.Dense(self.num_logits, precision='highest', name='fc')
    logits = dense(pool3) if self.num_logits else None
    return Outputs(pool3, logits, spatial, pool64, pool192, mixed768)
