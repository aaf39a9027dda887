"""Noise schedules: time t in [0, 1] to logsnr = log(alpha^2 / sigma^2).

Time runs from clean data (t = 0) to noise (t = 1). At exactly t = 0 the signal is clean: logsnr is
+inf, so that alpha = 1, sigma = 0, and the last step of every sampler returns x with no special case.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cosine:
  """alpha = cos(pi t / 2) with logsnr clipped to a range (Salimans & Ho 2022, released code).

  logsnr(t) = -2 log tan(a t + b), where a and b put the ends of the range at t = 1 and at t -> 0.
  """

  logsnr_min: float = -20.0
  logsnr_max: float = 20.0

  def __post_init__(self) -> None:
    if not -100.0 < self.logsnr_min < self.logsnr_max < 100.0:
      raise ValueError(
        f'logsnr_min ({self.logsnr_min}) must lie below logsnr_max ({self.logsnr_max}), both within +-100'
      )

  def __call__(self, t: jax.Array) -> jax.Array:
    """t of any shape, in [0, 1]; returns logsnr of the same shape, +inf where t is 0."""
    b = math.atan(math.exp(-0.5 * self.logsnr_max))
    a = math.atan(math.exp(-0.5 * self.logsnr_min)) - b
    return jnp.where(t == 0.0, jnp.inf, -2.0 * jnp.log(jnp.tan(a * t + b)))


Schedule = Cosine
SCHEDULES: dict[str, type] = {'cosine': Cosine}
