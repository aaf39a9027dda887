"""Samplers: from noise at t = 1 to data at t = 0 by a grid of times.

A sampler is one step, `sampler(rng, denoise, z, logsnr_t, logsnr_s) -> z_s`, which goes from time t to an
earlier time s. `denoise(z, logsnr) -> Prediction` has its parameters and labels bound already; `rng` is
one key an image, (B,). At s = 0, where logsnr_s = inf, every step returns x exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation import diffusion
from diffusion_distillation.schedules import Schedule

Denoise = Callable[[jax.Array, jax.Array], diffusion.Prediction]
Step = Callable[[jax.Array | None, Denoise, jax.Array, jax.Array, jax.Array], jax.Array]


def _predict(denoise: Denoise, z: jax.Array, logsnr: jax.Array, clip_x: bool) -> diffusion.Prediction:
  prediction = denoise(z, logsnr)
  if not clip_x:
    return prediction
  return diffusion.from_x(z, logsnr, jnp.clip(prediction.x, -1.0, 1.0))


def normal(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise (B, *shape), each example from its own key in `rng` (B,)."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(rng)


@dataclasses.dataclass(frozen=True)
class DDIM:
  """Deterministic step (Song et al. 2021; Salimans & Ho 2022, Eq. 8).

  z_s = alpha_s x^ + sigma_s eps^, a first-order integrator of the probability-flow ODE.
  """

  clip_x: bool = True
  calls_per_step: ClassVar[int] = 1

  def __call__(
    self,
    rng: jax.Array | None,
    denoise: Denoise,
    z: jax.Array,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
  ) -> jax.Array:
    del rng
    x, eps = _predict(denoise, z, logsnr_t, self.clip_x)
    return diffusion.diffuse(x, eps, logsnr_s)


@dataclasses.dataclass(frozen=True)
class Ancestral:
  """Stochastic step (Ho et al. 2020) with log-interpolated variance (Salimans & Ho 2022, section 5).

  With c = 1 - exp(logsnr_t - logsnr_s), the noise added has variance c sigma_s^(2 (1 - gamma)) sigma_t^(2
  gamma): gamma = 0 is the posterior's ('small'), gamma = 1 the forward process's ('large').
  """

  gamma: float = 0.0
  clip_x: bool = True
  calls_per_step: ClassVar[int] = 1

  def __post_init__(self) -> None:
    if not 0.0 <= self.gamma <= 1.0:
      raise ValueError(f'ancestral sampler: gamma must lie in [0, 1], got {self.gamma}')

  def __call__(
    self,
    rng: jax.Array | None,
    denoise: Denoise,
    z: jax.Array,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
  ) -> jax.Array:
    if rng is None:
      raise ValueError('ancestral sampling draws noise: it needs one key an image')
    x, _ = _predict(denoise, z, logsnr_t, self.clip_x)
    alpha_t, sigma_t = diffusion.alpha_sigma(logsnr_t, z)
    alpha_s, sigma_s = diffusion.alpha_sigma(logsnr_s, z)
    ratio = jnp.exp(logsnr_t - logsnr_s).reshape(alpha_t.shape)
    c = -jnp.expm1(logsnr_t - logsnr_s).reshape(alpha_t.shape)
    mean = ratio * (alpha_s / alpha_t) * z + c * alpha_s * x
    std = jnp.sqrt(c) * sigma_s ** (1.0 - self.gamma) * sigma_t**self.gamma
    return mean + jnp.where(sigma_s > 0.0, std, 0.0) * normal(rng, z.shape[1:])


SAMPLERS: dict[str, type] = {'ddim': DDIM, 'ancestral': Ancestral}


def uniform_times(num_steps: int) -> np.ndarray:
  """The grid 0, 1/N, ..., 1 that the distillation rounds train for: (N + 1,)."""
  if num_steps < 1:
    raise ValueError(f'a sampler takes at least 1 step, got {num_steps}')
  return np.arange(num_steps + 1, dtype=np.float32) / np.float32(num_steps)


def sample(
  step: Step,
  denoise: Denoise,
  schedule: Schedule,
  times: jax.Array,
  z: jax.Array,
  rng: jax.Array,
) -> jax.Array:
  """Runs `step` down the grid `times`, in one loop of as many iterations as the grid has steps.

  Args:
    step: the sampler.
    denoise: (z, logsnr) to Prediction.
    schedule: t to logsnr.
    times: (M + 1,), increasing from 0 to 1. Zeros beyond the first are padding, in front, and cost nothing:
      grids of different lengths padded to one length share a compiled program.
    z: (B, ...) standard normal noise, the state at t = 1.
    rng: (B,) keys, one an image; step i uses fold_in(key, i), so that no image depends on its batch.

  Returns:
    x, of the shape of z.
  """
  logsnr = schedule(times)[::-1]

  def body(i: jax.Array, z: jax.Array) -> jax.Array:
    at, to = (jnp.full(z.shape[:1], logsnr[j]) for j in (i, i + 1))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(rng)
    return step(keys, denoise, z, at, to)

  return jax.lax.fori_loop(0, jnp.count_nonzero(times), body, z)
