"""Times in [0, 1]: those that training looks at, and grids of them for samplers."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Draws a time in (0, 1] for each example, uniformly.

  Attributes:
    stratified: one offset for the whole batch, its times spread evenly from there: each is uniform still, and
      the mean over the batch has less variance (Kingma et al. 2021, appendix I.1).
  """

  stratified: bool = False

  def __call__(self, rng: jax.Array, count: int) -> jax.Array:
    """(count,) times in (0, 1]."""
    if not self.stratified:
      return 1.0 - jax.random.uniform(rng, (count,))
    offset = jax.random.uniform(rng, ())
    return 1.0 - (offset + jnp.arange(count) / count) % 1.0


def interval(t: jax.Array, num_steps: int | jax.Array) -> jax.Array:
  """The i in 1..N of the interval ((i - 1) / N, i / N] that holds `t` (any shape, in (0, 1])."""
  return jnp.maximum(jnp.ceil(t * num_steps), 1.0).astype(jnp.int32)


def uniform(num_steps: int) -> np.ndarray:
  """The grid 0, 1/N, ..., 1 that the distillation rounds train for: (N + 1,)."""
  if num_steps < 1:
    raise ValueError(f'a sampler takes at least 1 step, got {num_steps}')
  return np.arange(num_steps + 1, dtype=np.float32) / np.float32(num_steps)


def quadratic(num_steps: int) -> np.ndarray:
  """(i / N)^2: short steps near clean data (Song et al. 2021, appendix D.2)."""
  return np.square(uniform(num_steps))


GRIDS: dict[str, Callable[[int], np.ndarray]] = {'uniform': uniform, 'quadratic': quadratic}


def grid(times: Sequence[float]) -> np.ndarray:
  """Times of one's own choice as a grid for samplers.

  Raises:
    ValueError: they do not rise from 0 to 1.
  """
  values = np.asarray(times, np.float32)
  if values.ndim != 1 or len(values) < 2 or values[0] != 0.0 or values[-1] != 1.0:
    raise ValueError('times must begin with 0 and end with 1')
  if not (np.diff(values) > 0.0).all():
    raise ValueError('times must increase')
  return values
