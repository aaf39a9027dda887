"""Spaces of x. Only this file knows the range of the data and how images are converted to x and back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp


class Space(Protocol):
  """The interface of a space; implemented by frozen dataclasses, which are static under jit.

  Attributes:
    own_programs: whether `encode` and `decode` call a network, so that they are compiled on their own and must not be called
      inside another program, of which the network's parameters would become a part.
  """

  own_programs: ClassVar[bool]

  @property
  def decoder(self) -> 'Decoder | None':
    """The network that decodes x, to be called inside another program with its parameters; None if x are images."""
    ...

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

  own_programs: ClassVar[bool] = False
  decoder: ClassVar[None] = None

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


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: Any, params: Any, image: jax.Array) -> jax.Array:
  found = vae.apply({'params': params}, Pixels().encode(image), method='encode')
  return vae.scaled(found.mean)


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: Any, params: Any, x: jax.Array) -> jax.Array:
  return Pixels().decode(Decoder(vae)(params, x))


@dataclasses.dataclass(frozen=True)
class Decoder:
  """An autoencoder as a function from latents to images.

  Attributes:
    vae: the autoencoder.
  """

  vae: Any

  def __call__(self, params: Any, x: jax.Array) -> jax.Array:
    """Returns the images (B, H, W, C), about in [-1, 1], of x (B, h, w, c)."""
    found: jax.Array = self.vae.apply({'params': params}, self.vae.unscaled(x), method='decode')
    return found


@dataclasses.dataclass(frozen=True)
class Latents:
  """The latents of an autoencoder, (latent - shift) scale (Rombach et al. 2022, section 3.3 and appendix G).

  Spaces are equal if their autoencoders have the same hyper-parameters and the same digest of their parameters.

  Attributes:
    vae: the autoencoder, a linen module such as `autoencoder_kl.AutoencoderKL`.
    digest: the digest of its parameters.
    weights: returns the parameters; called when they are first needed.
  """

  own_programs: ClassVar[bool] = True

  vae: Any
  digest: str
  weights: Callable[[], Any] = dataclasses.field(compare=False, repr=False)

  @property
  def decoder(self) -> Decoder:
    """See `Space.decoder`; `weights` returns its parameters."""
    return Decoder(self.vae)

  def shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Space.shape`; raises ValueError, saying what to change, if the autoencoder does not take images of this shape."""
    height, width, channels = image_shape
    factor = self.vae.factor
    if height % factor or width % factor:
      raise ValueError(
        f'the autoencoder needs images whose sides are divisible by {factor}; these are {height}x{width}'
      )
    if channels != self.vae.in_channels:
      raise ValueError(
        f'the autoencoder needs images of {self.vae.in_channels} channels, not {channels}'
      )
    return height // factor, width // factor, self.vae.latent_channels

  def encode(self, image: jax.Array) -> jax.Array:
    """See `Space.encode`; the mean of the latents' distribution."""
    return _encode(self.vae, self.weights(), image)

  def decode(self, x: jax.Array) -> jax.Array:
    """See `Space.decode`; the inverse of `encode` only as far as the autoencoder is exact."""
    return _decode(self.vae, self.weights(), x)

  @staticmethod
  def clip(x: jax.Array) -> jax.Array:
    """See `Space.clip`; x itself, because latents have no bounds."""
    return x

  def dequantize(self, rng: jax.Array, x: jax.Array) -> jax.Array:
    """See `Space.dequantize`; x itself, because latents are not quantized."""
    del rng
    return x


SPACES: dict[str, type] = {'pixels': Pixels, 'latents': Latents}
