"""Drawing images from a model: image k is a function of (seed, k), whatever the batch or the devices."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation import interrupts, samplers, sharding
from diffusion_distillation.datasets import to_image
from diffusion_distillation.schedules import Schedule
from diffusion_distillation.train_state import Params
from diffusion_distillation.unet import Denoiser

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
  sampler: samplers.Step
  schedule: Schedule
  image_shape: tuple[int, ...]
  batch_size: int

  def labels(self, index: np.ndarray) -> np.ndarray | None:
    """Balanced labels for a conditional network: image k has class k mod num_classes."""
    num_classes = self.denoise.network.num_classes
    return (index % num_classes).astype(np.int32) if num_classes else None

  def batches(self, params: Params, num_steps: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields `num_samples` images in batches (n, H, W, C) uint8."""
    times = samplers.uniform_times(num_steps)
    times = np.pad(times, (max(0, _GRID - num_steps), 0))
    size = sharding.round_up(self.batch_size)
    for start in range(0, num_samples, size):
      interrupts.check()
      index = np.arange(start, start + size, dtype=np.int32)
      count = min(size, num_samples - start)
      index, label = sharding.put((index, self.labels(index)))
      images = _draw(self, params, times, np.int32(seed), index, label)
      yield np.asarray(images)[:count]

  def draw(self, params: Params, num_steps: int, num_samples: int, seed: int) -> np.ndarray:
    """All of `batches`, (num_samples, H, W, C) uint8."""
    return np.concatenate(list(self.batches(params, num_steps, num_samples, seed)))

  def seconds_per_image(
    self, params: Params, num_steps: int, num_samples: int, seed: int, use: Callable
  ) -> float:
    """Passes every batch to `use(images)`; the time that drawing alone took, compilation excluded."""
    next(self.batches(params, 1, 1, seed))
    seconds, began = 0.0, time.monotonic()
    for images in self.batches(params, num_steps, num_samples, seed):
      seconds += time.monotonic() - began
      use(images)
      began = time.monotonic()
    return seconds / num_samples


@functools.partial(jax.jit, static_argnums=0)
def _draw(
  drawer: Drawer,
  params: Params,
  times: jax.Array,
  seed: jax.Array,
  index: jax.Array,
  label: jax.Array | None,
) -> jax.Array:
  keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(index)
  noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  z = samplers.normal(noise_keys, drawer.image_shape)
  x = samplers.sample(
    drawer.sampler,
    lambda z, logsnr: drawer.denoise(params, z, logsnr, label),
    drawer.schedule,
    times,
    z,
    step_keys,
  )
  return to_image(x)
