"""DMD2's GAN: a head on the fake score's innermost activations tells real images from generated ones, both noised."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.methods.method import DenoiseFn, Params


class Head(nn.Module):
  """Activations (B, h, w, c) to a logit (B,): positive for what it takes for real."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    width = h.shape[-1]
    # Two channels each at least: one alone, normalized, says nothing of its size.
    groups = min(8, width // 2)
    for k in range(2):
      h = nn.Conv(width, (3, 3), name=f'conv{k}')(h)
      h = nn.swish(nn.GroupNorm(groups, name=f'norm{k}')(h))
    return nn.Dense(1, name='logit')(jnp.mean(h, (1, 2)))[:, 0]


@flax.struct.dataclass
class Gan:
  """The non-saturating loss of Yin et al. 2024 (DMD2), section 4.3; all of it static.

  Attributes:
    width: channels of the innermost activations.
    generator_weight: of the generator's loss, softplus(-D(fake)).
    fake_weight: of the critic's, softplus(D(fake)) + softplus(-D(real)), which trains head and fake score.
  """

  width: int = flax.struct.field(pytree_node=False)
  generator_weight: float = flax.struct.field(pytree_node=False)
  fake_weight: float = flax.struct.field(pytree_node=False)

  def init(self, rng: jax.Array) -> Params:
    """The head's parameters."""
    return Head().init(rng, jnp.zeros((1, 1, 1, self.width)))['params']

  def logits(
    self,
    denoise: DenoiseFn,
    fake_score: Params,
    head: Params,
    z: jax.Array,
    logsnr: jax.Array,
    label: jax.Array | None,
  ) -> jax.Array:
    """D of noised images z (B, H, W, C): (B,)."""
    logits: Any = Head().apply({'params': head}, denoise.bottleneck(fake_score, z, logsnr, label))
    return jnp.asarray(logits)

  def generator_losses(
    self,
    denoise: DenoiseFn,
    fake_score: Params,
    head: Params,
    x: jax.Array,
    eps: jax.Array,
    logsnr: jax.Array,
    label: jax.Array | None,
  ) -> jax.Array:
    """Of each generated image x, (B,): it moves the generator and nothing else."""
    critic = jax.lax.stop_gradient((fake_score, head))
    logits = self.logits(denoise, *critic, diffuse(x, eps, logsnr), logsnr, label)
    return self.generator_weight * jax.nn.softplus(-logits)

  def critic_losses(
    self,
    denoise: DenoiseFn,
    fake_score: Params,
    head: Params,
    fake: jax.Array,
    real: jax.Array,
    logsnr: jax.Array,
    label: jax.Array | None,
  ) -> jax.Array:
    """Of each pair of noised images z, (B,): generated ones, through which no gradient passes, and real ones."""
    of_fake = self.logits(denoise, fake_score, head, jax.lax.stop_gradient(fake), logsnr, label)
    of_real = self.logits(denoise, fake_score, head, real, logsnr, label)
    return self.fake_weight * (jax.nn.softplus(of_fake) + jax.nn.softplus(-of_real))
