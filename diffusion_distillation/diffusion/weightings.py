"""Weightings: functions from logsnr to the weight of the squared error in x (Salimans & Ho 2022, section 4).

The errors in x, eps and v differ only by a factor: snr |x - x^|^2 = |eps - eps^|^2 and
(1 + snr) |x - x^|^2 = |v - v^|^2. A weight on the error in x therefore determines the loss.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffusion_distillation.diffusion.process import SIGMA_DATA, Prediction


@dataclasses.dataclass(frozen=True)
class Constant:
  """|x - x^|^2."""

  def __call__(self, logsnr: jax.Array) -> jax.Array:
    return jnp.ones_like(logsnr)


@dataclasses.dataclass(frozen=True)
class Snr:
  """|eps - eps^|^2."""

  def __call__(self, logsnr: jax.Array) -> jax.Array:
    return jnp.exp(logsnr)


@dataclasses.dataclass(frozen=True)
class SnrTrunc:
  """max(|x - x^|^2, |eps - eps^|^2), the truncated SNR weighting."""

  def __call__(self, logsnr: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.exp(logsnr), 1.0)


@dataclasses.dataclass(frozen=True)
class SnrPlusOne:
  """|v - v^|^2."""

  def __call__(self, logsnr: jax.Array) -> jax.Array:
    return 1.0 + jnp.exp(logsnr)


@dataclasses.dataclass(frozen=True)
class Edm:
  """SNR + 1 / SIGMA_DATA^2: |F - F^|^2 in the output of EDM's network (Karras et al. 2022, Table 1)."""

  def __call__(self, logsnr: jax.Array) -> jax.Array:
    return jnp.exp(logsnr) + SIGMA_DATA**-2


Weighting = Callable[[jax.Array], jax.Array]
WEIGHTINGS: dict[str, type] = {
  'constant': Constant,
  'snr': Snr,
  'snr_trunc': SnrTrunc,
  'snr_plus_one': SnrPlusOne,
  'edm': Edm,
}


AS_BASE = 'base'  # the name for the weighting of base training


def or_base(base: Weighting) -> Mapping[str, Callable[[], Weighting]]:
  """Returns WEIGHTINGS and `base` under the name AS_BASE; each value is called without arguments."""
  return {AS_BASE: lambda: base, **WEIGHTINGS}


def weighted_mse(
  weighting: Weighting, logsnr: jax.Array, target: Prediction, prediction: Prediction
) -> jax.Array:
  """Returns weighting(logsnr) times the mean squared error in x, per example: (B,).

  The error is computed from eps where the signal is stronger than the noise, and from x elsewhere. The two are equal in
  exact arithmetic, but each suffers from cancellation in float32 where the other one is used.
  """
  axes = tuple(range(1, target.x.ndim))
  x_mse = jnp.mean(jnp.square(target.x - prediction.x), axes)
  eps_mse = jnp.mean(jnp.square(target.eps - prediction.eps), axes)
  return weighting(logsnr) * jnp.where(logsnr > 0, jnp.exp(-logsnr) * eps_mse, x_mse)
