"""The vision transformer of DINOv2 (Oquab et al. 2023; with registers: Darcet et al. 2023), as a Flax module.

Stein et al. 2023 compare images by the class token of its ViT-L/14. The names of the parameters are those of the original code.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar('Array', jax.Array, np.ndarray)

SIDE = 224  # height and width of the images inside the network
PATCH = 14  # height and width of a patch
GRID = SIDE // PATCH  # patches along a side
HEAD = 64  # number of channels of an attention head, for every size of the network
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_EPSILON = 1e-6  # of layer normalization
_BITS = 22  # fractional bits of Pillow's integer weights


@dataclasses.dataclass(frozen=True)
class Size:
  """The size of a network.

  Attributes:
    width: number of channels of a token, and of features.
    depth: number of blocks.
    hidden: number of hidden channels of the perceptron in each block.
    registers: number of register tokens.
    gated: whether the perceptron is gated (SwiGLU), as in the giant network.
  """

  width: int
  depth: int
  hidden: int
  registers: int = 0
  gated: bool = False


# Images.


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the cubic convolution kernel with parameter `a` (Keys 1981, Eq. 4)."""

  def kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))

  return kernel


def bicubic_weights(old: int, new: int) -> np.ndarray:
  """Returns the weights (new, old) float64 of each old pixel in each new one: bicubic with a = -0.5, antialiased if it shrinks.

  These are the weights of Pillow's `Image.resize`, and of PyTorch's `interpolate` with `antialias`.
  """
  scale = old / new
  centers = (np.arange(new) + 0.5) * scale
  distance = np.arange(old)[None, :] + 0.5 - centers[:, None]
  found = _cubic(-0.5)(distance / max(scale, 1.0))
  return np.asarray(found / found.sum(axis=1, keepdims=True))


