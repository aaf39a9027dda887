"""Noise schedules, which map time t in [0, 1] to logsnr = log(alpha^2 / sigma^2).

Time runs from clean data (t = 0) to noise (t = 1). At exactly t = 0 there is no noise: logsnr is +inf, so that
alpha = 1 and sigma = 0, and the last step of a sampler returns x without a special case. At every later time logsnr is
finite and at most logsnr_max.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion.discrete import BETAS, Discrete


def _clean_at_zero(t: jax.Array, logsnr: jax.Array) -> jax.Array:
  return jnp.where(t == 0.0, jnp.inf, logsnr)


@dataclasses.dataclass(frozen=True)
class Cosine:
  """alpha = cos(pi t / 2) with logsnr clipped to a range (Salimans & Ho 2022, released code).

  logsnr(t) = -2 log tan(a t + b), where a and b map t = 1 and t -> 0 to the ends of the range.
  """

  logsnr_min: float = -20.0
  logsnr_max: float = 20.0

  def __post_init__(self) -> None:
    if not -30.0 <= self.logsnr_min < self.logsnr_max <= 80.0:
      raise ValueError(
        f'logsnr_min ({self.logsnr_min}) must be below logsnr_max ({self.logsnr_max}), and both must lie in [-30, 80], because of float32'
      )

  def __call__(self, t: jax.Array) -> jax.Array:
    """Returns the logsnr of t in [0, 1], elementwise; +inf where t is 0."""
    b = math.atan(math.exp(-0.5 * self.logsnr_max))
    a = math.atan(math.exp(-0.5 * self.logsnr_min)) - b
    return _clean_at_zero(t, -2.0 * jnp.log(jnp.tan(a * t + b)))

  def inverse(self, logsnr: jax.Array) -> jax.Array:
    """Returns the t of a finite logsnr; outside (0, 1] if logsnr is out of range."""
    b = math.atan(math.exp(-0.5 * self.logsnr_max))
    a = math.atan(math.exp(-0.5 * self.logsnr_min)) - b
    return (jnp.arctan(jnp.exp(-0.5 * logsnr)) - b) / a


@dataclasses.dataclass(frozen=True)
class ShiftedCosine:
  """The cosine schedule for larger images (Hoogeboom et al. 2023, "Simple diffusion", section 3.1).

  An image of `image_size` that is averaged down to `base_size` pixels per side has the signal-to-noise ratio of the
  cosine schedule: logsnr(t) = cosine(t) + 2 log(base_size / image_size).
  """

  image_size: int
  base_size: int = 64
  logsnr_min: float = -20.0
  logsnr_max: float = 20.0

  def __post_init__(self) -> None:
    Cosine(self.logsnr_min, self.logsnr_max)
    if min(self.image_size, self.base_size) < 1:
      raise ValueError(
        f'image_size ({self.image_size}) and base_size ({self.base_size}) must be positive'
      )

  def __call__(self, t: jax.Array) -> jax.Array:
    """As `Cosine`."""
    return Cosine(self.logsnr_min, self.logsnr_max)(t) + self._shift

  def inverse(self, logsnr: jax.Array) -> jax.Array:
    """As `Cosine`."""
    return Cosine(self.logsnr_min, self.logsnr_max).inverse(logsnr - self._shift)

  @property
  def _shift(self) -> float:
    return 2.0 * math.log(self.base_size / self.image_size)


@dataclasses.dataclass(frozen=True)
class LinearBeta:
  """DDPM's linear betas (Ho et al. 2020) in continuous time (Song et al. 2021, appendix B).

  alpha^2 = exp(-B(t)), B(t) = beta_min t + (beta_max - beta_min) t^2 / 2, so that logsnr = -log expm1(B). The
  betas are per unit of time: DDPM's 1000 steps of 1e-4 ... 0.02 correspond to 0.1 ... 20. B starts at the value for
  which logsnr is logsnr_max.
  """

  beta_min: float = 0.1
  beta_max: float = 20.0
  logsnr_max: float = 20.0

  def __post_init__(self) -> None:
    if not 0.0 < self.beta_min <= self.beta_max < math.inf:
      raise ValueError(
        f'beta_min ({self.beta_min}) must be positive, and beta_max ({self.beta_max}) at least as large'
      )
    if self.beta_min + self.beta_max > 160.0:
      raise ValueError(
        f'beta_max ({self.beta_max}) is too large: at t = 1 the signal would vanish in float32'
      )
    if not -10.0 < self.logsnr_max <= 80.0:
      raise ValueError(f'logsnr_max ({self.logsnr_max}) must lie in (-10, 80]')

  def __call__(self, t: jax.Array) -> jax.Array:
    """As `Cosine`."""
    start = math.log1p(math.exp(-self.logsnr_max))
    integral = start + self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * jnp.square(t)
    return _clean_at_zero(t, -jnp.log(jnp.expm1(integral)))

  def inverse(self, logsnr: jax.Array) -> jax.Array:
    """See `Cosine`; t is the positive root of B(t) = log(1 + exp(-logsnr))."""
    integral = jax.nn.softplus(-logsnr) - math.log1p(math.exp(-self.logsnr_max))
    slope = self.beta_max - self.beta_min
    return (
      2.0
      * integral
      / (self.beta_min + jnp.sqrt(jnp.maximum(self.beta_min**2 + 2.0 * slope * integral, 0.0)))
    )


@dataclasses.dataclass(frozen=True)
class Karras:
  """EDM's noise levels (Karras et al. 2022, Eq. 5): (sigma / alpha)^(1 / rho) is linear in t.

  EDM adds noise of scale s to x. Here s = sigma / alpha, from s_min at t -> 0 to s_max at t = 1, and logsnr = -2 log s.
  """

  s_min: float = 0.002
  s_max: float = 80.0
  rho: float = 7.0

  def __post_init__(self) -> None:
    if not 4e-18 < self.s_min < self.s_max < 1e6:
      raise ValueError(
        f's_min ({self.s_min}) must be below s_max ({self.s_max}), and both must lie between 4e-18 and 1e6, because of float32'
      )
    if not 1.0 <= self.rho <= 100.0:
      raise ValueError(f'rho={self.rho} must lie in [1, 100]')

  def __call__(self, t: jax.Array) -> jax.Array:
    """As `Cosine`."""
    low, high = (s ** (1.0 / self.rho) for s in (self.s_min, self.s_max))
    return _clean_at_zero(t, -2.0 * self.rho * jnp.log(low + t * (high - low)))

  def inverse(self, logsnr: jax.Array) -> jax.Array:
    """As `Cosine`."""
    low, high = (s ** (1.0 / self.rho) for s in (self.s_min, self.s_max))
    return (jnp.exp(-0.5 * logsnr / self.rho) - low) / (high - low)


Schedule = Cosine | ShiftedCosine | LinearBeta | Karras | Discrete
SCHEDULES: dict[str, type] = {
  'cosine': Cosine,
  'shifted_cosine': ShiftedCosine,
  'linear_beta': LinearBeta,
  'karras': Karras,
  'discrete': Discrete,
}


@dataclasses.dataclass(frozen=True)
class ScheduleSection:
  """The noise schedule: time t in [0, 1] to logsnr = log(alpha^2 / sigma^2)."""

  name: str = key(
    'cosine',
    "The schedule: cosine, cosine shifted for larger images, linear beta (DDPM), EDM's (Karras et al.), or the betas of "
    'discrete timesteps (diffusers).',
    choices=SCHEDULES,
  )
  logsnr_min: float = key(-20.0, '`cosine`, `shifted_cosine`: logsnr at t = 1.')
  logsnr_max: float = key(20.0, '`cosine`, `shifted_cosine`, `linear_beta`: logsnr as t approaches 0.')
  base_size: int = key(
    64, '`shifted_cosine`: height of the images for which the schedule equals `cosine`.', POSITIVE
  )
  beta_min: float = key(0.1, '`linear_beta`: beta at t = 0, per unit of time.')
  beta_max: float = key(20.0, '`linear_beta`: beta at t = 1, per unit of time.')
  s_min: float = key(0.002, '`karras`: sigma / alpha as t approaches 0.')
  s_max: float = key(80.0, '`karras`: sigma / alpha at t = 1.')
  rho: float = key(7.0, '`karras`: the exponent; (sigma / alpha)^(1 / rho) is linear in t.')
  betas: str = key('linear', '`discrete`: spacing of the betas.', choices=BETAS)
  num_timesteps: int = key(1000, '`discrete`: number of timesteps.', POSITIVE)
  beta_start: float = key(1e-4, '`discrete`: beta of the first timestep.', POSITIVE)
  beta_end: float = key(0.02, '`discrete`: beta of the last timestep.', POSITIVE)
  zero_snr: bool = key(
    False, '`discrete`: whether the betas are scaled so that no signal is left at the last timestep.'
  )
  steps_offset: int = key(
    0, '`discrete`: offset that is added to the timesteps of the grid `leading`.', NOT_NEGATIVE
  )
