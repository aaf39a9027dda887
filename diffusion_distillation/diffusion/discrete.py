"""The noise schedules of discrete-time models, in the continuous time of this package."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_NO_SIGNAL = -50.0  # logsnr in place of alpha = 0; alpha = 1.4e-11 is lost in float32


def linear(count: int, start: float, end: float) -> np.ndarray:
  """Returns the betas of DDPM (Ho et al. 2020), which are evenly spaced, (count,)."""
  return np.linspace(start, end, count, dtype=np.float32)


def scaled_linear(count: int, start: float, end: float) -> np.ndarray:
  """Returns the betas of latent diffusion (Rombach et al. 2022), whose square roots are evenly spaced, (count,)."""
  return np.square(np.linspace(math.sqrt(start), math.sqrt(end), count, dtype=np.float32))


def squared_cosine(count: int, start: float, end: float) -> np.ndarray:
  """Returns the betas of Nichol & Dhariwal 2021, Eq. 17, at most 0.999, (count,); `start` and `end` are not used."""
  del start, end
  alpha_bar = np.square(np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2.0))
  return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)


BETAS = {'linear': linear, 'scaled_linear': scaled_linear, 'squaredcos_cap_v2': squared_cosine}


def without_terminal_signal(betas: np.ndarray) -> np.ndarray:
  """Rescales betas (N,) so that the last alpha-bar is 0 and the first one is unchanged (Lin et al. 2023, algorithm 1)."""
  root = np.sqrt(np.cumprod(np.float32(1.0) - betas, dtype=np.float32))
  root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
  alpha_bar = np.square(root)
  return np.float32(1.0) - np.append(alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1])


@dataclasses.dataclass(frozen=True)
class Discrete:
  """A schedule given by the betas of discrete timesteps k = 0, ..., N - 1 (Ho et al. 2020); step k is at t = (k + 1) / N.

  Between two timesteps, logsnr is linear in t; for 0 < t < 1 / N, it equals its value at the first timestep. Equal steps in t
  therefore are the timesteps that diffusers calls 'trailing'.

  Attributes:
    betas: a name in BETAS, spelled as in diffusers' schedulers.
    num_timesteps: N.
    beta_start, beta_end: betas of the first and the last step; not used by 'squaredcos_cap_v2'.
    zero_snr: whether the betas are rescaled so that no signal is left at t = 1.
    steps_offset: added to the timesteps of the grid 'leading'.
    trained_betas: the beta of each timestep, in place of `betas`, `beta_start` and `beta_end`; () to compute them.
  """

  betas: str = 'linear'
  num_timesteps: int = 1000
  beta_start: float = 1e-4
  beta_end: float = 0.02
  zero_snr: bool = False
  steps_offset: int = 0
  trained_betas: tuple[float, ...] = ()

  def __post_init__(self) -> None:
    if self.betas not in BETAS:
      raise ValueError(f'betas={self.betas!r} is not one of {", ".join(BETAS)}')
    if not 2 <= self.num_timesteps <= 100_000:
      raise ValueError(f'num_timesteps={self.num_timesteps} must lie between 2 and 100,000')
    if not 0.0 < self.beta_start <= self.beta_end < 1.0:
      raise ValueError(
        f'beta_start ({self.beta_start}) must be positive, and beta_end ({self.beta_end}) no less and below 1'
      )
    if self.trained_betas and len(self.trained_betas) != self.num_timesteps:
      raise ValueError(
        f'trained_betas has {len(self.trained_betas)} entries, but there are {self.num_timesteps} timesteps'
      )
    if not all(0.0 < beta < 1.0 for beta in self.trained_betas):
      raise ValueError('trained_betas must lie between 0 and 1')
    if not 0 <= self.steps_offset < self.num_timesteps:
      raise ValueError(
        f'steps_offset={self.steps_offset} must lie between 0 and num_timesteps={self.num_timesteps}'
      )
    if not np.isfinite(self.logsnr).all():
      raise ValueError('the first beta is too small for float32: no noise is left at the first timestep')
    if self.logsnr[-1] < _NO_SIGNAL or not (np.diff(self.logsnr) < 0.0).all():
      ends = self.trained_betas or (self.beta_start, self.beta_end)
      raise ValueError(
        f'{self.num_timesteps} betas from {ends[0]} to {ends[-1]} leave less signal at t = 1 than float32 can hold'
      )

  def __call__(self, t: jax.Array) -> jax.Array:
    """t of any shape, in [0, 1]; returns logsnr of the same shape, +inf where t is 0."""
    found = jnp.interp(t * self.num_timesteps - 1.0, np.arange(self.num_timesteps), self.logsnr)
    return jnp.where(t == 0.0, jnp.inf, found)

  def inverse(self, logsnr: jax.Array) -> jax.Array:
    """Returns the t in [1 / N, 1] of a logsnr; outside [0, 1] if logsnr is out of range."""
    t = (np.arange(self.num_timesteps) + 1.0) / self.num_timesteps
    return jnp.interp(-logsnr, -self.logsnr, t, left=-1.0, right=2.0)

  def timestep(self, logsnr: jax.Array) -> jax.Array:
    """Returns k in [0, N - 1], fractional between timesteps; the time input of a network in discrete time.

    The float32 rounding of logsnr is about 1e-4 of a step, so values within 0.01 of a timestep are rounded to it.
    """
    count = self.num_timesteps
    k = jnp.clip(self.inverse(logsnr) * count - 1.0, 0.0, count - 1.0)
    whole = jnp.round(k)
    return jnp.where(jnp.abs(k - whole) < 0.01, whole, k)

  def leading(self, num_steps: int) -> np.ndarray:
    """Returns 0 and the times of diffusers' 'leading' timesteps 0, r, 2r, ... plus `steps_offset`, r = floor(N / num_steps).

    Returns:
      (num_steps + 1,); the last time is below 1, and the sampler starts there from noise.

    Raises:
      ValueError: there are too few timesteps.
    """
    count = self.num_timesteps
    steps = np.arange(num_steps) * (count // num_steps) + self.steps_offset
    if num_steps > count or steps[-1] >= count:
      raise ValueError(
        f'{num_steps} steps do not fit into {count} timesteps from {self.steps_offset} on'
      )
    return np.append(0.0, (steps + 1.0) / count).astype(np.float32)

  @property
  def alpha_bar(self) -> np.ndarray:
    """Returns alpha^2 at each timestep, (N,) float64, from betas rounded to float32 as in other software."""
    computed = (self.betas, self.num_timesteps, self.beta_start, self.beta_end)
    return _alpha_bar(computed, self.zero_snr, self.trained_betas)

  @property
  def logsnr(self) -> np.ndarray:
    """Returns log(alpha^2 / sigma^2) at each timestep, (N,) float32."""
    with np.errstate(divide='ignore'):
      found = np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)
    return np.where(self.alpha_bar > 0.0, found, _NO_SIGNAL).astype(np.float32)


@functools.lru_cache
def _alpha_bar(
  computed: tuple[str, int, float, float], zero_snr: bool, trained: tuple[float, ...]
) -> np.ndarray:
  name, *arguments = computed
  betas = np.array(trained, np.float32) if trained else BETAS[name](*arguments)  # type: ignore[arg-type]
  if zero_snr:
    betas = without_terminal_signal(betas)
  return np.cumprod(np.float32(1.0) - betas, dtype=np.float64)
