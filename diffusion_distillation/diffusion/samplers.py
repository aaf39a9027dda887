"""Samplers: from noise at t = 1 to data at t = 0 by a grid of times.

A sampler is one step, `sampler(rng, denoise, z, logsnr_t, logsnr_s) -> z_s`, which goes from time t to an
earlier time s. `denoise(z, logsnr) -> Prediction` has its parameters and labels bound already; `rng` is
one key an image, (B,). The network is never asked about clean data, s = 0, where logsnr_s = inf.
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
  """`denoise` with its x clipped, and the eps that follows from that x, unless `keep_eps`; as it is where `clip` is None."""
  if clip is None:
    return denoise

  def call(z: jax.Array, logsnr: jax.Array) -> process.Prediction:
    x, eps = denoise(z, logsnr)
    return process.Prediction(clip(x), eps) if keep_eps else process.from_x(z, logsnr, clip(x))

  return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """What all samplers share.

  Attributes:
    calls_per_step: network calls that a step costs, unless it is the last and `calls` says otherwise.
    keeps_eps: whether, where x is clipped, eps stays what the network predicted.
    draws_noise: whether a step adds noise, so that an image also depends on its key.
  """

  calls_per_step: ClassVar[int] = 1
  keeps_eps: ClassVar[bool] = False
  draws_noise: ClassVar[bool] = False

  def calls(self, num_steps: int) -> int:
    """Network calls for an image that is sampled in `num_steps` steps, the last of which ends at s = 0."""
    return num_steps * self.calls_per_step

  def begin(self, z: jax.Array) -> Any:
    """What the first step takes: z, unless a sampler remembers more from step to step."""
    return z

  def end(self, z: Any) -> jax.Array:
    """The images in what the last step returned."""
    return z

  def __call__(
    self,
    rng: jax.Array | None,
    denoise: Denoise,
    z: Any,
    logsnr_t: jax.Array,
    logsnr_s: jax.Array,
  ) -> Any:
    """z at time s, from z (B, ...) at time t; logsnr_t and logsnr_s are (B,)."""
    raise NotImplementedError


def normal(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise (B, *shape), each example from its own key in `rng` (B,)."""
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
  """DDIM as diffusers' DDIMScheduler has it by default: where x^ is clipped, eps^ is not computed again."""

  keeps_eps: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Sampler):
  """Stochastic step (Ho et al. 2020) with log-interpolated variance (Salimans & Ho 2022, section 5).

  With c = 1 - exp(logsnr_t - logsnr_s), the noise added has variance c sigma_s^(2 (1 - gamma)) sigma_t^(2
  gamma): gamma = 0 is the posterior's ('small'), gamma = 1 the forward process's ('large'). At s = 0 it
  returns x^ without noise.
  """

  draws_noise: ClassVar[bool] = True
  gamma: float = 0.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.gamma <= 1.0:
      raise ValueError(f'gamma={self.gamma} must lie in [0, 1]')

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    if rng is None:
      raise ValueError('ancestral sampling draws noise: it needs one key an image')
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
  """To x^, and back to time s with new noise: multistep consistency sampling (Song et al. 2023, algorithm 1).

  z_s = alpha_s x^ + sigma_s eps; DMD2's students of several steps are sampled the same way.
  """

  draws_noise: ClassVar[bool] = True

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    if rng is None:
      raise ValueError('renoising draws noise: it needs one key an image')
    x, _ = denoise(z, logsnr_t)
    return process.diffuse(x, normal(rng, z.shape[1:]), logsnr_s)


