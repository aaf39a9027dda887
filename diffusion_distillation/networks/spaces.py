"""Spaces of x. Only this file knows the range of the data and how images are converted to x and back."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Space(Protocol):
  """The interface of a space; implemented by frozen dataclasses, which are static under jit."""

  def shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x for images of `image_shape` (H, W, C)."""
    ...

  def encode(self, image: jax.Array) -> jax.Array:
    """Converts images (B, H, W, C) uint8 to x, float32."""
    ...

  def decode(self, x: jax.Array) -> jax.Array:
    """Converts x to the nearest images (B, H, W, C) uint8; the inverse of `encode`."""
    ...

  def clip(self, x: jax.Array) -> jax.Array:
    """Projects x onto the values that images can have."""
    ...

  def dequantize(self, rng: jax.Array, x: jax.Array) -> jax.Array:
    """Adds uniform noise that leaves the decoded image unchanged (Theis et al. 2016, section 3.1)."""
    ...


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Pixels: uint8 values 0..255 are mapped to x in [-1, 1]; the shape is unchanged."""

  def shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Space.shape`."""
    return image_shape

  def encode(self, image: jax.Array) -> jax.Array:
    """See `Space.encode`."""
    return image.astype(jnp.float32) / 127.5 - 1.0

  def decode(self, x: jax.Array) -> jax.Array:
    """See `Space.decode`."""
    return jnp.round(127.5 * (self.clip(x) + 1.0)).astype(jnp.uint8)

  @staticmethod
  def clip(x: jax.Array) -> jax.Array:
    """See `Space.clip`; a static method, so that it compares equal for all `Pixels`."""
    return jnp.clip(x, -1.0, 1.0)

  def dequantize(self, rng: jax.Array, x: jax.Array) -> jax.Array:
    """See `Space.dequantize`."""
    return x + jax.random.uniform(rng, x.shape, minval=-0.5, maxval=0.5) / 127.5


SPACES: dict[str, type] = {'pixels': Pixels}
