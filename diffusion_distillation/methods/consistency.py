"""Consistency distillation: the student learns to predict the same image at neighbouring points of a teacher's trajectory."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import FRACTION, POSITIVE, choose, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction, diffuse, widen
from diffusion_distillation.diffusion.samplers import DDIM, SAMPLERS, Sampler
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, Constant, Weighting
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.distances import L2, Distance, Weighted, make_distance
from diffusion_distillation.methods.method import (
  Batch,
  Context,
  Loss,
  Nets,
  OneNetwork,
  Sampling,
  Student,
  StudentSection,
)

# Each step only depends on z and the two noise levels, and draws no noise.
SOLVERS: dict[str, type[Sampler]] = {name: SAMPLERS[name] for name in ('ddim', 'euler', 'heun', 'rk4')}


@dataclasses.dataclass(frozen=True)
class ConsistencySection(StudentSection):
  """Consistency distillation."""

  num_updates: int = 200_000
  weighting: str = key(
    'constant', 'Weighting of the distance as a function of logsnr.', choices=WEIGHTINGS
  )
  start_intervals: int = key(
    18,
    "Number of intervals into which [0, 1] is divided at the first update. The student's predictions are matched at the two "
    "ends of an interval. The paper's N counts EDM's noise levels from the highest to the lowest: its N = 18 corresponds to "
    '17 intervals here.',
    POSITIVE,
  )
  end_intervals: int = key(
    18,
    'Number of intervals at the last update, counted in the same way; at least `start_intervals`.',
    POSITIVE,
  )
  solver: str = key(
    'heun',
    "Sampler for the teacher's step from one end of an interval to the other.",
    choices=('ddim', 'euler', 'heun', 'rk4'),
  )
  target_decay: float = key(
    0.0,
    "Decay rate of the moving average of the student's weights that computes the target, independent of `ema_decay`; 0 uses "
    'the current weights, as in the paper on CIFAR-10 (on ImageNet-64: 0.95).',
    FRACTION,
  )
  sample_steps: tuple[int, ...] = key(
    (1, 2, 4),
    'Numbers of sampling steps with which the student is evaluated.',
    POSITIVE,
    distinct=True,
  )


@flax.struct.dataclass
class Consistency(OneNetwork, Student):
  """Consistency distillation (Song et al. 2023, algorithm 2).

  The consistency function is the network's x^ at t > 0 and z itself at t = 0, where the network is never called. For the
  outputs v, eps, both and EDM's F, the parameterization ensures that x^ -> z as t -> 0. For the output x, this boundary
  condition is learned from the first interval, whose target is z at t = 0.

  Attributes:
    num_updates: K, the number of updates of the stage; an argument of the compiled step, like the next two.
    start_intervals: s_0, the number of intervals of [0, 1] at the first update.
    end_intervals: s_1, the number at the last update; equal to s_0 for a fixed grid.
    schedule: maps t to logsnr.
    weighting: maps logsnr to the weight of the distance.
    distance: distance between images.
    solver: sampler for the teacher's step, without clipping.
    law: distribution of t before it is rounded up to the end of an interval.
    follows_average: whether a moving average of the student computes the target, instead of the student itself.
  """

  num_updates: int | jax.Array
  start_intervals: int | jax.Array
  end_intervals: int | jax.Array
  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False, default=Constant())
  distance: Distance = flax.struct.field(pytree_node=False, default=L2())
  solver: Sampler = flax.struct.field(pytree_node=False, default=DDIM())
  law: times.Law = flax.struct.field(pytree_node=False, default=times.Uniform())
  follows_average: bool = flax.struct.field(pytree_node=False, default=True)

  name = 'consistency'
  Section = ConsistencySection
  needs = frozenset({'images', 'labels'})

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> 'Consistency':
    """See `Student.from_config`."""
    if section.start_intervals > section.end_intervals:
      raise UserError(
        f'{name}.start_intervals={section.start_intervals} must not be more than '
        f'{name}.end_intervals={section.end_intervals}'
      )
    return cls(
      num_updates=section.num_updates,
      start_intervals=section.start_intervals,
      end_intervals=section.end_intervals,
      schedule=context.schedule,
      weighting=choose(f'{name}.weighting', section.weighting, WEIGHTINGS)(),
      distance=make_distance(name, section),
      solver=choose(f'{name}.solver', section.solver, SOLVERS)(),
      law=context.uniform,
      follows_average=section.target_decay > 0.0,
    )

  @staticmethod
  def sampling(section: Any) -> Sampling:
    """Returns multistep consistency sampling, with one step by default."""
    if not section.sample_steps:
      raise UserError('consistency.sample_steps=() must not be empty')
    return Sampling(1, 'multistep_consistency', tuple(section.sample_steps))

  @property
  def calls(self) -> float:
    """The calls of the student, of the target and of the solver."""
    return 2 + self.solver.calls_per_step

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`."""
    nets = {'student': student, 'teacher': teacher, 'distance': Weighted(self.distance)}
    return nets | {'average': student} if self.follows_average else nets

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws `t` (B,) in (0, 1], not yet rounded to the end of an interval, and `eps` (B, H, W, C)."""
    rng_t, rng_eps = jax.random.split(rng)
    return {'t': self.law(rng_t, shape[0]), 'eps': jax.random.normal(rng_eps, shape)}

  def num_intervals(self, step: jax.Array) -> jax.Array:
    """Returns N(k), whose square grows linearly over the stage (Song et al. 2023, appendix C)."""
    start, end = jnp.float32(self.start_intervals), jnp.float32(self.end_intervals)
    squared = step / self.num_updates * ((end + 1.0) ** 2 - start**2) + start**2
    return jnp.clip(jnp.ceil(jnp.sqrt(squared) - 1.0) + 1.0, start, end)

  def losses(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> jax.Array:
    """Returns the weighted distance of each example, (B,)."""
    count, cond, student = self.num_intervals(step), batch['cond'], nets['student']
    i = times.interval(batch['t'], count)
    logsnr_t, logsnr_s = self.schedule(i / count), self.schedule((i - 1) / count)
    z_t = diffuse(batch['x'], batch['eps'], logsnr_t)

    def teach(z: jax.Array, logsnr: jax.Array) -> Prediction:
      prediction: Prediction = nets['teacher'](z, logsnr, cond)
      return prediction

    z_s = self.solver(None, teach, z_t, logsnr_t, logsnr_s)
    follower = nets['average'] if self.follows_average else student
    clean = i == 1  # z_s is an image, and the target; the network's output for it is not used
    x_s = follower(z_s, jnp.where(clean, 0.0, logsnr_s), cond).x
    target = jax.lax.stop_gradient(jnp.where(widen(clean, z_s), z_s, x_s))
    x_t = student(z_t, logsnr_t, cond, rng).x
    return self.weighting(logsnr_t) * nets['distance'](x_t, target)

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the mean of `losses`; see `Method.loss`."""
    losses = self.losses(nets, batch, rng, step)
    return jnp.mean(losses), {'intervals': self.num_intervals(step)}
