"""The head of a discriminator: from a network's innermost activations to one logit per example."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Head(nn.Module):
  """Activations (B, h, w, c) to logits (B,): positive for what it takes for real."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    width = h.shape[-1]
    # At least two channels per group: normalized alone, a channel says nothing about its size.
    groups = min(8, width // 2)
    for k in range(2):
      h = nn.Conv(width, (3, 3), name=f'conv{k}')(h)
      h = nn.swish(nn.GroupNorm(groups, name=f'norm{k}')(h))
    return nn.Dense(1, name='logit')(jnp.mean(h, (1, 2)))[:, 0]
