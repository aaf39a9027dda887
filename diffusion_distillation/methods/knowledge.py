"""Knowledge distillation: the student learns to map the teacher's noise to the teacher's image in one step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.methods.distances import L2, Distance, Weighted, make_distance
from diffusion_distillation.methods.method import (
  Batch,
  BoundDenoiser,
  Context,
  Loss,
  Nets,
  OneNetwork,
  Student,
  StudentSection,
)


@dataclasses.dataclass(frozen=True)
class KnowledgeSection(StudentSection):
  """Knowledge distillation: regression on stored pairs; see `pairs`."""


def regression(
  student: BoundDenoiser,
  distance: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: Schedule,
  pairs: Batch,
  rng: jax.Array | None,
) -> jax.Array:
  """Returns the distance between each stored image and the student's one-step sample from its noise, (B,)."""
  noise = pairs['noise']
  logsnr = schedule(jnp.ones(noise.shape[0]))
  return distance(student(noise, logsnr, pairs['cond'], rng).x, pairs['image'])


@flax.struct.dataclass
class Knowledge(OneNetwork, Student):
  """Regression on stored (noise, image) pairs of the teacher (Luhman & Luhman 2021); all attributes are static.

  Attributes:
    schedule: maps t to logsnr.
    distance: distance between images.
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  distance: Distance = flax.struct.field(pytree_node=False, default=L2())

  name = 'knowledge'
  Section = KnowledgeSection
  needs = frozenset({'pairs'})

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> 'Knowledge':
    """See `Student.from_config`."""
    return cls(context.schedule, make_distance(name, section))

  @property
  def calls(self) -> float:
    """One call of the student; the teacher's samples are stored."""
    return 1

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`; the teacher is not needed, because its samples are stored."""
    del teacher
    return {'student': student, 'distance': Weighted(self.distance)}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws nothing; the noise is in the pairs."""
    del rng, shape
    return {}

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the mean of `regression`; see `Method.loss`."""
    del step
    pairs = batch['pairs']
    losses = regression(nets['student'], nets['distance'], self.schedule, pairs, rng)
    return jnp.mean(losses), {}
