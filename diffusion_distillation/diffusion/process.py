"""The forward process z = alpha x + sigma eps, and what a network's output says about x and eps.

Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr). Arrays of images are
(B, H, W, C), arrays of logsnr (B,): every function here widens the latter on purpose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SIGMA_DATA = (
  0.5  # of EDM's preconditioning: the standard deviation of pixels, the same for all its data sets
)


class Prediction(NamedTuple):
  """What a denoiser believes of z = alpha x + sigma eps; both (B, H, W, C)."""

  x: jax.Array
  eps: jax.Array


def widen(values: jax.Array, like: jax.Array) -> jax.Array:
  """`values` (B,) shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def alpha_sigma(logsnr: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Signal and noise scale at `logsnr` (B,), shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
  logsnr = widen(logsnr, like)
  return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(x: jax.Array, eps: jax.Array, logsnr: jax.Array) -> jax.Array:
  """z ~ q(z | x) at `logsnr` (B,), for noise `eps` of the shape of `x`."""
  alpha, sigma = alpha_sigma(logsnr, x)
  return alpha * x + sigma * eps


def from_x(z: jax.Array, logsnr: jax.Array, x: jax.Array) -> Prediction:
  """The network predicts x. Finite logsnr only: at sigma = 0, z says nothing about eps."""
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
  """The network predicts (x, eps) side by side, (B, H, W, 2C); x is read from each where it is sure.

  Salimans & Ho 2022, section 4: x^ = sigma^2 x~ + alpha (z - sigma eps~), written as the mean of two
  estimates of x with weights sigma^2 and 1 - sigma^2. In float32 the latter is 0 at logsnr = -20, where z has
  no signal: x^ is x~, as in the released code. eps^ follows from x^.
  """
  alpha, sigma = alpha_sigma(logsnr, z)
  weight = jnp.square(sigma)
  x, eps = jnp.split(output, 2, axis=-1)
  return from_x(z, logsnr, weight * x + (1.0 - weight) * (z - sigma * eps) / alpha)


def edm_input(z: jax.Array, logsnr: jax.Array) -> jax.Array:
  """What EDM's network is given (Karras et al. 2022, Table 1): z at unit variance, for data of SIGMA_DATA.

  c_in y with y = z / alpha, written without the division.
  """
  alpha, sigma = alpha_sigma(logsnr, z)
  return z * jax.lax.rsqrt(jnp.square(sigma) + jnp.square(SIGMA_DATA * alpha))


def from_edm(z: jax.Array, logsnr: jax.Array, output: jax.Array) -> Prediction:
  """The network predicts EDM's F, given `edm_input` (Karras et al. 2022, Eq. 7).

  x^ = c_skip y + c_out F of y = z / alpha at noise s = sigma / alpha, with both factors multiplied out:
  x^ = (SIGMA_DATA^2 alpha z / r + SIGMA_DATA sigma F) / r, r^2 = sigma^2 + SIGMA_DATA^2 alpha^2. At SIGMA_DATA = 1
  it is `from_v` of -F.
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
  """The x for which one DDIM step from (z_t, logsnr_t) lands on (z_s, logsnr_s).

  Salimans & Ho 2022, appendix G: x = (z_s - r z_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t.
  At logsnr_s = inf it is z_s itself.
  """
  alpha_t, sigma_t = alpha_sigma(logsnr_t, z_t)
  alpha_s, sigma_s = alpha_sigma(logsnr_s, z_s)
  ratio = sigma_s / sigma_t
  return (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)


OUTPUTS = {'x': from_x, 'eps': from_eps, 'v': from_v, 'both': from_both, 'edm': from_edm}


def output_channels(output: str, channels: int) -> int:
  """Channels of a network with that output, for images of so many channels."""
  return 2 * channels if output == 'both' else channels
