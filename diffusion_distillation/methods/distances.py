"""Distances for regression losses: between any x, or between images.

A distance is a function `distance(x, y, weights) -> (B,)` of x (B, H, W, C); if it is one between images (`of_images`), these
are in [-1, 1]. `weights` is the result of `load`, an argument of the compiled step, or None.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

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
  """The mean squared difference between pixels, or between latents."""

  of_images: ClassVar[bool] = False

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    return _mse(x, y)


@dataclasses.dataclass(frozen=True)
class PseudoHuber:
  """sqrt(mse + c^2) - c: quadratic for small differences, linear for large ones (Song & Dhariwal 2023, Eq. 7).

  The paper sums over D pixels and uses c sqrt(D); this is the paper's distance divided by sqrt(D).
  """

  of_images: ClassVar[bool] = False

  c: float = 0.00054

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    mse = _mse(x, y)
    return mse / (jnp.sqrt(mse + self.c**2) + self.c)  # the same value without cancellation


def _unit(features: jax.Array) -> jax.Array:
  """Scales activations (B, h, w, c) to unit length at each position."""
  length = jnp.sqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-10)
  return features / length


@dataclasses.dataclass(frozen=True)
class Features:
  """The mean squared difference between a classifier's normalized activations, over all layers (Zhang et al. 2018, Eq. 1).

  The classifier is the `extractor.safetensors` of a run. The classifier of the current run is also used to evaluate it, which
  would favor this student; choose the classifier of another run, or interpret the evaluation accordingly.
  """

  of_images: ClassVar[bool] = True

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    pairs = zip(classifier.layers(weights, x), classifier.layers(weights, y), strict=True)
    total = jnp.zeros(x.shape[0])
    for of_x, of_y in pairs:
      difference = jnp.sum(jnp.square(_unit(of_x) - _unit(of_y)), -1)
      total = total + jnp.mean(difference, tuple(range(1, difference.ndim)))
    return total

  def check(self, weights: Mapping[str, np.ndarray], image_shape: tuple[int, ...]) -> Weights:
    """Returns the parameters as a tree; raises ValueError unless they belong to a classifier of images (H, W, C)."""
    shapes = {name: value.shape for name, value in weights.items()}
    num_classes = (shapes.get('logits/bias') or (1,))[0]
    if shapes != classifier.shapes(num_classes, image_shape):
      raise ValueError(f'this is not a classifier of images with shape {image_shape}')
    params: Weights = traverse_util.unflatten_dict(dict(weights), sep='/')
    return params


# VGG-16's convolutions by slice, with torchvision's numbers; the activations at the end of each slice are compared.
_VGG = (
  ((0, 64), (2, 64)),
  ((5, 128), (7, 128)),
  ((10, 256), (12, 256), (14, 256)),
  ((17, 512), (19, 512), (21, 512)),
  ((24, 512), (26, 512), (28, 512)),
)
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)  # from the lpips package, for images in [-1, 1]
_STD = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class Lpips:
  """LPIPS with VGG-16 (Zhang et al. 2018), version 0.1: learned weights on the channels of five layers.

  The weight file contains the state of the `lpips` package's network as safetensors; docs/methods.md has the command that
  writes it.

  Attributes:
    size: height to which smaller images are resized bilinearly; DMD uses 224.
  """

  of_images: ClassVar[bool] = True

  size: int = 224

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    pairs = zip(self.layers(weights, x), self.layers(weights, y), strict=True)
    total = jnp.zeros(x.shape[0])
    for k, (of_x, of_y) in enumerate(pairs):
      difference = jnp.square(_unit(of_x) - _unit(of_y)) @ weights[f'lin{k}.model.1.weight'][0, :, 0, 0]
      total = total + jnp.mean(difference, (1, 2))
    return total

  def layers(self, weights: Weights, x: jax.Array) -> list[jax.Array]:
    """Returns the activations at the end of each slice, (B, h, w, c)."""
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
    """Returns the weights that are used; raises ValueError if one is missing or has the wrong shape."""
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
        raise ValueError(f'{name} should have shape {shape}, but has {found}')
    return {name: weights[name] for name in used}


@dataclasses.dataclass(frozen=True)
class Weighted:
  """A distance with the signature of a network, weights first: `weighted(weights, x, y) -> (B,)`."""

  distance: Any

  def __call__(self, weights: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.asarray(self.distance(x, y, weights))


@dataclasses.dataclass(frozen=True)
class Decoded:
  """A distance between images, of latents that are decoded first (Yin et al. 2023, section 4.3).

  `weights` holds the distance's own as `distance` and the decoder's parameters as `decoder`.

  Attributes:
    distance: the distance between images.
    decode: decode(params, x) returns images (B, H, W, C), about in [-1, 1].
  """

  of_images: ClassVar[bool] = True

  distance: Any
  decode: Callable[[Any, jax.Array], jax.Array]

  def __call__(self, x: jax.Array, y: jax.Array, weights: Weights = None) -> jax.Array:
    of_x, of_y = (self.decode(weights['decoder'], latents) for latents in (x, y))
    return jnp.asarray(self.distance(of_x, of_y, weights['distance']))


Distance = L2 | PseudoHuber | Features | Lpips
DISTANCES: dict[str, type] = {
  'l2': L2,
  'pseudo_huber': PseudoHuber,
  'features': Features,
  'lpips': Lpips,
}


def make_distance(name: str, section: Any) -> Distance:
  """Returns the distance that the config's section `name` selects; raises UserError if there is none with that name."""
  distance: Distance = choose(f'{name}.distance', section.distance, DISTANCES)()
  return distance


def load(distance: Distance | Decoded, path: str, image_shape: tuple[int, ...], key: str) -> Weights:
  """Reads the weights of a distance from a safetensors file; None for a distance without weights.

  Those of a decoder are not among them.

  Raises:
    UserError: the file does not exist or does not contain these weights; the message names the config's `key`.
  """
  if isinstance(distance, Decoded):
    return load(distance.distance, path, image_shape, key)
  if not isinstance(distance, Features | Lpips):
    return None
  if not path or not pathlib.Path(path).is_file():
    raise UserError(f'{key}={path!r}: this distance needs a .safetensors file with its weights')
  try:
    return distance.check(safetensors.numpy.load_file(path), image_shape)
  except (safetensors.SafetensorError, ValueError) as error:
    raise UserError(f'{key}={path}: {error}') from error
  except (
    AttributeError,
    KeyError,
    TypeError,
  ) as error:  # raised by safetensors for types that NumPy lacks
    raise UserError(
      f'{key}={path} contains arrays of a type that NumPy does not have: {error}'
    ) from error
