"""Drawing images from a model: image k is a function of (seed, k), whatever the batch or the devices."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.spaces import to_image
from diffusion_distillation.networks.unet import Denoiser
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.training.state import Params

_GRID = 8192  # grids are padded to this many steps, so that one program serves all step counts


@dataclasses.dataclass(frozen=True)
class Drawer:
  """Draws with one denoiser, sampler and schedule; one compiled program, whatever the step count.

  Attributes:
    denoise: the network as a denoiser, without dropout.
    sampler: the step.
    schedule: t to logsnr.
    image_shape: (H, W, C).
    batch_size: images at a time, over all devices; rounded up to a multiple of these.
  """

  denoise: Denoiser
  sampler: samplers.Sampler
  schedule: Schedule
  image_shape: tuple[int, ...]
  batch_size: int

  def labels(self, index: np.ndarray, classes: Sequence[int] = ()) -> np.ndarray | None:
    """Labels of the images at `index`: `classes` in turn, or all classes, so that they are balanced.

    None for a network without classes.
    """
    num_classes = self.denoise.network.num_classes
    if not num_classes:
      return None
    chosen = np.asarray(classes or range(num_classes), np.int32)
    return chosen[index % len(chosen)]

  def batches(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    classes: Sequence[int] = (),
  ) -> Iterator[np.ndarray]:
    """Yields `num_samples` images in batches (n, H, W, C) uint8, by the times in `grid` (N + 1,)."""
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    size, params = sharding.round_up(self.batch_size), sharding.replicate(params)
    for start in range(0, num_samples, size):
      interrupts.check()
      index = np.arange(start, start + size, dtype=np.int32)
      count = min(size, num_samples - start)
      index, label = sharding.spread((index, self.labels(index, classes)))
      images = _draw(self, params, grid, np.int32(seed), index, label)
      yield sharding.to_host(images)[:count]

  def draw(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    classes: Sequence[int] = (),
  ) -> np.ndarray:
    """All of `batches`, (num_samples, H, W, C) uint8."""
    return np.concatenate(list(self.batches(params, grid, num_samples, seed, classes)))

  def pairs(
    self, params: Params, grid: np.ndarray, seed: int, index: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Noise, image (n, H, W, C) in [-1, 1] as the sampler leaves it, and label, of the images at `index` (n,)."""
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    padded = np.pad(index.astype(np.int32), (0, sharding.round_up(len(index)) - len(index)))
    given = sharding.spread((padded, self.labels(padded)))
    z, x = sharding.to_host(_run(self, sharding.replicate(params), grid, np.int32(seed), *given))
    return z[: len(index)], x[: len(index)], self.labels(index)

  def seconds_per_image(
    self, params: Params, grid: np.ndarray, num_samples: int, seed: int, use: Callable
  ) -> float:
    """Passes every batch to `use(images)`; the time that drawing alone took, compilation excluded."""
    next(self.batches(params, times.uniform(1), 1, 1))
    seconds, began = 0.0, time.monotonic()
    for images in self.batches(params, grid, num_samples, seed):
      seconds += time.monotonic() - began
      use(images)
      began = time.monotonic()
    return seconds / num_samples


@functools.partial(jax.jit, static_argnums=0)
def _run(
  drawer: Drawer,
  params: Params,
  grid: jax.Array,
  seed: jax.Array,
  index: jax.Array,
  label: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The noise that each image starts from, and the image."""
  keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(index)
  noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  z = samplers.normal(noise_keys, drawer.image_shape)
  x = samplers.sample(
    drawer.sampler,
    lambda z, logsnr: drawer.denoise(params, z, logsnr, label),
    drawer.schedule,
    grid,
    z,
    step_keys,
  )
  return z, x


@functools.partial(jax.jit, static_argnums=0)
def _draw(drawer: Drawer, *args: jax.Array | Params) -> jax.Array:
  """The images alone, uint8."""
  return to_image(_run(drawer, *args)[1])
