"""Progressive distillation: a student whose one step does two steps of its teacher."""

from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion import Prediction, diffuse, from_x, implied_x
from diffusion_distillation.methods.method import Batch, DenoiseFn, Loss, Params
from diffusion_distillation.samplers import DDIM
from diffusion_distillation.schedules import Schedule
from diffusion_distillation.weightings import Weighting, weighted_mse


@flax.struct.dataclass
class Progressive:
  """One round of progressive distillation (Salimans & Ho 2022, algorithm 2).

  Attributes:
    num_steps: N, the student's sampling steps; the teacher's are 2 N. An argument of the compiled step.
    schedule: t to logsnr, the teacher's.
    weighting: logsnr to the weight on the error in x.
  """

  num_steps: int | jax.Array
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
    del step
    rng_i, rng_eps, rng_dropout = jax.random.split(rng, 3)
    x, label = batch['x'], batch['label']
    i = jax.random.randint(rng_i, x.shape[:1], 1, self.num_steps + 1)
    eps = jax.random.normal(rng_eps, x.shape)
    logsnr_t = self.schedule(i / self.num_steps)
    z_t = diffuse(x, eps, logsnr_t)
    target = from_x(z_t, logsnr_t, self.target_x(denoise, teacher, z_t, i, label))
    prediction = denoise(params['student'], z_t, logsnr_t, label, rng_dropout)
    loss = jnp.mean(weighted_mse(self.weighting, logsnr_t, target, prediction))
    return loss, {}

  def target_x(
    self,
    denoise: DenoiseFn,
    teacher: Params,
    z_t: jax.Array,
    i: jax.Array,
    label: jax.Array | None,
  ) -> jax.Array:
    """The x that takes the student in one step where two unclipped DDIM steps take the teacher.

    From t = i / N by t' = (i - 1/2) / N to t'' = (i - 1) / N; i: (B,) integers in 1..N.
    """
    ddim = DDIM(clip_x=False)

    def teach(z: jax.Array, logsnr: jax.Array) -> Prediction:
      return denoise(teacher, z, logsnr, label)

    logsnr_t = self.schedule(i / self.num_steps)
    logsnr_mid = self.schedule((i - 0.5) / self.num_steps)
    logsnr_s = self.schedule((i - 1) / self.num_steps)
    z_mid = ddim(None, teach, z_t, logsnr_t, logsnr_mid)
    z_s = ddim(None, teach, z_mid, logsnr_mid, logsnr_s)
    return jax.lax.stop_gradient(implied_x(z_t, z_s, logsnr_t, logsnr_s))
