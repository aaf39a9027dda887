"""Samplers, which go from noise at t = 1 to data at t = 0 on a grid of times.

A sampler is one step, `sampler(rng, denoise, z, logsnr_t, logsnr_s) -> z_s`, from time t to an earlier
time s. Parameters and labels of `denoise(z, logsnr) -> Prediction` are already bound; `rng` contains one
key per image, (B,). The network is never evaluated on clean data, s = 0, where logsnr_s = inf.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion import process
from diffusion_distillation.diffusion.process import widen
from diffusion_distillation.diffusion.schedules import Schedule

Denoise = Callable[[jax.Array, jax.Array], process.Prediction]
Clip = Callable[[jax.Array], jax.Array]


def clipped(denoise: Denoise, clip: Clip | None, keep_eps: bool = False) -> Denoise:
  """Returns `denoise` with x clipped and eps computed from the clipped x, unless `keep_eps`; unchanged if `clip` is None."""
  if clip is None:
    return denoise

  def call(z: jax.Array, logsnr: jax.Array) -> process.Prediction:
    x, eps = denoise(z, logsnr)
    return process.Prediction(clip(x), eps) if keep_eps else process.from_x(z, logsnr, clip(x))

  return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """Base class of all samplers.

  Attributes:
    calls_per_step: network calls per step, except for the last step of samplers that override `calls`.
    keeps_eps: whether eps remains the network's prediction when x is clipped.
    draws_noise: whether a step adds noise, so that an image also depends on its key.
  """

  calls_per_step: ClassVar[int] = 1
  keeps_eps: ClassVar[bool] = False
  draws_noise: ClassVar[bool] = False

  def calls(self, num_steps: int) -> int:
    """Returns the number of network calls per image in `num_steps` steps, the last of which ends at s = 0."""
    return num_steps * self.calls_per_step

  def begin(self, z: jax.Array) -> Any:
    """Returns the state before the first step: z, and whatever else a sampler keeps from step to step."""
    return z

  def end(self, z: Any) -> jax.Array:
    """Returns the images from the state after the last step."""
    return z

  def __call__(
    self,
    rng: jax.Array | None,
    denoise: Denoise,
    z: Any,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
  ) -> Any:
    """Returns z at time s, given z (B, ...) at time t; logsnr_t and logsnr_s are (B,)."""
    raise NotImplementedError


def normal(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns standard normal noise (B, *shape), each example from its own key in `rng` (B,)."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
  """Deterministic step (Song et al. 2021; Salimans & Ho 2022, Eq. 8).

  z_s = alpha_s x^ + sigma_s eps^, a first-order integrator of the probability-flow ODE; x^ itself at s = 0.
  """

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    del rng
    x, eps = denoise(z, logsnr_t)
    return process.diffuse(x, eps, logsnr_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMKeepEps(DDIM):
  """DDIM as in diffusers' DDIMScheduler by default: eps^ is not recomputed when x^ is clipped."""

  keeps_eps: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
  """Stochastic step (Ho et al. 2020) with log-interpolated variance (Salimans & Ho 2022, section 5).

  With c = 1 - exp(logsnr_t - logsnr_s), the added noise has variance c sigma_s^(2 (1 - gamma)) sigma_t^(2
  gamma): gamma = 0 gives the posterior's variance ('small'), gamma = 1 the forward process's ('large'). At
  s = 0 the step returns x^ without noise.
  """

  draws_noise: ClassVar[bool] = True
  gamma: float = 0.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.gamma <= 1.0:
      raise ValueError(f'gamma={self.gamma} must lie in [0, 1]')

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    if rng is None:
      raise ValueError('ancestral sampling draws noise: it needs one key per image')
    x, _ = denoise(z, logsnr_t)
    alpha_t, sigma_t = process.alpha_sigma(logsnr_t, z)
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, z)
    ratio = widen(jnp.exp(logsnr_t - logsnr_s), z)
    c = widen(-jnp.expm1(logsnr_t - logsnr_s), z)
    mean = ratio * (alpha_s / alpha_t) * z + c * alpha_s * x
    std = jnp.sqrt(c) * sigma_s ** (1.0 - self.gamma) * sigma_t**self.gamma
    return mean + jnp.where(sigma_s > 0.0, std, 0.0) * normal(rng, z.shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepConsistency(Sampler):
  """Multistep consistency sampling (Song et al. 2023, algorithm 1): predicts x^ and adds new noise of time s.

  z_s = alpha_s x^ + sigma_s eps. DMD2's students with several steps are sampled in the same way.
  """

  draws_noise: ClassVar[bool] = True

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    if rng is None:
      raise ValueError('multistep consistency sampling draws noise: it needs one key per image')
    x, _ = denoise(z, logsnr_t)
    return process.diffuse(x, normal(rng, z.shape[1:]), logsnr_s)


class Tableau(NamedTuple):
  """An explicit Runge-Kutta method: a[k] weights the earlier slopes that lead to stage k; b weights all slopes in the sum."""

  a: tuple[tuple[float, ...], ...]
  b: tuple[float, ...]

  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a (S, S), b (S,) and the nodes c (S,), the row sums of a."""
    size = len(self.b)
    a = np.array([[*row, *(0.0,) * (size - len(row))] for row in self.a])
    return a, np.array(self.b), a.sum(1)


MIDPOINT = Tableau(((), (1 / 2,)), (0.0, 1.0))
MILNE = Tableau(((), (1 / 4,), (0.0, 1 / 2), (0.0, 1 / 4, 1 / 2)), (0.0, 2 / 3, -1 / 3, 2 / 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbabilityFlow(Sampler):
  """A Runge-Kutta step of the probability-flow ODE (Salimans & Ho 2022, appendix D), subclassed below.

  In the angle phi = arctan(sigma / alpha) the ODE is dz / dphi = alpha eps^ - sigma x^ = v^. Under the cosine
  schedule phi is pi t / 2, so that steps in phi are steps in t. A step that ends on clean data uses `last`, with
  as many calls, whose nodes stay short of the end. Its order may be one less without reducing the global order.
  """

  tableau: ClassVar[Tableau]
  last: ClassVar[Tableau]

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    del rng
    phi = jnp.arctan(jnp.exp(-0.5 * logsnr_t))
    step = jnp.arctan(jnp.exp(-0.5 * logsnr_s)) - phi
    ends = jnp.isinf(logsnr_s)
    a, b, c = (
      jnp.where(ends.reshape(-1, *(1,) * usual.ndim), last, usual)
      for usual, last in zip(self.tableau.arrays(), self.last.arrays(), strict=True)
    )

    def moved(weights: jax.Array, slopes: jax.Array) -> jax.Array:
      return z + widen(step, z) * jnp.sum(widen(weights.T, slopes) * slopes, axis=0)

    def stage(k: jax.Array, slopes: jax.Array) -> jax.Array:
      logsnr = jnp.where(k == 0, logsnr_t, -2.0 * jnp.log(jnp.tan(phi + c[:, k] * step)))
      prediction = denoise(moved(a[:, k], slopes), logsnr)
      return slopes.at[k].set(process.velocity(prediction, logsnr))

    slopes = jnp.zeros((self.calls_per_step, *z.shape), z.dtype)
    return moved(b, jax.lax.fori_loop(0, self.calls_per_step, stage, slopes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(ProbabilityFlow):
  """First order: z_s = z + (phi_s - phi_t) v^. DDIM is the exact rotation by this angle."""

  tableau: ClassVar[Tableau] = Tableau(((),), (1.0,))
  last: ClassVar[Tableau] = tableau


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(ProbabilityFlow):
  """Second order: the mean of the slopes at both ends, two calls per step; the last step is the midpoint method."""

  calls_per_step: ClassVar[int] = 2
  tableau: ClassVar[Tableau] = Tableau(((), (1.0,)), (1 / 2, 1 / 2))
  last: ClassVar[Tableau] = MIDPOINT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RK4(ProbabilityFlow):
  """Fourth order: the classical Runge-Kutta method, four calls per step; the last step is Milne's open formula."""

  calls_per_step: ClassVar[int] = 4
  tableau: ClassVar[Tableau] = Tableau(
    ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
  )
  last: ClassVar[Tableau] = MILNE


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdmHeun(Sampler):
  """EDM's deterministic sampler (Karras et al. 2022, algorithm 1): 2N - 1 calls in N steps, 35 in 18.

  In y = z / alpha and s = sigma / alpha the ODE is dy / ds = eps^. A step uses the mean of the slopes at both ends;
  the step that ends on clean data is an Euler step with one call, and returns x^. The published sampler uses the grid
  `karras` and starts from 80 times unit noise; here it starts from y = z / alpha at s = 80, 1.00008 times as much.

  Attributes:
    sigma_max: the s at which sampling begins; the schedule's highest s if that is less. Noisier levels of a grid are
      replaced by this one, at which z is practically pure noise: a step in s from the cosine schedule's 22026 would be
      too long for any slope.
  """

  calls_per_step: ClassVar[int] = 2
  sigma_max: float = 80.0

  def calls(self, num_steps: int) -> int:
    """Returns two calls per step, except one for the last step."""
    return 2 * num_steps - 1

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    del rng
    logsnr_t, logsnr_s = (
      jnp.maximum(logsnr, -2.0 * math.log(self.sigma_max)) for logsnr in (logsnr_t, logsnr_s)
    )
    ends = jnp.isinf(logsnr_s)
    alpha_s, _ = process.alpha_sigma(logsnr_s, z)
    step = widen(jnp.exp(-0.5 * logsnr_s) - jnp.exp(-0.5 * logsnr_t), z)
    weight = jnp.where(widen(ends, z), 0.0, 0.5 * alpha_s * step)

    def call(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      """Takes an Euler step with the slope at t, then corrects z_s by half the change of the slope."""
      at, slope = state
      x, eps = denoise(at, jnp.where((k == 0) | ends, logsnr_t, logsnr_s))
      euler = process.diffuse(x, eps, logsnr_s)
      return jnp.where(k == 0, euler, at + weight * (eps - slope)), eps

    calls = jnp.where(ends.all(), 1, 2)  # two if any image's step does not end here
    return jax.lax.fori_loop(0, calls, call, (z, jnp.zeros_like(z)))[0]


class Remembered(NamedTuple):
  """z, and x^ (B, ...) and logsnr (B,) at the start of the previous step."""

  z: jax.Array
  x: jax.Array
  logsnr: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver2M(Sampler):
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order with one call per step.

  In lambda = logsnr / 2 the flow is linear except for x^, which is extrapolated from this step and the previous one:
  z_s = (sigma_s / sigma_t) z - alpha_s (exp(-h) - 1) D, D = x^ + (x^ - x^_before) h / (2 h_before). In the first and
  the last step D = x^, so that they are DDIM steps. With equal steps of the cosine schedule the error decreases as
  log N / N^2, because the steps in lambda at its ends do not shrink with N.
  """

  def begin(self, z: jax.Array) -> Remembered:
    """Returns a state whose previous step starts infinitely far away, so that its x^ has no weight."""
    return Remembered(z, jnp.zeros_like(z), jnp.full(z.shape[:1], -jnp.inf))

  def end(self, z: Remembered) -> jax.Array:
    """Its z."""
    return z.z

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    del rng
    x, _ = denoise(z.z, logsnr_t)
    _, sigma_t = process.alpha_sigma(logsnr_t, x)
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s, x)
    h = logsnr_s - logsnr_t
    weight = jnp.where(jnp.isinf(h), 0.0, 0.5 * h / (logsnr_t - z.logsnr))
    extrapolated = x + widen(weight, x) * (x - z.x)
    z_s = sigma_s / sigma_t * z.z - alpha_s * widen(jnp.expm1(-0.5 * h), x) * extrapolated
    return Remembered(z_s, x, logsnr_t)


SAMPLERS: dict[str, type[Sampler]] = {
  'ddim': DDIM,
  'ddim_keep_eps': DDIMKeepEps,
  'ancestral': Ancestral,
  'multistep_consistency': MultistepConsistency,
  'euler': Euler,
  'heun': Heun,
  'rk4': RK4,
  'edm_heun': EdmHeun,
  'dpm_solver_2m': DPMSolver2M,
}


def sample(
  step: Sampler,
  denoise: Denoise,
  schedule: Schedule,
  times: jax.Array,
  z: jax.Array,
  rng: jax.Array,
) -> jax.Array:
  """Runs `step` down the grid `times`, in one loop with one iteration per step.

  Args:
    step: the sampler.
    denoise: (z, logsnr) to Prediction.
    schedule: t to logsnr.
    times: (M + 1,), increasing, as a rule from 0 to 1. Repetitions of the first time are padding and cost nothing:
      grids of different lengths that are padded to the same length share a compiled program.
    z: (B, ...) standard normal noise, the state at t = 1.
    rng: (B,) keys, one per image; step i uses fold_in(key, i), so that images do not depend on their batch.

  Returns:
    The state at the first of the times, with the shape of z; x if that time is 0.
  """
  logsnr = schedule(times)[::-1]

  def body(i: jax.Array, state: Any) -> Any:
    at, to = (jnp.full(z.shape[:1], logsnr[j]) for j in (i, i + 1))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(rng)
    return step(keys, denoise, state, at, to)

  return step.end(jax.lax.fori_loop(0, jnp.count_nonzero(times > times[0]), body, step.begin(z)))
