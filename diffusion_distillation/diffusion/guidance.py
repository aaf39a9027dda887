"""Classifier-free guidance: its weight, its noise levels, and its cost in network calls."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion.process import Prediction, widen
from diffusion_distillation.diffusion.samplers import Denoise, Sampler
from diffusion_distillation.diffusion.schedules import Schedule

_ROUNDING = 1e-4  # relative; levels that are closer to an end of the interval count as that end


@dataclasses.dataclass(frozen=True)
class Guidance:
  """x^ + W (x^ - x^_unconditional), at noise levels in an interval (Ho & Salimans 2022; Kynkaanniemi et al. 2024).

  Attributes:
    weight: W; 0 is no guidance. Other software often calls 1 + W the guidance scale.
    low, high: noise levels sigma / alpha; those in (low, high] are guided.
  """

  weight: float = 0.0
  low: float = 0.0
  high: float = math.inf

  def __post_init__(self) -> None:
    if not 0.0 <= self.weight < math.inf:
      raise ValueError(f'the weight of guidance is {self.weight}; it must be zero or more, and finite')
    if not 0.0 <= self.low < self.high:
      raise ValueError(
        f'the interval of guidance is {self.low:g},{self.high:g}; it must be 0 <= LOW < HIGH, in sigma / alpha'
      )

  def __bool__(self) -> bool:
    """Whether there is any guidance."""
    return self.weight > 0.0

  @property
  def interval(self) -> list[float | None] | None:
    """[low, high] for a row of results, with None for no upper end; None if all noise levels or none are guided."""
    whole = (self.low, self.high) == (0.0, math.inf)
    return [self.low, None if math.isinf(self.high) else self.high] if self and not whole else None

  def holds(self, logsnr: jax.Array) -> jax.Array:
    """Returns whether noise levels, given as logsnr (any shape), are guided."""
    least, most = (
      math.inf if not level else -2.0 * math.log(level * (1.0 + _ROUNDING))
      for level in (self.high, self.low)
    )
    return (logsnr >= least) & (logsnr < most)

  def weights(self, logsnr: jax.Array) -> jax.Array:
    """Returns W where `holds`, else 0."""
    return jnp.where(self.holds(logsnr), self.weight, 0.0)

  def calls(self, sampler: Sampler, grid: np.ndarray, schedule: Schedule) -> int:
    """Returns the number of network calls per image on a grid of times (N + 1,); a guided step makes each call twice."""
    count = len(grid) - 1
    if not self:
      return sampler.calls(count)
    own = np.full(count, sampler.calls_per_step)
    own[0] = sampler.calls(count) - own[1:].sum()  # the step that ends at time 0
    return int((own * (1 + np.asarray(self.holds(schedule(jnp.asarray(grid[1:])))))).sum())


NONE = Guidance()


def guided(conditional: Prediction, unconditional: Prediction, weight: jax.Array) -> Prediction:
  """Returns x_c + W (x_c - x_u), and the same for eps, so that z = alpha x + sigma eps still holds.

  `weight`, (B,), is W of each example. Where W is 0, the result is the conditional prediction.
  """
  (x, eps), (x_u, eps_u) = conditional, unconditional
  w = widen(weight, x)
  return Prediction(x + w * (x - x_u), eps + w * (eps - eps_u))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerStep(Sampler):
  """A sampler that uses a different denoiser in each step, and ignores the one that it is called with.

  Attributes:
    sampler: the sampler that makes the steps.
    in_step: maps the logsnr (B,) at the start of a step to the denoiser of this step.
  """

  sampler: Sampler
  in_step: Callable[[jax.Array], Denoise]

  def begin(self, z: jax.Array) -> Any:
    """See `Sampler`; that of `sampler`."""
    return self.sampler.begin(z)

  def end(self, z: Any) -> jax.Array:
    """See `Sampler`; that of `sampler`."""
    return self.sampler.end(z)

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    del denoise
    return self.sampler(rng, self.in_step(logsnr_t), z, logsnr_t, logsnr_s)


def make_guidance(weight: float, interval: Sequence[float] = ()) -> Guidance:
  """Returns guidance in an interval (low, high) of noise levels, or () for all levels; always NONE if W is 0.

  Raises:
    ValueError: the weight or the interval is out of range.
  """
  if len(interval) not in (0, 2):
    raise ValueError(f'the interval of guidance has two ends, LOW,HIGH, but {len(interval)} were given')
  found = Guidance(weight, *interval)
  return found or NONE
