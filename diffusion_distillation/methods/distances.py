"""How far one image is from another: what regression losses compare by.

A distance is `distance(x, y, weights) -> (B,)` on images (B, H, W, C) in [-1, 1]; `weights` are what `load` read for
it, an argument of the compiled step, or None.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.config import choose
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import classifier

Weights = Any


def _mse(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x - y), tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True)
class L2:
  """The mean squared difference of pixels."""

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    return _mse(x, y)


@dataclasses.dataclass(frozen=True)
class PseudoHuber:
  """sqrt(mse + c^2) - c: as L2 for small differences, as its root for large ones (Song & Dhariwal 2023, Eq. 7).

  There on sums over D pixels, with c sqrt(D): this is that divided by sqrt(D).
  """

  c: float = 0.00054

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    mse = _mse(x, y)
    return mse / (jnp.sqrt(mse + self.c**2) + self.c)  # the same, without the difference of near numbers


def _unit(features: jax.Array) -> jax.Array:
  """Activations (B, h, w, c) scaled to length 1 at each place."""
  length = jnp.sqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-10)
  return features / length


@dataclasses.dataclass(frozen=True)
class Features:
  """The mean squared difference of a classifier's activations, each layer's at unit length (Zhang et al. 2018, Eq. 1).

  The classifier is an `extractor.safetensors` of some run. That of the run which is trained also measures it:
  choose another one, or read the figures with that in mind.
  """

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    pairs = zip(classifier.layers(weights, x), classifier.layers(weights, y), strict=True)
    total = jnp.zeros(x.shape[0])
    for of_x, of_y in pairs:
      difference = jnp.sum(jnp.square(_unit(of_x) - _unit(of_y)), -1)
      total = total + jnp.mean(difference, tuple(range(1, difference.ndim)))
    return total

  def check(self, weights: Mapping[str, np.ndarray], image_shape: tuple[int, ...]) -> Weights:
    """The parameters of a classifier of images (H, W, C); raises ValueError if they are not."""
    shapes = {name: value.shape for name, value in weights.items()}
    num_classes = (shapes.get('logits/bias') or (1,))[0]
    if shapes != classifier.shapes(num_classes, image_shape):
      raise ValueError(f'no classifier of images {image_shape}')
    params: Weights = traverse_util.unflatten_dict(dict(weights), sep='/')
    return params


# VGG-16's convolutions as torchvision numbers them, by slice: the activations at the end of each are compared.
_VGG = (
  ((0, 64), (2, 64)),
  ((5, 128), (7, 128)),
  ((10, 256), (12, 256), (14, 256)),
  ((17, 512), (19, 512), (21, 512)),
  ((24, 512), (26, 512), (28, 512)),
)
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)  # of the lpips package, for images in [-1, 1]
_STD = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class Lpips:
  """LPIPS with VGG-16 (Zhang et al. 2018), version 0.1: learned weights on the channels of five layers.

  The weight file is the state of the `lpips` package's network as safetensors; see docs/methods.md for the line that
  writes it.

  Attributes:
    size: images smaller than this are enlarged to it, bilinearly; DMD has 224.
  """

  size: int = 224

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    pairs = zip(self.layers(weights, x), self.layers(weights, y), strict=True)
    total = jnp.zeros(x.shape[0])
    for k, (of_x, of_y) in enumerate(pairs):
      difference = jnp.square(_unit(of_x) - _unit(of_y)) @ weights[f'lin{k}.model.1.weight'][0, :, 0, 0]
      total = total + jnp.mean(difference, (1, 2))
    return total

  def layers(self, weights: Weights, x: jax.Array) -> list[jax.Array]:
    """The activations at the end of each slice, (B, h, w, c)."""
    batch, height, width, channels = x.shape
    if channels == 1:
      x = jnp.repeat(x, 3, axis=-1)
    if height < self.size:
      scaled = (batch, self.size, self.size * width // height, 3)
      x = jax.image.resize(x, scaled, 'bilinear')
    h = (x - _MEAN.reshape(1, 1, 1, 3)) / _STD.reshape(1, 1, 1, 3)
    found = []
    for k, convolutions in enumerate(_VGG):
      if k:
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
      for number, _ in convolutions:
        name = f'net.slice{k + 1}.{number}'
        h = jax.lax.conv_general_dilated(
          h, weights[f'{name}.weight'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'OIHW', 'NHWC')
        )
        h = jax.nn.relu(h + weights[f'{name}.bias'].reshape(1, 1, 1, -1))
      found.append(h)
    return found

  def check(self, weights: Mapping[str, np.ndarray], image_shape: tuple[int, ...]) -> Weights:
    """Those of `weights` that it uses; raises ValueError if one is missing or of another shape."""
    del image_shape
    used: dict[str, tuple[int, ...]] = {}
    below = 3
    for k, convolutions in enumerate(_VGG):
      for number, width in convolutions:
        used[f'net.slice{k + 1}.{number}.weight'] = (width, below, 3, 3)
        used[f'net.slice{k + 1}.{number}.bias'] = (width,)
        below = width
      used[f'lin{k}.model.1.weight'] = (1, below, 1, 1)
    for name, shape in used.items():
      found = weights[name].shape if name in weights else None
      if found != shape:
        raise ValueError(f'{name} should have shape {shape}, has {found}')
    return {name: weights[name] for name in used}


@dataclasses.dataclass(frozen=True)
class Weighted:
  """A distance as networks are called, its weights in front: `weighted(weights, x, y) -> (B,)`."""

  distance: Any

  def __call__(self, weights: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.asarray(self.distance(x, y, weights))


Distance = L2 | PseudoHuber | Features | Lpips
DISTANCES: dict[str, type] = {
  'l2': L2,
  'pseudo_huber': PseudoHuber,
  'features': Features,
  'lpips': Lpips,
}


def make_distance(name: str, section: Any) -> Distance:
  """The distance between images that the config's section `name` names; UserError if there is none of that name."""
  distance: Distance = choose(f'{name}.distance', section.distance, DISTANCES)()
  return distance


def load(distance: Distance, path: str, image_shape: tuple[int, ...], key: str) -> Weights:
  """The weights of a distance from a safetensors file, or None for one that has none.

  Raises:
    UserError: there is no such file, or it holds something else; the message names the config's `key`.
  """
  if not isinstance(distance, Features | Lpips):
    return None
  if not path or not pathlib.Path(path).is_file():
    raise UserError(f'{key}={path!r}: this distance needs a file of weights, safetensors')
  try:
    return distance.check(safetensors.numpy.load_file(path), image_shape)
  except (safetensors.SafetensorError, ValueError) as error:
    raise UserError(f'{key}={path}: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:  # safetensors, of numbers that NumPy has not
    raise UserError(f'{key}={path}: numbers of a type that NumPy does not have: {error}') from error
