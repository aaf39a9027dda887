"""Times in [0, 1]: their distributions in training, and grids of times for samplers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Draws a uniform time in (0, 1] for each example.

  Attributes:
    stratified: whether the times of a batch are evenly spaced from one random offset. Each time is still uniform,
      and the mean over the batch has less variance (Kingma et al. 2021, appendix I.1).
  """

  stratified: bool = False

  def __call__(self, rng: jax.Array, count: int) -> jax.Array:
    """(count,) times in (0, 1]."""
    if not self.stratified:
      return 1.0 - jax.random.uniform(rng, (count,))
    offset = jax.random.uniform(rng, ())
    return 1.0 - (offset + jnp.arange(count) / count) % 1.0


@dataclasses.dataclass(frozen=True)
class LogNormal:
  """EDM's distribution of noise levels (Karras et al. 2022, Table 1): log(sigma / alpha) is normal, clipped to the schedule.

  Attributes:
    schedule: the schedule, whose `inverse` maps noise levels to times.
    mean, std: mean and standard deviation of log(sigma / alpha).
    uniform: draws the quantiles.
  """

  schedule: Schedule
  mean: float = -1.2
  std: float = 1.2
  uniform: Uniform = Uniform()

  def __call__(self, rng: jax.Array, count: int) -> jax.Array:
    """(count,) times in (0, 1]."""
    quantile = jnp.minimum(self.uniform(rng, count), 1.0 - jnp.finfo(jnp.float32).epsneg)
    log_s = self.mean + self.std * jax.scipy.special.ndtri(quantile)
    tiny = jnp.finfo(jnp.float32).eps
    return jnp.clip(self.schedule.inverse(-2.0 * log_s), tiny, 1.0)


Law = Uniform | LogNormal


@dataclasses.dataclass(frozen=True)
class TimeSection:
  """The distribution of the times t that are drawn in training."""

  num_steps: int = key(
    0,
    'Base training: number N of discrete times 1/N, 2/N, ..., 1; 0 for continuous time.',
    NOT_NEGATIVE,
  )
  law: str = key(
    'uniform',
    "Base training, and DMD's fake score where `dmd.fake_law=base`: uniform in t, or log-normal in sigma / alpha (EDM), "
    'which needs continuous time.',
    choices=('uniform', 'lognormal'),
  )
  log_mean: float = key(-1.2, '`lognormal`: mean of log(sigma / alpha).')
  log_std: float = key(1.2, '`lognormal`: standard deviation of log(sigma / alpha).', POSITIVE)
  stratified: bool = key(
    False,
    'Whether the times of a batch are spread evenly over the distribution, which reduces the variance of the loss.',
  )


def interval(t: jax.Array, num_steps: int | jax.Array) -> jax.Array:
  """Returns the i in 1..N of the interval ((i - 1) / N, i / N] that contains `t` (any shape, in (0, 1])."""
  return jnp.maximum(jnp.ceil(t * num_steps), 1.0).astype(jnp.int32)


def uniform(num_steps: int) -> np.ndarray:
  """Returns the grid 0, 1/N, ..., 1 that progressive distillation trains for: (N + 1,)."""
  if num_steps < 1:
    raise ValueError(f'a sampler needs at least 1 step, got {num_steps}')
  return np.arange(num_steps + 1, dtype=np.float32) / np.float32(num_steps)


def quadratic(num_steps: int) -> np.ndarray:
  """Returns the grid (i / N)^2, with short steps near clean data (Song et al. 2021, appendix D.2)."""
  return np.square(uniform(num_steps))


def karras(num_steps: int, schedule: Schedule) -> np.ndarray:
  """Returns EDM's grid (Karras et al. 2022, Eq. 5): N noise levels from t = 1 to s = 0.002, then clean data.

  (s_i)^(1/7) is evenly spaced, with s = sigma / alpha starting at 80 or the schedule's highest s, whichever is less. The
  first time is always 1, pure noise. For one step, the grid is `uniform`.
  """
  ends = np.exp(-0.5 * np.array(schedule(jnp.array([1.0, jnp.finfo(jnp.float32).tiny])), np.float64))
  highest, lowest = min(80.0, ends[0]), max(0.002, ends[1])
  levels = np.linspace(lowest ** (1 / 7), highest ** (1 / 7), num_steps) ** 7
  inner = np.array(schedule.inverse(jnp.array(-2.0 * np.log(levels[:-1]), jnp.float32)))
  return grid([0.0, *np.maximum(inner, 1e-6), 1.0])


def leading(num_steps: int, schedule: Schedule) -> np.ndarray:
  """Returns the 'leading' timesteps of a schedule in discrete time; see `Discrete.leading`."""
  if not isinstance(schedule, Discrete):
    raise ValueError('this grid is for models in discrete time, schedule.name=discrete')
  return schedule.leading(num_steps)


def leading_to_first(num_steps: int, schedule: Schedule) -> np.ndarray:
  """Returns the grid `leading`, except that it ends at the first timestep, t = 1 / N, whose noise remains in the sample.

  These are the steps of diffusers' schedulers with `set_alpha_to_one` False, as in Stable Diffusion.
  """
  found = leading(num_steps, schedule)
  assert isinstance(schedule, Discrete)
  if num_steps >= schedule.num_timesteps or found[1] <= 1.0 / schedule.num_timesteps:
    raise ValueError(
      "the grid 'leading_to_first' needs steps_offset=1 or more and fewer steps than timesteps"
    )
  found[0] = 1.0 / schedule.num_timesteps
  return found


def make_grid(name: str, num_steps: int, schedule: Schedule) -> np.ndarray:
  """Returns the grid `name` in GRIDS, (N + 1,); raises ValueError if the schedule does not support it."""
  uniform(num_steps)  # checks the number of steps
  of_schedule = {'karras': karras, 'leading': leading, 'leading_to_first': leading_to_first}
  if name in of_schedule:
    return of_schedule[name](num_steps, schedule)
  return {'uniform': uniform, 'quadratic': quadratic}[name](num_steps)


GRIDS = ('uniform', 'quadratic', 'karras', 'leading', 'leading_to_first')


def grid(times: Sequence[float]) -> np.ndarray:
  """Returns the given times as a grid for samplers.

  Raises:
    ValueError: the times do not increase from 0 to 1.
  """
  values = np.asarray(times, np.float32)
  if values.ndim != 1 or len(values) < 2 or values[0] != 0.0 or values[-1] != 1.0:
    raise ValueError('times must begin with 0 and end with 1')
  if not (np.diff(values) > 0.0).all():
    raise ValueError('times must increase')
  return values
