"""DMD2's GAN: a head on the fake score's activations distinguishes noised real images from noised generated ones."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import NOT_NEGATIVE, SHARE, build, choose, key
from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.method import BoundDenoiser, Context, Nets, Params
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import Function
from diffusion_distillation.networks.head import HEADS, Head, StridedHead


@dataclasses.dataclass(frozen=True)
class GanSection:
  """The keys of the GAN."""

  gan_generator: float = key(
    0.0,
    "Weight of the generator's GAN loss. This and `gan_fake` are both positive, or both 0 for no GAN.",
    NOT_NEGATIVE,
  )
  gan_fake: float = key(0.0, "Weight of the critic's GAN loss.", NOT_NEGATIVE)
  gan_first_t: float = key(
    0.0,
    'Smallest time at which the GAN compares noised images, less than `gan_last_t`.',
    SHARE,
  )
  gan_last_t: float = key(1.0, 'Largest time at which the GAN compares noised images.', SHARE)
  gan_head: str = key(
    'pooled',
    "The GAN's head. `pooled`: two convolutions on the fake score's innermost activations, of any size, and a mean; "
    "`strided`, as in DMD2's code: strided convolutions on the activations after the encoder, 8x8 or larger.",
    choices=HEADS,
  )
  joint_clip: bool = key(
    False,
    "Whether the gradients of the fake score and of the GAN's head are clipped together, so that the norm of both is at "
    "most `clip_norm`, as in DMD2's code; otherwise each network's gradient is clipped separately.",
  )


@flax.struct.dataclass
class Gan:
  """The non-saturating loss of Yin et al. 2024 (DMD2), section 4.3; all attributes are static.

  Attributes:
    width: channels of the activations that the head receives.
    generator_weight: weight of the generator's loss, softplus(-D(fake)).
    fake_weight: weight of the critic's loss, softplus(D(fake)) + softplus(-D(real)), which trains head and fake score.
    first_t, last_t: range of the times at which images are noised for both losses.
    module: the module of the head.
  """

  width: int = flax.struct.field(pytree_node=False)
  generator_weight: float = flax.struct.field(pytree_node=False)
  fake_weight: float = flax.struct.field(pytree_node=False)
  first_t: float = flax.struct.field(pytree_node=False, default=0.0)
  last_t: float = flax.struct.field(pytree_node=False, default=1.0)
  module: Head | StridedHead = flax.struct.field(pytree_node=False, default=Head())

  def __post_init__(self) -> None:
    if not 0.0 <= self.first_t < self.last_t <= 1.0:
      raise ValueError(
        f'gan_first_t={self.first_t} and gan_last_t={self.last_t} must satisfy 0 <= gan_first_t < gan_last_t <= 1'
      )

  @property
  def head(self) -> Function:
    """The network of the head, `head(params, activations) -> (B,)`."""
    return Function(self.module)

  def init(self, rng: jax.Array) -> Params:
    """Returns the head's initial parameters."""
    return self.module.init(rng, jnp.zeros((1, 8, 8, self.width)))['params']

  def draw_times(self, rng: jax.Array, count: int) -> jax.Array:
    """Draws (count,) times, uniform between `first_t` and `last_t`; never 0, where networks must not be called."""
    t = jax.random.uniform(rng, (count,), minval=self.first_t, maxval=self.last_t)
    return jnp.maximum(t, jnp.finfo(jnp.float32).tiny)

  def logits(
    self, fake_score: BoundDenoiser, head: Any, z: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """Returns D of noised images z (B, H, W, C), (B,)."""
    return jnp.asarray(head(fake_score.bottleneck(z, logsnr, cond, self.module.place)))

  def generator_losses(
    self, nets: Nets, x: jax.Array, eps: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """Returns the loss of each generated image x before its weight, (B,), whose gradient only reaches the generator."""
    fake_score, head = jax.lax.stop_gradient((nets['fake_score'], nets['head']))
    logits = self.logits(fake_score, head, diffuse(x, eps, logsnr), logsnr, cond)
    return jax.nn.softplus(-logits)

  def critic_losses(
    self, nets: Nets, fake: jax.Array, real: jax.Array, logsnr: jax.Array, cond: Cond
  ) -> jax.Array:
    """Returns the loss of each pair of noised images before its weight, (B,): generated ones, without a gradient to them, and real ones."""
    fake_score, head = nets['fake_score'], nets['head']
    of_fake = self.logits(fake_score, head, jax.lax.stop_gradient(fake), logsnr, cond)
    of_real = self.logits(fake_score, head, real, logsnr, cond)
    return jax.nn.softplus(of_fake) + jax.nn.softplus(-of_real)


def make_gan(name: str, section: Any, context: Context) -> Gan | None:
  """Builds the section's GAN on the activations of the teacher's network; returns None if its weights are 0."""
  module = choose(f'{name}.gan_head', section.gan_head, HEADS)()
  if bool(section.gan_generator) != bool(section.gan_fake):
    raise UserError(f'{name}.gan_generator and {name}.gan_fake must both be positive, or both be 0')
  if not section.gan_fake:
    return None
  try:
    shape = context.teacher.bottleneck_shape(context.shape, module.place)
    module.check(shape)
  except ValueError as error:
    raise UserError(f'{name}.gan_fake with {name}.gan_head={section.gan_head}: {error}') from error
  return build(
    name,
    Gan,
    width=shape[-1],
    generator_weight=section.gan_generator,
    fake_weight=section.gan_fake,
    first_t=section.gan_first_t,
    last_t=section.gan_last_t,
    module=module,
  )
