"""Base training: denoising in continuous time. The teacher is the data."""

from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion import Prediction, diffuse
from diffusion_distillation.methods.method import Batch, DenoiseFn, Loss, Params
from diffusion_distillation.schedules import Schedule
from diffusion_distillation.weightings import Weighting, weighted_mse


@flax.struct.dataclass
class Denoising:
  """Weighted error of the denoiser at t ~ U(0, 1] (Salimans & Ho 2022, algorithm 1).

  Attributes:
    schedule: t to logsnr.
    weighting: logsnr to the weight on the error in x.
  """

  schedule: Schedule = flax.struct.field(pytree_node=False)
  weighting: Weighting = flax.struct.field(pytree_node=False)

  def init(self, student_params: Params) -> dict[str, Params]:
    """The student alone."""
    return {'student': student_params}

  def loss(
    self,
    denoise: DenoiseFn,
    params: Mapping[str, Params],
    teacher: Params,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> Loss:
    """Mean weighted error over the batch; see `Method.loss`."""
    del teacher, step
    rng_t, rng_eps, rng_dropout = jax.random.split(rng, 3)
    x, label = batch['x'], batch['label']
    t = 1.0 - jax.random.uniform(rng_t, x.shape[:1])
    eps = jax.random.normal(rng_eps, x.shape)
    logsnr = self.schedule(t)
    z = diffuse(x, eps, logsnr)
    prediction = denoise(params['student'], z, logsnr, label, rng_dropout)
    loss = jnp.mean(weighted_mse(self.weighting, logsnr, Prediction(x, eps), prediction))
    return loss, {}
