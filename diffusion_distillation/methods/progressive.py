"""Progressive distillation: one step of the student replaces two or more steps of its teacher."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.diffusion.process import Prediction, diffuse, from_x, implied_x
from diffusion_distillation.diffusion.samplers import DDIM
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import AS_BASE, WEIGHTINGS, Weighting, weighted_mse
from diffusion_distillation.methods.method import (
  Batch,
  BoundDenoiser,
  Loss,
  Nets,
  OneNetwork,
  TrainingSection,
)
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.guidance import guide


@dataclasses.dataclass(frozen=True)
class DistillSection(TrainingSection):
  """The rounds of progressive distillation.

  A key that is "per round" is a tuple whose last entry is for the last round, whose second to last entry is for the round
  before, and so on. Its first entry also serves all earlier rounds: `distill.num_updates=(50_000, 100_000)` gives
  100,000 updates to the last round and 50,000 to each of the others.
  """

  start_steps: int = key(1024, 'Number of sampling steps of the base model.', POSITIVE)
  end_steps: int = key(1, 'Number of sampling steps of the last student.', POSITIVE)
  factor: tuple[int, ...] = key(
    (2,), 'Number of teacher steps that one student step replaces, per round.', AT_LEAST_TWO
  )
  from_weights: str = key(
    'ema',
    "The teacher's weights, which also initialize the student: its moving average, or its weights after the last "
    'update.',
    choices=('ema', 'last'),
  )
  num_updates: tuple[int, ...] = key(
    (50_000, 100_000, 100_000), 'Number of updates, per round.', POSITIVE
  )
  weighting: str = key(
    AS_BASE,
    'Weighting of the loss as a function of logsnr; `base`: the weighting of base training.',
    choices=(AS_BASE, *WEIGHTINGS),
  )
  learning_rate: tuple[float, ...] = key((1e-4,), 'Peak learning rate, per round.', POSITIVE)
  guidance: float = key(
    0.0,
    "Weight W of classifier-free guidance of the first round's teacher, the base; 0: none. The teachers of later rounds are "
    'students that have learned the guidance. Weights above 0 need a base that was trained with `dataset.label_dropout`.',
    NOT_NEGATIVE,
  )
  decay: str = 'linear'
  ema_decay: tuple[float, ...] = (0.0,)


@flax.struct.dataclass
class Progressive(OneNetwork):
  """One round of progressive distillation (Salimans & Ho 2022, algorithm 2).

  Attributes:
    num_steps: N, the student's number of sampling steps. A dynamic argument of the compiled step.
    schedule: t to logsnr, the same as the teacher's.
    weighting: logsnr to the weight on the error in x.
    factor: number of teacher steps per student step; the teacher has factor * N steps.
    law: distribution of t before it is rounded up to i / N.
    guidance: the weight W of the teacher's guidance.
  """

  num_steps: int | jax.Array
  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False)
  factor: int = flax.struct.field(pytree_node=False, default=2)
  law: times.Law = flax.struct.field(pytree_node=False, default=times.Uniform())
  guidance: float = flax.struct.field(pytree_node=False, default=0.0)

  name = 'progressive'
  needs = frozenset({'images', 'labels'})

  @property
  def calls(self) -> float:
    """One call of the student, and one of the teacher per teacher step, or two if it is guided."""
    return 1 + self.factor * (1 + bool(self.guidance))

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`."""
    return {'student': student, 'teacher': guide(teacher, make_guidance(self.guidance))}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws `i` (B,), integers in 1..N with t = i / N, and `eps` (B, H, W, C)."""
    rng_i, rng_eps = jax.random.split(rng)
    i = times.interval(self.law(rng_i, shape[0]), self.num_steps)
    return {'i': i, 'eps': jax.random.normal(rng_eps, shape)}

  def losses(self, nets: Nets, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Returns the weighted error of each example against the teacher's target, (B,)."""
    i, cond = batch['i'], batch['cond']
    logsnr_t = self.schedule(i / self.num_steps)
    z_t = diffuse(batch['x'], batch['eps'], logsnr_t)
    target = from_x(z_t, logsnr_t, self.target_x(nets['teacher'], z_t, i, cond))
    prediction = nets['student'](z_t, logsnr_t, cond, rng)
    return weighted_mse(self.weighting, logsnr_t, target, prediction)

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the mean of `losses`; see `Method.loss`."""
    del step
    return jnp.mean(self.losses(nets, batch, rng)), {}

  def target_x(self, teacher: BoundDenoiser, z_t: jax.Array, i: jax.Array, cond: Cond) -> jax.Array:
    """Returns the x with which one student step arrives where unclipped DDIM steps of the teacher arrive.

    The teacher takes `factor` equal steps from t = i / N to (i - 1) / N; i: (B,) integers in 1..N.
    """
    ddim = DDIM()

    def teach(z: jax.Array, logsnr: jax.Array) -> Prediction:
      return teacher(z, logsnr, cond)

    logsnr = [self.schedule((i - k / self.factor) / self.num_steps) for k in range(self.factor + 1)]
    z_s = z_t
    for k in range(self.factor):
      z_s = ddim(None, teach, z_s, logsnr[k], logsnr[k + 1])
    return jax.lax.stop_gradient(implied_x(z_t, z_s, logsnr[0], logsnr[-1]))
