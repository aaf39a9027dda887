"""Distribution matching distillation: a generator whose noised samples match the teacher's distribution."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, build, choose, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.diffusion.process import Prediction, diffuse, widen
from diffusion_distillation.diffusion.samplers import Clip, MultistepConsistency, clipped
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import AS_BASE, WEIGHTINGS, Weighting, or_base
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.distances import L2, Distance, Weighted, make_distance
from diffusion_distillation.methods.gan import Gan, GanSection, make_gan
from diffusion_distillation.methods.knowledge import regression
from diffusion_distillation.methods.method import (
  Batch,
  BoundDenoiser,
  Context,
  Loss,
  Nets,
  Params,
  Sampling,
  Student,
  StudentSection,
)
from diffusion_distillation.networks.guidance import guide


@dataclasses.dataclass(frozen=True)
class DMDSection(GanSection, StudentSection):
  """Distribution matching distillation, DMD (Yin et al. 2023)."""

  num_updates: int = 300_000
  learning_rate: float = 5e-5
  weight_decay: float = 0.01
  ema_decay: tuple[float, ...] = (0.0,)
  num_steps: int = key(1, 'Number of sampling steps of the generator.', POSITIVE)
  regression: float = key(
    0.25,
    'Weight of the regression on stored pairs, for generators of one step; 0 for no regression and no pairs.',
    NOT_NEGATIVE,
  )
  first_t: float = key(
    0.02, 'Smallest time at which the scores are compared: 0 < first_t < last_t <= 1.'
  )
  last_t: float = key(0.98, 'Largest time at which the scores are compared.')
  fake_learning_rate: float = key(
    5e-5, "Peak learning rate of the fake score and of the GAN's head.", POSITIVE
  )
  fake_updates: int = key(
    1,
    'Number of updates of the fake score per update of the generator. `num_updates` counts those of the fake score, and '
    'must be a multiple of this.',
    POSITIVE,
  )
  guidance: float = key(
    0.0,
    "Weight W of classifier-free guidance in the teacher's score; 0: none. The fake score is not guided. With a regression, "
    '`pairs.guidance` must be the same. Weights above 0 need a base that was trained with `dataset.label_dropout`.',
    NOT_NEGATIVE,
  )
  fake_law: str = key(
    'uniform',
    'Distribution of the times at which the fake score is trained: uniform over [0, 1], or as in base training (`time.law`).',
    choices=('uniform', 'base'),
  )
  fake_weighting: str = key(
    AS_BASE,
    "Weighting of the fake score's loss as a function of logsnr; `base`: the weighting of base training.",
    choices=(AS_BASE, *WEIGHTINGS),
  )
  simulated: bool = key(
    True,
    "For generators of several steps: whether their inputs in training come from the generator's own earlier steps "
    'instead of noised data.',
  )
  clip_x: bool = key(
    True,
    'For generators of several steps: whether x is clipped to [-1, 1] between the steps in training.',
  )


@dataclasses.dataclass(frozen=True)
class DMD2Section(DMDSection):
  """DMD2 (Yin et al. 2024): no pairs, more updates of the fake score, and a GAN."""

  num_updates: int = 500_000
  regression: float = 0.0
  fake_updates: int = 5
  gan_generator: float = 3e-3
  gan_fake: float = 1e-2


@flax.struct.dataclass
class DMD(Student):
  """DMD (Yin et al. 2023) and, depending on its options, DMD2 (Yin et al. 2024). All attributes are static.

  The student is the generator G. The frozen teacher provides the score of the data. The fake score, a network like the
  teacher that is trained alongside G, provides the score of G's samples.

  Attributes:
    schedule: t to logsnr.
    weighting: logsnr to the weight on the fake score's error in x.
    law: distribution of t in the fake score's training.
    first_t, last_t: range of times at which the scores are compared.
    regression: weight of the distance from the teacher's stored images; 0 for no regression.
    distance: distance of the regression.
    fake_updates: updates of the fake score per update of the generator (two time scales).
    num_steps: N, the generator's steps, at t = 1, (N-1)/N, ..., 1/N.
    simulated: for N > 1, whether its inputs come from its own earlier steps instead of noised data.
    clip: for N > 1, applied to x between the generator's steps, such as `Space.clip`; None for no clipping.
    gan: DMD2's GAN, or None.
    guidance: the weight W of guidance in the teacher's score (Yin et al. 2023, section 3.4).
    generator_turn: whether this update also changes the generator; see `at`.
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False)
  law: times.Law = flax.struct.field(pytree_node=False, default=times.Uniform())
  first_t: float = flax.struct.field(pytree_node=False, default=0.02)
  last_t: float = flax.struct.field(pytree_node=False, default=0.98)
  regression: float = flax.struct.field(pytree_node=False, default=0.25)
  distance: Distance = flax.struct.field(pytree_node=False, default=L2())
  fake_updates: int = flax.struct.field(pytree_node=False, default=1)
  num_steps: int = flax.struct.field(pytree_node=False, default=1)
  simulated: bool = flax.struct.field(pytree_node=False, default=True)
  clip: Clip | None = flax.struct.field(pytree_node=False, default=None)
  gan: Gan | None = flax.struct.field(pytree_node=False, default=None)
  guidance: float = flax.struct.field(pytree_node=False, default=0.0)
  generator_turn: bool = flax.struct.field(pytree_node=False, default=True)

  name = 'dmd'
  Section = DMDSection
  from_teacher = ('fake_score',)

  def __post_init__(self) -> None:
    if not 0.0 < self.first_t < self.last_t <= 1.0:
      raise ValueError(
        f'first_t={self.first_t} and last_t={self.last_t} must be 0 < first_t < last_t <= 1'
      )
    if self.num_steps > 1 and self.regression:
      raise ValueError(
        'stored pairs are for one step: regression must be 0 if num_steps is greater than 1'
      )

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> 'DMD':
    """See `Student.from_config`."""
    if section.num_updates % section.fake_updates:
      raise UserError(
        f'{name}.num_updates={section.num_updates} must be a multiple of {name}.fake_updates='
        f'{section.fake_updates}, the number of updates per update of the generator'
      )
    distance = make_distance(name, section)
    law = choose(f'{name}.fake_law', section.fake_law, {'uniform': context.uniform, 'base': context.law})
    weightings = or_base(context.weighting)
    keys = ('first_t', 'last_t', 'regression', 'fake_updates', 'num_steps', 'simulated', 'guidance')
    return build(
      name,
      cls,
      schedule=context.schedule,
      weighting=choose(f'{name}.fake_weighting', section.fake_weighting, weightings)(),
      law=law,
      distance=distance if section.regression else L2(),
      clip=context.clip if section.clip_x else None,
      gan=make_gan(name, section, context),
      **{key: section[key] for key in keys},
    )

  @staticmethod
  def sampling(section: Any) -> Sampling:
    """Returns how to sample the generator in its own number of steps."""
    steps = section.num_steps
    return Sampling(steps, 'multistep_consistency' if steps > 1 else 'ddim', (steps,))

  @staticmethod
  def learning_rates(section: Any) -> dict[str, float]:
    """Returns the learning rates of the generator, the fake score and the GAN's head."""
    fake = dict.fromkeys(('fake_score', 'head'), section.fake_learning_rate)
    return {**fake, 'student': section.learning_rate}

  @property
  def needs(self) -> frozenset[str]:
    """Images for the GAN and for inputs that are not simulated; pairs for the regression."""
    images = self.gan is not None or (self.num_steps > 1 and not self.simulated)
    return frozenset(
      {'labels'} | ({'images'} if images else set()) | ({'pairs'} if self.regression else set())
    )

  @property
  def trained(self) -> tuple[str, ...]:
    """The fake score and the GAN's head in every update, the student only in its turn."""
    trained = ('fake_score',) if self.gan is None else ('fake_score', 'head')
    return ('student', *trained) if self.generator_turn else trained

  @property
  def period(self) -> int:
    """The number of updates per update of the generator."""
    return self.fake_updates

  @property
  def calls(self) -> float:
    """Generator and fake score in every update; in the generator's turn its regression and both scores, a guided one twice."""
    always = 2.0 + (self.num_steps - 1) * self.simulated + (0.0 if self.gan is None else 1.0)
    in_turn = 2.0 + bool(self.guidance) + bool(self.regression) + (0.0 if self.gan is None else 0.5)
    return always + in_turn / self.fake_updates

  def at(self, step: int) -> 'DMD':
    """Updates the generator, along with the fake score, in the last of every `fake_updates` updates."""
    turn = step % self.fake_updates == self.fake_updates - 1
    return dataclasses.replace(self, generator_turn=turn)

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`."""
    guided = guide(teacher, make_guidance(self.guidance))
    nets = {'student': student, 'teacher': guided, 'fake_score': teacher}
    if self.regression:
      nets['distance'] = Weighted(self.distance)
    return nets if self.gan is None else nets | {'head': self.gan.head}

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """Initializes the generator from `student`, the fake score from `teacher`, and a new head."""
    networks = {'student': student, 'fake_score': teacher}
    return networks if self.gan is None else networks | {'head': self.gan.init(rng)}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws `z`, the generator's noise, and times and noise for each network that receives its samples."""
    size, rngs = shape[0], iter(jax.random.split(rng, 9))

    def normal() -> jax.Array:
      return jax.random.normal(next(rngs), shape)

    def between() -> jax.Array:
      return jax.random.uniform(next(rngs), (size,), minval=self.first_t, maxval=self.last_t)

    drawn = {'z': normal(), 't': between(), 'eps': normal()}
    drawn |= {'fake_t': self.law(next(rngs), size), 'fake_eps': normal()}
    if self.num_steps > 1:
      drawn['step'] = jax.random.randint(next(rngs), (size,), 1, self.num_steps + 1)
      drawn['keys'] = jax.random.split(next(rngs), size)
    if self.gan is not None:
      drawn['gan_t'] = self.gan.draw_times(next(rngs), size)
      drawn['gan_eps'] = normal()
    return drawn

  def generate(self, student: BoundDenoiser, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Returns G's images (B, H, W, C), generated from noise, from its own earlier steps, or from noised data.

    Each example is at a step drawn at random (Yin et al. 2024, sections 4.4 and 4.5); no gradient flows into earlier
    steps.
    """
    z, cond, count = batch['z'], batch['cond'], self.num_steps
    logsnr = [self.schedule(jnp.full(z.shape[0], k / count)) for k in range(1, count + 1)]
    if count == 1:
      return student(z, logsnr[0], cond, rng).x
    at = batch['step']
    inputs, logsnr_at = z, jnp.stack(logsnr)[at - 1, jnp.arange(len(at))]
    if not self.simulated:
      inputs = jnp.where(widen(at == count, z), z, diffuse(batch['x'], z, logsnr_at))
      return student(inputs, logsnr_at, cond, rng).x
    step, before = MultistepConsistency(), jax.lax.stop_gradient(student)

    def denoise(z: jax.Array, logsnr: jax.Array) -> Prediction:
      return before(z, logsnr, cond)

    earlier = clipped(denoise, self.clip)

    for k in range(count - 1, 0, -1):
      keys = jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(batch['keys'])
      z = step(keys, earlier, z, logsnr[k], logsnr[k - 1])
      inputs = jnp.where(widen(at == k, z), z, inputs)
    return student(inputs, logsnr_at, cond, rng).x

  def matching_losses(self, nets: Nets, x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns a loss whose gradient in x is the weighted gradient of KL(fake || real), and the gradient's size, both (B,).

    The gradient is (mu_fake - mu_real) / mean|x - mu_real| at a noised x, divided by the number of pixels (Yin et al.
    2023, Eq. 7 and 8). It flows only into x.
    """
    logsnr = self.schedule(batch['t'])
    z = jax.lax.stop_gradient(diffuse(x, batch['eps'], logsnr))
    fake, real = (nets[name](z, logsnr, batch['cond']).x for name in ('fake_score', 'teacher'))
    pixels = tuple(range(1, x.ndim))
    scale = jnp.maximum(jnp.mean(jnp.abs(x - real), pixels), 1e-6)
    gradient = jax.lax.stop_gradient((fake - real) / widen(scale, x))
    target = jax.lax.stop_gradient(x) - gradient
    return 0.5 * jnp.mean(jnp.square(x - target), pixels), jnp.sqrt(
      jnp.mean(jnp.square(gradient), pixels)
    )

  def fake_losses(
    self, fake_score: BoundDenoiser, x: jax.Array, batch: Batch, rng: jax.Array | None
  ) -> jax.Array:
    """Returns the fake score's denoising loss, (B,), with generated x as its data."""
    data = {
      'x': jax.lax.stop_gradient(x),
      'cond': batch['cond'],
      't': batch['fake_t'],
      'eps': batch['fake_eps'],
    }
    return Denoising(self.schedule, self.weighting).losses(fake_score, data, rng)

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the sum of the networks' losses, each of which only has gradients for one network; see `Method.loss`.

    The metrics are losses before their weights.
    """
    del step
    student = nets['student']
    x = self.generate(student, batch, rng)
    fake = jnp.mean(self.fake_losses(nets['fake_score'], x, batch, rng))
    total, metrics = fake, {'fake_loss': fake}
    if self.gan is not None:
      critic = jnp.mean(self._critic_losses(nets, x, batch))
      total, metrics['critic_loss'] = total + self.gan.fake_weight * critic, critic
    if not self.generator_turn:
      return total, metrics
    matching, size = self.matching_losses(nets, x, batch)
    total, metrics['dm_gradient'] = total + jnp.mean(matching), jnp.mean(size)
    if self.regression:
      apart = jnp.mean(regression(student, nets['distance'], self.schedule, batch['pairs'], rng))
      total, metrics['regression'] = total + self.regression * apart, apart
    if self.gan is not None:
      logsnr = self.schedule(batch['gan_t'])
      seen = (x, batch['gan_eps'], logsnr, batch['cond'])
      fooled = jnp.mean(self.gan.generator_losses(nets, *seen))
      total, metrics['gan_loss'] = total + self.gan.generator_weight * fooled, fooled
    return total, metrics

  def _critic_losses(self, nets: Nets, x: jax.Array, batch: Batch) -> jax.Array:
    assert self.gan is not None
    logsnr, eps = self.schedule(batch['gan_t']), batch['gan_eps']
    fake, real = diffuse(x, eps, logsnr), diffuse(batch['x'], eps, logsnr)
    return self.gan.critic_losses(nets, fake, real, logsnr, batch['cond'])


@flax.struct.dataclass
class DMD2(DMD):
  """DMD with the defaults of DMD2: no pairs, a GAN, and a fake score that is updated more often."""

  name = 'dmd2'
  Section = DMD2Section
