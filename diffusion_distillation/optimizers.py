"""Learning-rate schedules and the optimizer: Adam on gradients clipped to a global norm."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class LearningRate:
  """Linear warm-up to `peak`, then constant, or linear decay to 0 at the last update.

  All are pytree leaves: stages of different lengths share one compiled step.

  Attributes:
    peak: the highest learning rate.
    warmup: updates until it is reached; 0 for none.
    decay: updates after which it is 0, counted from the start; 0 for no decay.
  """

  peak: float | jax.Array
  warmup: int | jax.Array = 0
  decay: int | jax.Array = 0

  def __call__(self, step: jax.Array) -> jax.Array:
    """The rate of update `step` = 0, 1, ...: a scalar."""
    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(self.warmup, 1))
    left = jnp.maximum(0.0, 1.0 - step / jnp.maximum(self.decay, 1))
    return self.peak * warm * jnp.where(self.decay > 0, left, 1.0)


@dataclasses.dataclass(frozen=True)
class Adam:
  """Adam with decoupled weight decay; its updates are yet to be scaled by -learning_rate.

  Attributes:
    b1, b2, eps: Adam's.
    weight_decay: decoupled, on every parameter (as the papers' optimizer did).
    clip_norm: global norm that gradients are clipped to, after the mean over the batch.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0

  def transform(self) -> optax.GradientTransformation:
    """The optax chain; init and update as usual."""
    return optax.chain(
      optax.clip_by_global_norm(self.clip_norm),
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      optax.add_decayed_weights(self.weight_decay),
    )
