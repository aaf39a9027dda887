"""DMD2's GAN: a head on the fake score's innermost activations tells real images from generated ones, both noised."""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.methods.method import BoundDenoiser, Nets, Params
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import Function
from diffusion_distillation.networks.head import Head


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

  @property
  def head(self) -> Function:
    """The network of the head, `head(params, activations) -> (B,)`."""
    return Function(Head())

  def init(self, rng: jax.Array) -> Params:
    """The head's parameters."""
    return Head().init(rng, jnp.zeros((1, 1, 1, self.width)))['params']

  def logits(
    self, fake_score: BoundDenoiser, head: Any, z: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """D of noised images z (B, H, W, C): (B,)."""
    return jnp.asarray(head(fake_score.bottleneck(z, logsnr, cond)))

  def generator_losses(
    self, nets: Nets, x: jax.Array, eps: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """Of each generated image x, (B,): it moves the generator and nothing else."""
    fake_score, head = jax.lax.stop_gradient((nets['fake_score'], nets['head']))
    logits = self.logits(fake_score, head, diffuse(x, eps, logsnr), logsnr, cond)
    return self.generator_weight * jax.nn.softplus(-logits)

  def critic_losses(
    self, nets: Nets, fake: jax.Array, real: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """Of each pair of noised images z, (B,): generated ones, through which no gradient passes, and real ones."""
    fake_score, head = nets['fake_score'], nets['head']
    of_fake = self.logits(fake_score, head, jax.lax.stop_gradient(fake), logsnr, cond)
    of_real = self.logits(fake_score, head, real, logsnr, cond)
    return self.fake_weight * (jax.nn.softplus(of_fake) + jax.nn.softplus(-of_real))
