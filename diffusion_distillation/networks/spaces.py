"""What happens to pixels on the device: uint8 to x and back, and what training does to x."""

import jax
import jax.numpy as jnp

NO_CLASS = -1  # the label of an image whose class is not told


def to_x(image: jax.Array) -> jax.Array:
  """uint8 pixels 0..255 to [-1, 1], the range of x everywhere else."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def to_image(x: jax.Array) -> jax.Array:
  """[-1, 1] to the nearest uint8 pixels; the inverse of `to_x`."""
  return jnp.round(127.5 * (jnp.clip(x, -1.0, 1.0) + 1.0)).astype(jnp.uint8)


def flip(rng: jax.Array, x: jax.Array) -> jax.Array:
  """Mirrors each image of x (B, H, W, C) left to right with probability 1/2."""
  chosen = jax.random.bernoulli(rng, 0.5, x.shape[:1])
  return jnp.where(chosen[:, None, None, None], x[:, :, ::-1, :], x)


def dequantize(rng: jax.Array, x: jax.Array) -> jax.Array:
  """Spreads x evenly over the values that round to the same pixel (Theis et al. 2016, section 3.1)."""
  return x + jax.random.uniform(rng, x.shape, minval=-0.5, maxval=0.5) / 127.5


def drop_labels(rng: jax.Array, label: jax.Array, probability: float) -> jax.Array:
  """Replaces labels (B,) by NO_CLASS with the given probability (Ho & Salimans 2022, algorithm 1)."""
  return jnp.where(jax.random.bernoulli(rng, probability, label.shape), NO_CLASS, label)
