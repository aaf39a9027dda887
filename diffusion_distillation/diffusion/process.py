"""The forward process z = alpha x + sigma eps, and the conversion of a network's output to x and eps.

The process is variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr). Arrays of images have shape
(B, H, W, C), arrays of logsnr have shape (B,); every function here reshapes the latter for broadcasting explicitly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# EDM's standard deviation of the data, the same for all of its datasets.
SIGMA_DATA = 0.5


class Prediction(NamedTuple):
  """A denoiser's estimates of x and eps in z = alpha x + sigma eps; both have shape (B, H, W, C)."""

  x: jax.Array
  eps: jax.Array


def widen(values: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes `values` (B,) to (B, 1, ..., 1), so that they broadcast against `like` (B, ...)."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def alpha_sigma(logsnr: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Signal and noise scale at `logsnr` (B,), reshaped to (B, 1, ..., 1) to broadcast against `like` (B, ...)."""
  logsnr = widen(logsnr, like)
  return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(x: jax.Array, eps: jax.Array, logsnr: jax.Array) -> jax.Array:
  """Returns a sample z of q(z | x) at `logsnr` (B,), given standard normal noise `eps` with the shape of `x`."""
  alpha, sigma = alpha_sigma(logsnr, x)
  return alpha * x + sigma * eps


def from_x(z: jax.Array, logsnr: jax.Array, x: jax.Array) -> Prediction:
  """The network predicts x. `logsnr` must be finite: at sigma = 0, z does not depend on eps."""
  alpha, sigma = alpha_sigma(logsnr, z)
  return Prediction(x, (z - alpha * x) / sigma)


def from_eps(z: jax.Array, logsnr: jax.Array, eps: jax.Array) -> Prediction:
  """The network predicts the noise (Ho et al. 2020)."""
  alpha, sigma = alpha_sigma(logsnr, z)
  return Prediction((z - sigma * eps) / alpha, eps)


def from_v(z: jax.Array, logsnr: jax.Array, v: jax.Array) -> Prediction:
  """The network predicts v = alpha eps - sigma x (Salimans & Ho 2022, section 4)."""
  alpha, sigma = alpha_sigma(logsnr, z)
  return Prediction(alpha * z - sigma * v, sigma * z + alpha * v)


def from_both(z: jax.Array, logsnr: jax.Array, output: jax.Array) -> Prediction:
  """The network predicts x and eps as 2C channels, (B, H, W, 2C), which are combined into one estimate of x.

  Salimans & Ho 2022, section 4: x^ = sigma^2 x~ + alpha (z - sigma eps~), written as the weighted mean of two estimates
  of x, with weights sigma^2 and 1 - sigma^2. In float32 the latter is 0 at logsnr = -20, where z contains no signal, so
  that x^ = x~, as in the released code. eps^ follows from x^.
  """
  alpha, sigma = alpha_sigma(logsnr, z)
  weight = jnp.square(sigma)
  x, eps = jnp.split(output, 2, axis=-1)
  return from_x(z, logsnr, weight * x + (1.0 - weight) * (z - sigma * eps) / alpha)


def edm_input(z: jax.Array, logsnr: jax.Array) -> jax.Array:
  """The input of EDM's network (Karras et al. 2022, Table 1): z scaled to unit variance for data of scale SIGMA_DATA.

  This is c_in y with y = z / alpha, written without the division.
  """
  alpha, sigma = alpha_sigma(logsnr, z)
  return z * jax.lax.rsqrt(jnp.square(sigma) + jnp.square(SIGMA_DATA * alpha))


def from_edm(z: jax.Array, logsnr: jax.Array, output: jax.Array) -> Prediction:
  """The network predicts EDM's F from `edm_input` (Karras et al. 2022, Eq. 7).

  x^ = c_skip y + c_out F, where y = z / alpha has noise of scale s = sigma / alpha. Expanding both factors gives
  x^ = (SIGMA_DATA^2 alpha z / r + SIGMA_DATA sigma F) / r with r^2 = sigma^2 + SIGMA_DATA^2 alpha^2. For
  SIGMA_DATA = 1 this equals `from_v` of -F.
  """
  alpha, sigma = alpha_sigma(logsnr, z)
  scale = jax.lax.rsqrt(jnp.square(sigma) + jnp.square(SIGMA_DATA * alpha))
  x = scale * (scale * SIGMA_DATA**2 * alpha * z + SIGMA_DATA * sigma * output)
  eps = scale * (scale * sigma * z - SIGMA_DATA * alpha * output)
  return Prediction(x, eps)


def velocity(prediction: Prediction, logsnr: jax.Array) -> jax.Array:
  """v = alpha eps - sigma x, the inverse of `from_v`."""
  alpha, sigma = alpha_sigma(logsnr, prediction.x)
  return alpha * prediction.eps - sigma * prediction.x


def implied_x(z_t: jax.Array, z_s: jax.Array, logsnr_t: jax.Array, logsnr_s: jax.Array) -> jax.Array:
  """Returns the x for which one DDIM step from (z_t, logsnr_t) arrives at (z_s, logsnr_s).

  Salimans & Ho 2022, appendix G: x = (z_s - r z_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t.
  At logsnr_s = inf, x = z_s.
  """
  alpha_t, sigma_t = alpha_sigma(logsnr_t, z_t)
  alpha_s, sigma_s = alpha_sigma(logsnr_s, z_s)
  ratio = sigma_s / sigma_t
  return (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)


OUTPUTS = {'x': from_x, 'eps': from_eps, 'v': from_v, 'both': from_both, 'edm': from_edm}


def output_channels(output: str, channels: int) -> int:
  """Returns the number of output channels of a network for images with `channels` channels."""
  return 2 * channels if output == 'both' else channels
