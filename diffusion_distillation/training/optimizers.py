"""Learning-rate schedules, moving averages, and the optimizer: Adam with gradient clipping by global norm."""

import dataclasses
import math
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import optax

from diffusion_distillation.config import FRACTION, POSITIVE, key

DECAYS = {
  'none': lambda done: jnp.ones_like(done),
  'linear': lambda done: 1.0 - done,
  'cosine': lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
}


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
  """The optimizer, Adam, of every stage."""

  b1: float = key(0.9, "Decay rate of Adam's first moment.", FRACTION)
  b2: float = key(0.999, "Decay rate of Adam's second moment.", FRACTION)
  eps: float = key(1e-8, "Adam's epsilon, which is added to the denominator.", POSITIVE)
  clip_norm: float = key(
    1.0,
    'Global norm to which gradients are clipped in base training and progressive distillation.',
    POSITIVE,
  )


@flax.struct.dataclass
class LearningRate:
  """Linear warm-up to `peak`, times a decay that reaches 0 after the last update unless it is 'none'.

  The numbers are pytree leaves, so that stages of different lengths share one compiled step.

  Attributes:
    peak: the peak learning rate.
    num_updates: number of updates of the stage, at the end of which the decay ends.
    warmup: number of updates until the peak is reached; 0 for no warm-up.
    decay: a name in DECAYS, which are functions of the fraction of updates done.
  """

  peak: float | jax.Array
  num_updates: int | jax.Array
  warmup: int | jax.Array = 0
  decay: str = flax.struct.field(pytree_node=False, default='none')

  def __call__(self, step: jax.Array) -> jax.Array:
    """Returns the learning rate of update `step` = 0, 1, ..., a scalar."""
    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(self.warmup, 1))
    done = jnp.minimum(1.0, step / self.num_updates)
    return self.peak * warm * DECAYS[self.decay](done)


def average_weight(decay: float | jax.Array, ramp: float, step: jax.Array) -> float | jax.Array:
  """Returns the weight of the new parameters in a moving average, 1 - decay, at the student's update `step` = 0, 1, ...

  The half-life of the average is at most `ramp` times the number of updates so far (Karras et al. 2022, appendix F.2). With
  `ramp` 0, the decay is constant.
  """
  if not ramp:
    return 1.0 - decay
  return jnp.maximum(1.0 - decay, -jnp.expm1(-math.log(2.0) / (ramp * (step + 1))))


@dataclasses.dataclass(frozen=True)
class Adam:
  """Adam with decoupled weight decay. Its updates still have to be multiplied by -learning_rate.

  Attributes:
    b1, b2, eps: parameters of Adam.
    weight_decay: decoupled weight decay of every parameter (as in the papers' optimizer).
    clip_norm: global norm to which gradients are clipped, after averaging over the batch.
    clipped_together: networks whose gradients are clipped by their joint norm; all other networks are clipped separately.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  clipped_together: tuple[str, ...] = ()

  def scales(self, norms: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the factors that clip the gradients of networks, by network; `norms` are the norms of their gradients."""
    joint = jnp.linalg.norm(jnp.array([norms[name] for name in self.clipped_together if name in norms]))
    clipped = {name: joint if name in self.clipped_together else norm for name, norm in norms.items()}
    return {
      name: jnp.where(norm < self.clip_norm, 1.0, self.clip_norm / norm)
      for name, norm in clipped.items()
    }

  def transform(self) -> optax.GradientTransformation:
    """Returns the optimizer of clipped gradients as an Optax gradient transformation."""
    return optax.chain(
      optax.identity(),  # in the place where checkpoints have the state of Optax's own clipping, which is empty as well
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      optax.add_decayed_weights(self.weight_decay),
    )
