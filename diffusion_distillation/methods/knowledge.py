"""Knowledge distillation: one step that maps the teacher's noise to the teacher's image."""

import dataclasses
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.methods.distances import L2, Distance, Weights
from diffusion_distillation.methods.method import (
  Batch,
  DenoiseFn,
  Loss,
  OneNetwork,
  Params,
  StudentSection,
)


@dataclasses.dataclass(frozen=True)
class KnowledgeSection(StudentSection):
  """Knowledge distillation: regression on stored pairs; see `pairs`."""


def regression(
  denoise: DenoiseFn,
  student: Params,
  schedule: Schedule,
  distance: Distance,
  weights: Weights,
  pairs: Batch,
  rng: jax.Array | None,
) -> jax.Array:
  """The distance of each stored image from what the student draws of its noise in one step, (B,)."""
  noise = pairs['noise']
  logsnr = schedule(jnp.ones(noise.shape[0]))
  return distance(denoise(student, noise, logsnr, pairs['label'], rng).x, pairs['image'], weights)


@flax.struct.dataclass
class Knowledge(OneNetwork):
  """Regression on stored (noise, image) pairs of the teacher (Luhman & Luhman 2021); all of it static.

  Attributes:
    schedule: t to logsnr.
    distance: between images.
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  distance: Distance = flax.struct.field(pytree_node=False, default=L2())

  @property
  def calls(self) -> float:
    """The student's: the teacher has done its part."""
    return 1

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Nothing: the pairs have their noise."""
    del rng, shape
    return {}

  def loss(
    self,
    denoise: DenoiseFn,
    params: Mapping[str, Params],
    frozen: Mapping[str, Params],
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array,
  ) -> Loss:
    """The mean of `regression`; see `Method.loss`."""
    del step
    weights = frozen.get('distance')
    losses = regression(
      denoise, params['student'], self.schedule, self.distance, weights, batch['pairs'], rng
    )
    return jnp.mean(losses), {}
