"""Guided distillation, stage one: the student predicts in one call what its guided teacher predicts in two."""

import dataclasses
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, choose, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import (
  AS_BASE,
  WEIGHTINGS,
  Weighting,
  or_base,
  weighted_mse,
)
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.method import (
  Batch,
  Context,
  Loss,
  Nets,
  OneNetwork,
  Sampling,
  Student,
  TrainingSection,
)
from diffusion_distillation.networks.conditioning import Weights
from diffusion_distillation.networks.conditioning import weights as weights_of
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import GuidedByExample, check, with_input


@dataclasses.dataclass(frozen=True)
class GuidedSection(TrainingSection):
  """Stage one of guided distillation (Meng et al. 2023): a student of the guided base model that takes the weight as an input.

  The methods that follow `guided` in `methods` are distilled from this student, with a random weight for each example,
  and their students take the weight, too. The base needs `dataset.label_dropout`.
  """

  weights: tuple[float, ...] = key(
    (0.0, 4.0),
    'Smallest and largest weight W of guidance. Each example of a batch has a weight drawn uniformly between them.',
    NOT_NEGATIVE,
  )
  num_updates: int = key(100_000, 'Number of updates.', POSITIVE)
  learning_rate: float = key(1e-4, 'Peak learning rate.', POSITIVE)
  warmup: int = 500
  weighting: str = key(
    AS_BASE,
    'Weighting of the loss as a function of logsnr; `base`: the weighting of base training.',
    choices=(AS_BASE, *WEIGHTINGS),
  )


@flax.struct.dataclass
class GuidedDistillation(OneNetwork, Student):
  """The error of the student, which receives W, against x + W (x - x without the class) of its teacher (Meng et al. 2023, section 3.1).

  Attributes:
    schedule: t to logsnr.
    weighting: logsnr to the weight on the error in x.
    law: distribution of t in (0, 1].
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False)
  law: times.Law = flax.struct.field(pytree_node=False, default=times.Uniform())

  name = 'guided'
  needs = frozenset({'images', 'labels'})
  Section: ClassVar[type[TrainingSection]] = GuidedSection
  teaches = True

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> 'GuidedDistillation':
    """See `Student.from_config`; the teacher must be able to predict with and without the class."""
    takes = context.teacher.conditioning
    check(f'{name}.weights', Guidance(section.weights[-1]), takes, context.cond_dropout)
    weightings = or_base(context.weighting)
    weighting = choose(f'{name}.weighting', section.weighting, weightings)()
    return cls(context.schedule, weighting, context.uniform)

  @staticmethod
  def network(name: str, section: Any, denoise: Denoiser) -> Denoiser:
    """Returns the network with the weight as an input."""
    if weights_of(denoise.conditioning):
      raise UserError(
        f"methods: the base takes the guidance weight as an input already; leave out '{name}'"
      )
    given = tuple(section.weights)
    try:
      Weights(*given)
    except (TypeError, ValueError) as error:
      raise UserError(f'{name}.weights={given} must be two numbers, 0 <= LOW < HIGH') from error
    try:
      return with_input(denoise, given)
    except ValueError as error:
      raise UserError(f'{name}: {error}; choose another model.name or student.name') from error

  @staticmethod
  def sampling(section: Any) -> Sampling:
    """Returns how the student is sampled: in the number of steps of the base."""
    del section
    return Sampling(0, 'ddim', (0,))

  @property
  def calls(self) -> float:
    """One call of the student and two of the teacher."""
    return 3

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`."""
    return {'student': student, 'teacher': GuidedByExample(teacher)}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws `t` (B,) in (0, 1] and `eps` (B, H, W, C); the weights are part of `cond`."""
    rng_t, rng_eps = jax.random.split(rng)
    return {'t': self.law(rng_t, shape[0]), 'eps': jax.random.normal(rng_eps, shape)}

  def losses(self, nets: Nets, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Returns the weighted error of each example against the guided teacher, (B,)."""
    logsnr = self.schedule(jnp.maximum(batch['t'], jnp.finfo(jnp.float32).tiny))
    z = diffuse(batch['x'], batch['eps'], logsnr)
    target = jax.lax.stop_gradient(nets['teacher'](z, logsnr, batch['cond']))
    prediction = nets['student'](z, logsnr, batch['cond'], rng)
    return weighted_mse(self.weighting, logsnr, target, prediction)

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the mean of `losses`; see `Method.loss`."""
    del step
    return jnp.mean(self.losses(nets, batch, rng)), {}
