"""Data augmentation on the device; each augmentation is a function of a random key."""

import jax
import jax.numpy as jnp


def flip(rng: jax.Array, x: jax.Array) -> jax.Array:
  """Mirrors each image of x (B, H, W, C) left to right with probability 1/2."""
  chosen = jax.random.bernoulli(rng, 0.5, x.shape[:1])
  return jnp.where(chosen[:, None, None, None], x[:, :, ::-1, :], x)
