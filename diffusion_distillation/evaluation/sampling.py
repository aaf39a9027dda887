"""Drawing images from a model: image k is a function of (seed, k), whatever the batch or the devices."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.system import announcing, compilation, interrupts, sharding
from diffusion_distillation.training.state import Params

Chosen = Mapping[str, Sequence[Any]] | None  # values of a condition to draw in turn, by key
_GRID = 8192  # grids are padded to this many steps, so that one program serves all step counts


@dataclasses.dataclass(frozen=True)
class Drawer:
  """Draws with one denoiser, sampler and schedule; one compiled program, whatever the step count.

  Attributes:
    denoise: the network as a denoiser, without dropout.
    sampler: the step.
    schedule: t to logsnr.
    space: what x is.
    image_shape: (H, W, C).
    batch_size: images at a time, over all devices; rounded up to a multiple of these.
    clip_x: whether x is clipped, after each network call, to what an image can have.
  """

  denoise: Denoiser
  sampler: samplers.Sampler
  schedule: Schedule
  space: Space
  image_shape: tuple[int, ...]
  batch_size: int
  clip_x: bool = True

  def cond(self, index: np.ndarray, chosen: Chosen = None) -> Cond:
    """The conditioning of the images at `index`; see `conditioning.in_turn`."""
    return conditioning.in_turn(self.denoise.conditioning, index, chosen)

  def batches(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    chosen: Chosen = None,
  ) -> Iterator[np.ndarray]:
    """Yields `num_samples` images in batches (n, H, W, C) uint8, by the times in `grid` (N + 1,)."""
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    size, params = sharding.round_up(self.batch_size), sharding.replicate(params)
    for start in range(0, num_samples, size):
      interrupts.check()
      index = np.arange(start, start + size, dtype=np.int32)
      count = min(size, num_samples - start)
      index, cond = sharding.spread((index, self.cond(index, chosen)))
      with contextlib.nullcontext() if start else announcing.compiling('the sampler'):
        images = _draw(self, params, grid, np.int32(seed), index, cond)
      yield sharding.to_host(images)[:count]

  def draw(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    chosen: Chosen = None,
  ) -> np.ndarray:
    """All of `batches`, (num_samples, H, W, C) uint8."""
    return np.concatenate(list(self.batches(params, grid, num_samples, seed, chosen)))

  def pairs(
    self, params: Params, grid: np.ndarray, seed: int, index: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, Cond]:
    """Noise and x (n, ...) as the sampler leaves it, and their conditioning, of the images at `index` (n,)."""
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    padded = np.pad(index.astype(np.int32), (0, sharding.round_up(len(index)) - len(index)))
    given = sharding.spread((padded, self.cond(padded)))
    z, x = sharding.to_host(_run(self, sharding.replicate(params), grid, np.int32(seed), *given))
    return z[: len(index)], x[: len(index)], self.cond(index)

  def seconds_per_image(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    use: Callable[[np.ndarray], bool | None],
  ) -> float:
    """Passes every batch to `use(images)` until that is True; the time that drawing took, compilation excluded."""
    next(self.batches(params, times.uniform(1), 1, 1))
    seconds, began, drawn = 0.0, time.monotonic(), 0
    for images in self.batches(params, grid, num_samples, seed):
      seconds, drawn = seconds + time.monotonic() - began, drawn + len(images)
      if use(images):
        break
      began = time.monotonic()
    return seconds / drawn


def _sample(
  drawer: Drawer,
  params: Params,
  grid: jax.Array,
  seed: jax.Array,
  index: jax.Array,
  cond: Cond,
) -> tuple[jax.Array, jax.Array]:
  """The noise that each image starts from, and the image."""
  keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(index)
  noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  z = samplers.normal(noise_keys, drawer.space.shape(drawer.image_shape))

  def denoise(z: jax.Array, logsnr: jax.Array) -> Prediction:
    return drawer.denoise(params, z, logsnr, cond)

  x = samplers.sample(
    drawer.sampler,
    samplers.clipped(denoise, drawer.space.clip if drawer.clip_x else None),
    drawer.schedule,
    grid,
    z,
    step_keys,
  )
  return z, x


_run = compilation.jit(_sample, static_argnums=0)


@functools.partial(compilation.jit, static_argnums=0)
def _draw(drawer: Drawer, *args: Any) -> jax.Array:
  """The images alone, uint8."""
  return drawer.space.decode(_sample(drawer, *args)[1])
