"""Exact denoisers of data whose law is known: every pixel drawn on its own from a Gaussian or a mixture.

Under z = alpha x + sigma eps a component N(m, s^2) becomes N(alpha m, v) with v = alpha^2 s^2 + sigma^2, and

  E[x | z] = m + alpha s^2 (z - alpha m) / v        E[eps | z] = sigma (z - alpha m) / v

neither of which divides by alpha or sigma.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from diffusion_distillation.diffusion.process import Prediction, alpha_sigma


def scales(logsnr):
  """alpha^2 = 1 / (1 + exp(-logsnr)) and its complement, as roots, in float64: two arrays."""
  logsnr = np.asarray(logsnr, np.float64)
  return np.sqrt(special.expit(logsnr)), np.sqrt(special.expit(-logsnr))


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Pixels x ~ N(mean, std^2)."""

  mean: float
  std: float

  def __call__(self, z, logsnr):
    alpha, sigma = alpha_sigma(logsnr, z)
    residual = (z - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
    return Prediction(self.mean + alpha * self.std**2 * residual, sigma * residual)

  def variance(self, logsnr):
    """Var[z]."""
    alpha, sigma = scales(logsnr)
    return alpha**2 * self.std**2 + sigma**2

  def posterior_variance(self, logsnr):
    """Var[x | z] = s^2 sigma^2 / v, the same for every z: the least mean squared error in x."""
    return self.std**2 * scales(logsnr)[1] ** 2 / self.variance(logsnr)

  def probability_flow(self, z, logsnr_t, logsnr_s=np.inf):
    """Where the probability-flow ODE takes z: the flow keeps (z - alpha m) / sqrt(v)."""
    normal = (z - scales(logsnr_t)[0] * self.mean) / np.sqrt(self.variance(logsnr_t))
    return scales(logsnr_s)[0] * self.mean + np.sqrt(self.variance(logsnr_s)) * normal

  def consistency(self, z, logsnr):
    """Where the flow ends: the exact consistency function, that of a denoiser's arguments."""
    alpha, sigma = alpha_sigma(logsnr, z)
    return self.mean + self.std * (z - alpha * self.mean) / jnp.sqrt((alpha * self.std) ** 2 + sigma**2)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Pixels x ~ sum_k weights[k] N(means[k], stds[k]^2)."""

  weights: tuple[float, ...]
  means: tuple[float, ...]
  stds: tuple[float, ...]

  def __call__(self, z, logsnr):
    """The components' answers, each weighted by its probability given z."""
    alpha, sigma = alpha_sigma(logsnr, z)
    logits, xs, epses = [], [], []
    for weight, mean, std in zip(self.weights, self.means, self.stds, strict=True):
      variance = alpha**2 * std**2 + sigma**2
      residual = (z - alpha * mean) / variance
      logits.append(jnp.log(weight) - 0.5 * jnp.log(variance) - 0.5 * variance * residual**2)
      xs.append(mean + alpha * std**2 * residual)
      epses.append(sigma * residual)
    share = jax.nn.softmax(jnp.stack(logits), axis=0)
    return Prediction(jnp.sum(share * jnp.stack(xs), 0), jnp.sum(share * jnp.stack(epses), 0))

  def cdf(self, z, logsnr):
    """P(z' <= z) at `logsnr`, in float64."""
    alpha, sigma = scales(logsnr)
    return sum(
      weight * special.ndtr((z - alpha * mean) / np.sqrt(alpha**2 * std**2 + sigma**2))
      for weight, mean, std in zip(self.weights, self.means, self.stds, strict=True)
    )

  def probability_flow(self, z, logsnr_t):
    """The x with as much mass below it as z has: in one dimension the flow cannot reorder points.

    By bisection, within 10 standard deviations of the outermost means.
    """
    mass = self.cdf(np.asarray(z, np.float64), logsnr_t)
    low = np.full_like(mass, min(self.means) - 10.0 * max(self.stds))
    high = np.full_like(mass, max(self.means) + 10.0 * max(self.stds))
    for _ in range(60):
      middle = 0.5 * (low + high)
      below = self.cdf(middle, np.inf) < mass
      low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def quadrature(pixels=2):
  """Noise of generator and of diffusion, (n, 1, pixels, 1) each, and weights (n,).

  Means under it are exact for polynomials of degree 5 in every pixel.
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(3)
  points = np.array(list(itertools.product(nodes, repeat=2 * pixels)))
  weights = np.prod(list(itertools.product(weights / weights.sum(), repeat=2 * pixels)), axis=1)
  z, eps = points.reshape(-1, 2, 1, pixels, 1).swapaxes(0, 1)
  return jnp.array(z), jnp.array(eps), weights
