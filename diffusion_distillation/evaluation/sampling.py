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
from diffusion_distillation.diffusion.guidance import NONE, Guidance, PerStep
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import Guided, guide
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.system import announcing, compilation, interrupts, sharding
from diffusion_distillation.system.progress import Progress
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
    clip_x: whether x is clipped, after each network call and its guidance, to what an image can have.
    label_counts: images of each class, in whose proportions labels are drawn; (): all classes in turn. No part of the
      compiled program.
    guidance: guidance towards the conditions.
  """

  denoise: Denoiser
  sampler: samplers.Sampler
  schedule: Schedule
  space: Space
  image_shape: tuple[int, ...]
  batch_size: int
  clip_x: bool = True
  label_counts: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  guidance: Guidance = NONE

  def cond(self, index: np.ndarray, seed: int, chosen: Chosen = None) -> Cond:
    """The conditioning of the images at `index`: the chosen values in turn, or as `label_counts` says."""
    told = self.denoise.conditioning
    if chosen:
      return conditioning.in_turn(told, index, chosen)
    return conditioning.draw(told, index, seed, self.label_counts)

  def batches(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    chosen: Chosen = None,
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields batches of one shape (B, H, W, C) uint8 on the devices, and how many of each count: `num_samples` in all.

    Nobody waits for them to be drawn. `grid` (N + 1,) are the times.
    """
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    size, params = sharding.round_up(self.batch_size), sharding.replicate(params)
    for start in range(0, num_samples, size):
      interrupts.check()
      index = np.arange(start, start + size, dtype=np.int32)
      count = min(size, num_samples - start)
      index, cond = sharding.spread((index, self.cond(index, seed, chosen)))
      with contextlib.nullcontext() if start else announcing.compiling('the sampler'):
        images = _draw(self, params, grid, np.int32(seed), index, cond)
      yield images, count

  def draw(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    chosen: Chosen = None,
    name: str | None = None,
  ) -> np.ndarray:
    """The images of all batches, (num_samples, H, W, C) uint8, without padding.

    With a `name`, the progress is shown under it, if there is more than one batch.
    """
    drawn, size = [], sharding.round_up(self.batch_size)
    shown = name is not None and num_samples > size
    progress = Progress(name or '', -(-num_samples // size), images_per_step=size) if shown else None
    with progress or contextlib.nullcontext():
      for images, count in self.batches(params, grid, num_samples, seed, chosen):
        drawn.append(sharding.to_host(images)[:count])
        if progress is not None:
          progress.advance()
    return np.concatenate(drawn)

  def pairs(
    self, params: Params, grid: np.ndarray, seed: int, index: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, Cond]:
    """Noise and x (n, ...) as the sampler leaves it, and their conditioning, of the images at `index` (n,)."""
    grid = np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0))
    padded = np.pad(index.astype(np.int32), (0, sharding.round_up(len(index)) - len(index)))
    given = sharding.spread((padded, self.cond(padded, seed)))
    z, x = sharding.to_host(_run(self, sharding.replicate(params), grid, np.int32(seed), *given))
    return z[: len(index)], x[: len(index)], self.cond(index, seed)

  def seconds_per_image(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    then: Callable[[jax.Array], Any],
    use: Callable[[Any, int], bool | None],
  ) -> float:
    """Draws `num_samples` images and processes each batch while the next one is being drawn.

    Args:
      params: of the network.
      grid: (N + 1,), the times.
      num_samples: images to draw.
      seed: of the noise.
      then: is given a batch on the devices, (B, H, W, C) uint8, and returns arrays without waiting for them.
      use: is given these, and how many of the batch count; True ends the drawing.

    Returns:
      The seconds per image that the first batch took, drawn by itself, without compilation.
    """
    jax.block_until_ready(next(self.batches(params, times.uniform(1), 1, 1))[0])
    began, seconds = time.monotonic(), 0.0
    waiting: tuple[Any, int] | None = None
    for images, count in self.batches(params, grid, num_samples, seed):
      if waiting is None:
        jax.block_until_ready(images)
        seconds = (time.monotonic() - began) / count
      made = then(images)
      sharding.settle(made)
      if waiting is not None and use(*waiting):
        return seconds
      waiting = made, count
    if waiting is not None:
      use(*waiting)
    return seconds


def _sample(
  drawer: Drawer,
  params: Params,
  grid: jax.Array,
  seed: jax.Array,
  index: jax.Array,
  cond: Cond,
) -> tuple[jax.Array, jax.Array]:
  """The noise that each image starts from, and the image."""
  z, step_keys = noise(drawer, seed, index)
  return z, from_noise(drawer, params, grid, z, step_keys, cond)


def noise(drawer: Drawer, seed: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the initial noise (B, ...) of the images at `index` (B,), and the keys (B,) of the noise that the sampler adds."""
  keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(index)
  noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  return samplers.normal(noise_keys, drawer.space.shape(drawer.image_shape)), step_keys


def from_noise(
  drawer: Drawer, params: Params, grid: jax.Array, z: jax.Array, step_keys: jax.Array, cond: Cond
) -> jax.Array:
  """Returns the sampler's last x (B, ...), given noise z (B, ...), the keys (B,) of its steps, and the times (N + 1,)."""

  model, step = guide(drawer.denoise, drawer.guidance), drawer.sampler
  clip = drawer.space.clip if drawer.clip_x else None

  def clipped(denoise: samplers.Denoise) -> samplers.Denoise:
    return samplers.clipped(denoise, clip, drawer.sampler.keeps_eps)

  def denoise(z: jax.Array, logsnr: jax.Array) -> Prediction:
    return model(params, z, logsnr, cond)

  if isinstance(model, Guided):
    in_step = functools.partial(model.in_step, params, cond)
    step = PerStep(sampler=step, in_step=lambda start: clipped(in_step(start)))
  return samplers.sample(step, clipped(denoise), drawer.schedule, grid, z, step_keys)


_run = compilation.jit(_sample, static_argnums=0)


@functools.partial(compilation.jit, static_argnums=0)
def _draw(drawer: Drawer, *args: Any) -> jax.Array:
  """The images alone, uint8."""
  return drawer.space.decode(_sample(drawer, *args)[1])
