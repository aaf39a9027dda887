"""Distribution matching distillation: a generator whose samples, noised, look to the teacher like its own."""

import dataclasses
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction, diffuse, widen
from diffusion_distillation.diffusion.samplers import MultistepConsistency
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import Weighting
from diffusion_distillation.methods.denoising import Denoising
from diffusion_distillation.methods.distances import L2, Distance
from diffusion_distillation.methods.gan import Gan
from diffusion_distillation.methods.knowledge import regression
from diffusion_distillation.methods.method import Batch, DenoiseFn, Loss, Params, StudentSection


@dataclasses.dataclass(frozen=True)
class DMDSection(StudentSection):
  """Distribution matching distillation, DMD (Yin et al. 2023)."""

  num_updates: int = 300_000
  learning_rate: float = 5e-5
  weight_decay: float = 0.01
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
  gan_generator: float = key(
    0.0,
    "Weight of the generator's GAN loss. This and `gan_fake` are both positive, or both 0 for no GAN.",
    NOT_NEGATIVE,
  )
  gan_fake: float = key(0.0, "Weight of the critic's GAN loss.", NOT_NEGATIVE)
  simulated: bool = key(
    True,
    "For generators of several steps: whether their inputs in training come from the generator's own earlier steps, or "
    'are noised data.',
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
class DMD:
  """DMD (Yin et al. 2023) and, by its options, DMD2 (Yin et al. 2024); all of it static.

  Three networks of one kind: the student is the generator G, the frozen teacher the score of the data, and the fake
  score, which is trained meanwhile, that of G's samples.

  Attributes:
    schedule: t to logsnr.
    weighting: logsnr to the weight on the fake score's error in x.
    law: of t in the fake score's training.
    first_t, last_t: between which the scores are compared.
    regression: weight of the distance from the teacher's stored images; 0 for none.
    distance: of that regression.
    fake_updates: updates of the fake score for each one of the generator (two time scales).
    num_steps: N, the generator's steps, at t = 1, (N-1)/N, ..., 1/N.
    simulated: where N > 1, whether its inputs come from its own earlier steps, or are noised data.
    clip_x: where N > 1, whether x is clipped to [-1, 1] between the generator's steps.
    gan: DMD2's GAN, or None.
    generator_turn: whether this update changes the generator, too; see `at`.
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
  clip_x: bool = flax.struct.field(pytree_node=False, default=True)
  gan: Gan | None = flax.struct.field(pytree_node=False, default=None)
  generator_turn: bool = flax.struct.field(pytree_node=False, default=True)

  def __post_init__(self) -> None:
    if not 0.0 < self.first_t < self.last_t <= 1.0:
      raise ValueError(
        f'first_t={self.first_t} and last_t={self.last_t} must be 0 < first_t < last_t <= 1'
      )
    if self.num_steps > 1 and self.regression:
      raise ValueError(
        'stored pairs are of one step: regression must be 0 where num_steps is more than 1'
      )

  @property
  def networks(self) -> tuple[str, ...]:
    """The fake score and the GAN's head always, the student in its turn."""
    trained = ('fake_score',) if self.gan is None else ('fake_score', 'head')
    return ('student', *trained) if self.generator_turn else trained

  @property
  def period(self) -> int:
    """One update of the generator."""
    return self.fake_updates

  @property
  def calls(self) -> float:
    """Generator and fake score always; in its turn, the generator's regression and both scores."""
    always = 2.0 + (self.num_steps - 1) * self.simulated + (0.0 if self.gan is None else 1.0)
    in_turn = 2.0 + bool(self.regression) + (0.0 if self.gan is None else 0.5)
    return always + in_turn / self.fake_updates

  def at(self, step: int) -> 'DMD':
    """The generator is updated after the fake score has been `fake_updates` - 1 times, together with it."""
    turn = step % self.fake_updates == self.fake_updates - 1
    return dataclasses.replace(self, generator_turn=turn)

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """The generator where the student starts, the fake score where the teacher is, and a new head."""
    networks = {'student': student, 'fake_score': teacher}
    return networks if self.gan is None else networks | {'head': self.gan.init(rng)}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """`z`, the generator's noise, and times and noise for each of the networks that look at its samples."""
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
      drawn['gan_t'] = between()
      drawn['gan_eps'] = normal()
    return drawn

  def generate(
    self, denoise: DenoiseFn, student: Params, batch: Batch, rng: jax.Array | None
  ) -> jax.Array:
    """G's images (B, H, W, C): of noise, or of what its own earlier steps leave of noise.

    Each example is at one of the steps, drawn for it (Yin et al. 2024, sections 4.4 and 4.5); no gradient goes to
    the steps before.
    """
    z, label, count = batch['z'], batch['label'], self.num_steps
    logsnr = [self.schedule(jnp.full(z.shape[0], k / count)) for k in range(1, count + 1)]
    if count == 1:
      return denoise(student, z, logsnr[0], label, rng).x
    at = batch['step']
    inputs, logsnr_at = z, jnp.stack(logsnr)[at - 1, jnp.arange(len(at))]
    if not self.simulated:
      inputs = jnp.where(widen(at == count, z), z, diffuse(batch['x'], z, logsnr_at))
      return denoise(student, inputs, logsnr_at, label, rng).x
    step, before = MultistepConsistency(clip_x=self.clip_x), jax.lax.stop_gradient(student)

    def earlier(z: jax.Array, logsnr: jax.Array) -> Prediction:
      return denoise(before, z, logsnr, label)

    for k in range(count - 1, 0, -1):
      keys = jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(batch['keys'])
      z = step(keys, earlier, z, logsnr[k], logsnr[k - 1])
      inputs = jnp.where(widen(at == k, z), z, inputs)
    return denoise(student, inputs, logsnr_at, label, rng).x

  def matching_losses(
    self, denoise: DenoiseFn, fake_score: Params, teacher: Params, x: jax.Array, batch: Batch
  ) -> tuple[jax.Array, jax.Array]:
    """A loss whose gradient with respect to x is that of KL(fake || real), weighted; and its size; both (B,).

    Yin et al. 2023, Eq. 7 and 8 as computed: (mu_fake - mu_real) / mean|x - mu_real| at a noised x, over the number
    of pixels. x alone is moved by it.
    """
    logsnr = self.schedule(batch['t'])
    z = jax.lax.stop_gradient(diffuse(x, batch['eps'], logsnr))
    fake, real = (denoise(p, z, logsnr, batch['label']).x for p in (fake_score, teacher))
    pixels = tuple(range(1, x.ndim))
    scale = jnp.maximum(jnp.mean(jnp.abs(x - real), pixels), 1e-6)
    gradient = jax.lax.stop_gradient((fake - real) / widen(scale, x))
    target = jax.lax.stop_gradient(x) - gradient
    return 0.5 * jnp.mean(jnp.square(x - target), pixels), jnp.sqrt(
      jnp.mean(jnp.square(gradient), pixels)
    )

  def fake_losses(
    self, denoise: DenoiseFn, fake_score: Params, x: jax.Array, batch: Batch, rng: jax.Array | None
  ) -> jax.Array:
    """The fake score's denoising loss on generated x, (B,), which is data to it."""
    data = {
      'x': jax.lax.stop_gradient(x),
      'label': batch['label'],
      't': batch['fake_t'],
      'eps': batch['fake_eps'],
    }
    return Denoising(self.schedule, self.weighting).losses(denoise, fake_score, data, rng)

  def loss(
    self,
    denoise: DenoiseFn,
    params: Mapping[str, Params],
    frozen: Mapping[str, Params],
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array,
  ) -> Loss:
    """The sum of all networks' losses, each of which moves one network; see `Method.loss`."""
    del step
    student, fake_score = params['student'], params['fake_score']
    x = self.generate(denoise, student, batch, rng)
    fake = jnp.mean(self.fake_losses(denoise, fake_score, x, batch, rng))
    total, metrics = fake, {'fake_loss': fake}
    if self.gan is not None:
      critic = jnp.mean(self._critic_losses(denoise, params, x, batch))
      total, metrics['critic_loss'] = total + critic, critic
    if not self.generator_turn:
      return total, metrics
    matching, size = self.matching_losses(denoise, fake_score, frozen['teacher'], x, batch)
    total, metrics['dm_gradient'] = total + jnp.mean(matching), jnp.mean(size)
    if self.regression:
      weights = frozen.get('distance')
      apart = jnp.mean(
        regression(denoise, student, self.schedule, self.distance, weights, batch['pairs'], rng)
      )
      total, metrics['regression'] = total + self.regression * apart, apart
    if self.gan is not None:
      logsnr, head = self.schedule(batch['gan_t']), params['head']
      seen = (x, batch['gan_eps'], logsnr, batch['label'])
      fooled = jnp.mean(self.gan.generator_losses(denoise, fake_score, head, *seen))
      total, metrics['gan_loss'] = total + fooled, fooled
    return total, metrics

  def _critic_losses(
    self, denoise: DenoiseFn, params: Mapping[str, Params], x: jax.Array, batch: Batch
  ) -> jax.Array:
    assert self.gan is not None
    logsnr, eps, label = self.schedule(batch['gan_t']), batch['gan_eps'], batch['label']
    fake, real = diffuse(x, eps, logsnr), diffuse(batch['x'], eps, logsnr)
    critic = (params['fake_score'], params['head'])
    return self.gan.critic_losses(denoise, *critic, fake, real, logsnr, label)
