"""Training of the base model: denoising of the data, in continuous or discrete time."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.config import POSITIVE, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction, diffuse
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import Weighting, weighted_mse
from diffusion_distillation.methods.method import (
  Batch,
  BoundDenoiser,
  Loss,
  Nets,
  OneNetwork,
  TrainingSection,
)


@dataclasses.dataclass(frozen=True)
class TrainSection(TrainingSection):
  """Training of the base model."""

  num_updates: int = key(500_000, 'Number of updates.', POSITIVE)
  learning_rate: float = key(2e-4, 'Peak learning rate.', POSITIVE)
  warmup: int = 1000


@flax.struct.dataclass
class Denoising(OneNetwork):
  """The weighted error of the denoiser (Salimans & Ho 2022, algorithm 1).

  Attributes:
    schedule: maps t to logsnr.
    weighting: maps logsnr to the weight of the error in x.
    law: distribution of t in (0, 1].
    num_steps: N for discrete time, t in {1/N, ..., 1}; 0 for continuous time.
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False)
  law: times.Law = flax.struct.field(pytree_node=False, default=times.Uniform())
  num_steps: int = flax.struct.field(pytree_node=False, default=0)

  name = 'denoising'
  needs = frozenset({'images', 'labels'})

  @property
  def calls(self) -> float:
    """One call of the student."""
    return 1

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """See `Method.networks`."""
    del teacher
    return {'student': student}

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws `t` (B,) in (0, 1] and `eps` (B, H, W, C)."""
    rng_t, rng_eps = jax.random.split(rng)
    t = self.law(rng_t, shape[0])
    if self.num_steps:
      t = times.interval(t, self.num_steps) / self.num_steps
    return {'t': t, 'eps': jax.random.normal(rng_eps, shape)}

  def losses(self, denoise: BoundDenoiser, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Returns the weighted error of each example, (B,)."""
    x, eps = batch['x'], batch['eps']
    logsnr = self.schedule(jnp.maximum(batch['t'], jnp.finfo(jnp.float32).tiny))
    z = diffuse(x, eps, logsnr)
    prediction = denoise(z, logsnr, batch['cond'], rng)
    return weighted_mse(self.weighting, logsnr, Prediction(x, eps), prediction)

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the mean of `losses`; see `Method.loss`."""
    del step
    return jnp.mean(self.losses(nets['student'], batch, rng)), {}