class Tableau(NamedTuple):
  """An explicit Runge-Kutta method: stage k is reached by the slopes before it, weighted by a[k]; b sums them."""

  a: tuple[tuple[float, ...], ...]
  b: tuple[float, ...]

  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a (S, S), b (S,) and the nodes c (S,), the row sums of a."""
    size = len(self.b)
    a = np.array([[*row, *(0.0,) * (size - len(row))] for row in self.a])
    return a, np.array(self.b), a.sum(1)


MIDPOINT = Tableau(((), (1 / 2,)), (0.0, 1.0))
MILNE = Tableau(((), (1 / 4,), (0.0, 1 / 2), (0.0, 1 / 4, 1 / 2)), (0.0, 2 / 3, -1 / 3, 2 / 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbabilityFlow(Sampler):
  """A Runge-Kutta step of the probability-flow ODE (Salimans & Ho 2022, appendix D), subclassed below.

  In the angle phi = arctan(sigma / alpha) the ODE is dz / dphi = alpha eps^ - sigma x^ = v^; under the cosine
  schedule phi is pi t / 2, and its steps are steps of t. A step that ends on clean data takes `last`: as many
  calls, at nodes that stay short of the end; one order less in that one step leaves the whole its order.
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
  """First order: z_s = z + (phi_s - phi_t) v^. DDIM is the exact rotation by that angle."""

  tableau: ClassVar[Tableau] = Tableau(((),), (1.0,))
  last: ClassVar[Tableau] = tableau


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(ProbabilityFlow):
  """Second order: the mean of the slopes at both ends, two calls a step; the last step is the midpoint's."""

  calls_per_step: ClassVar[int] = 2
  tableau: ClassVar[Tableau] = Tableau(((), (1.0,)), (1 / 2, 1 / 2))
  last: ClassVar[Tableau] = MIDPOINT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RK4(ProbabilityFlow):
  """Fourth order, the classical Runge-Kutta method, four calls a step; the last step is Milne's open formula."""

  calls_per_step: ClassVar[int] = 4
  tableau: ClassVar[Tableau] = Tableau(
    ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
  )
  last: ClassVar[Tableau] = MILNE


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdmHeun(Sampler):
  """EDM's deterministic sampler (Karras et al. 2022, algorithm 1): 2N - 1 calls in N steps, 35 in 18.

  In y = z / alpha and s = sigma / alpha the ODE is dy / ds = eps^. A step takes the mean of the slopes at both ends;
  the step that ends on clean data is Euler's, one call, and returns x^. The published sampler takes its steps on the
  grid `karras`. It starts from 80 times unit noise; here y = z / alpha at s = 80, which is 1.00008 times that.

  Attributes:
    sigma_max: the s at which sampling begins, or the schedule's highest if that is less. Noisier levels of a grid
      count as this one, where z is as good as the noise that it was: in s, a step from the cosine schedule's 22026
      would be too long for any slope.
  """

  calls_per_step: ClassVar[int] = 2
  sigma_max: float = 80.0

  def calls(self, num_steps: int) -> int:
    """Two a step, and one in the last."""
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
      """First Euler's z_s and the slope at t; then z_s corrected by half the change of the slope."""
      at, slope = state
      x, eps = denoise(at, jnp.where((k == 0) | ends, logsnr_t, logsnr_s))
      euler = process.diffuse(x, eps, logsnr_s)
      return jnp.where(k == 0, euler, at + weight * (eps - slope)), eps

    calls = jnp.where(ends.all(), 1, 2)  # of a batch whose images do not all end here, the others' count
    return jax.lax.fori_loop(0, calls, call, (z, jnp.zeros_like(z)))[0]


class Remembered(NamedTuple):
  """z, and where the step before came from: x^ there, (B, ...), and its logsnr, (B,)."""

  z: jax.Array
  x: jax.Array
  logsnr: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver2M(Sampler):
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order with one call a step.

  In lambda = logsnr / 2 the flow is linear but for x^, which is extrapolated from this step and the one before:
  z_s = (sigma_s / sigma_t) z - alpha_s (exp(-h) - 1) D, D = x^ + (x^ - x^_before) h / (2 h_before). The first and
  the last step have D = x^, and are DDIM's. On equal steps of the cosine schedule the error goes as log N / N^2:
  the steps in lambda at its ends do not shrink with N.
  """

  def begin(self, z: jax.Array) -> Remembered:
    """Before the first step lies a point infinitely far off, whose x^ has no weight."""
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

  def body(i: jax.Array, state: Any) -> Any:
    at, to = (jnp.full(z.shape[:1], logsnr[j]) for j in (i, i + 1))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(rng)
    return step(keys, denoise, state, at, to)

  return step.end(jax.lax.fori_loop(0, jnp.count_nonzero(times), body, step.begin(z)))