@functools.lru_cache(maxsize=64)
def _taps(old: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns which old pixels each of SIDE new ones is made of, and their integer weights, both (taps, SIDE) int32."""
  weights = bicubic_weights(old, SIDE)
  used = weights != 0.0
  first = used.argmax(axis=1)
  count = int((old - used[:, ::-1].argmax(axis=1) - first).max())
  first = np.minimum(first, old - count)
  places = first[None, :] + np.arange(count)[:, None]
  scaled = np.take_along_axis(weights, places.T, axis=1).T * 2.0**_BITS
  return places.astype(np.int32), np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)


def _resize_axis(images: Array, axis: int) -> Array:
  """Resizes one axis of images (int32, from 0 to 255) to SIDE pixels."""
  if images.shape[axis] == SIDE:
    return images
  shape = [1] * images.ndim
  shape[axis] = SIDE
  total: Array | None = None
  for places, weights in zip(*_taps(images.shape[axis]), strict=True):
    term = images.take(places, axis) * weights.reshape(shape)
    total = term if total is None else total + term
  assert total is not None  # there is at least one tap
  return ((total + (1 << (_BITS - 1))) >> _BITS).clip(0, 255)


def resize(images: Array) -> Array:
  """Resizes images (n, H, W, C) uint8 to (n, SIDE, SIDE, C) int32 from 0 to 255, exactly as Pillow's bicubic `Image.resize` does.

  Pillow resizes the width first, then the height, in integers, and rounds to whole numbers after each; very tall images the other
  way around.
  """
  height, width = images.shape[1:3]
  first, second = (1, 2) if height > 100 * width and height > SIDE else (2, 1)
  return _resize_axis(_resize_axis(images.astype(np.int32), first), second)


def preprocess(images: Array) -> Array:
  """Maps images (n, H, W, 1 or 3) uint8 to the network's input, (n, SIDE, SIDE, 3) float32, as dgm-eval does (Stein et al. 2023).

  Images are resized as Pillow resizes them, without cropping, and normalized by the mean and the standard deviation of ImageNet.
  Grey images are repeated to three channels. Arrays of NumPy are mapped by NumPy, so that images of any size need no program.
  """
  resized = resize(images)
  resized = resized if resized.shape[-1] == 3 else resized.repeat(3, -1)
  scaled = resized.astype(np.float32) / np.float32(255.0)
  mean, std = (np.array(x, np.float32)[None, None, None] for x in (_MEAN, _STD))
  return (scaled - mean) / std


# Position embeddings.


def interpolate_positions(grid: np.ndarray, antialias: bool) -> np.ndarray:
  """Interpolates position embeddings (M, M, D) of patches to (GRID, GRID, D) float32, as the original code does.

  Without registers, it scales by (GRID + 0.1) / M, without antialiasing and with a = -0.75; with registers, to GRID patches,
  with antialiasing and a = -0.5. A grid of GRID patches is kept.
  """
  side = len(grid)
  if side == GRID:
    return np.asarray(grid, np.float32)
  weights = bicubic_weights(side, GRID) if antialias else _offset_weights(side)
  found = np.einsum('im,jn,mnd->ijd', weights, weights, grid.astype(np.float64), optimize=True)
  return found.astype(np.float32)


def _offset_weights(side: int) -> np.ndarray:
  """Returns the weights (GRID, side) of the interpolation without antialiasing; pixels beyond the border repeat it."""
  at = (np.arange(GRID) + 0.5) * (side / (GRID + 0.1)) - 0.5
  low = np.floor(at).astype(int)
  found = np.zeros((GRID, side))
  for tap in range(-1, 3):
    places = np.clip(low + tap, 0, side - 1)
    np.add.at(found, (np.arange(GRID), places), _cubic(-0.75)(at - (low + tap)))
  return found


# The network.


def _dense(width: int, name: str) -> nn.Dense:
  # The highest precision, because GPUs would otherwise round the factors to 10 bits.
  return nn.Dense(width, precision='highest', name=name)


def _norm(name: str) -> nn.LayerNorm:
  # Without the shortcut E x^2 - (E x)^2, which loses digits where some channels are much larger than the others.
  return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Block(nn.Module):
  """A block of the transformer: attention and a perceptron, each scaled by channel and added."""

  size: Size

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = self.size
    for k, function in ((1, self._attend), (2, self._perceptron)):
      gamma = self.param(f'ls{k}', nn.initializers.ones, (size.width,))
      x = x + gamma[None, None] * function(_norm(f'norm{k}')(x))
    return x

  def _attend(self, x: jax.Array) -> jax.Array:
    count, tokens, width = x.shape
    qkv = _dense(3 * width, 'qkv')(x).reshape(count, tokens, 3, width // HEAD, HEAD)
    query, key, value = (qkv[:, :, k] for k in range(3))
    scores = jnp.einsum('nqhc,nkhc->nhqk', query * HEAD**-0.5, key, precision='highest')
    found = jnp.einsum('nhqk,nkhc->nqhc', nn.softmax(scores), value, precision='highest')
    return _dense(width, 'proj')(found.reshape(count, tokens, width))

  def _perceptron(self, x: jax.Array) -> jax.Array:
    size = self.size
    if size.gated:
      gate, up = jnp.split(_dense(2 * size.hidden, 'w12')(x), 2, -1)
      return _dense(size.width, 'w3')(nn.silu(gate) * up)
    hidden = nn.gelu(_dense(size.hidden, 'fc1')(x), approximate=False)
    return _dense(size.width, 'fc2')(hidden)


class Dinov2(nn.Module):
  """The network, from `preprocess`ed images (n, SIDE, SIDE, 3) to the normalized class token (n, width)."""

  size: Size

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    size, count = self.size, len(images)
    patches = images.reshape(count, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = _dense(size.width, 'patch')(patches.reshape(count, GRID * GRID, -1))
    zeros = nn.initializers.zeros
    positions = self.param('positions', zeros, (1 + GRID * GRID, size.width))
    first = self.param('cls', zeros, (1, size.width))
    x = x + positions[None, 1:]
    tokens = [jnp.broadcast_to((first + positions[:1])[None], (count, 1, size.width)), x]
    if size.registers:
      own = self.param('registers', zeros, (size.registers, size.width))
      tokens.insert(1, jnp.broadcast_to(own[None], (count, *own.shape)))
    x = jnp.concatenate(tokens, 1)
    for k in range(size.depth):
      x = Block(size, name=f'block{k}')(x)
    return _norm('norm')(x[:, :1])[:, 0]
