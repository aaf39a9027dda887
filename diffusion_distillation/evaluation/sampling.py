"""Draws images from a model. Image k is a function of (seed, k), independent of batch size and devices."""

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
from diffusion_distillation.networks.guidance import (
  AutoParams,
  Guided,
  GuidingModel,
  calls_per_image,
  guide,
)
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.system import announcing, compilation, interrupts, sharding
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training.state import Params

_PIXELS = 2**20  # of the images that a network decodes at a time

Chosen = Mapping[str, Sequence[Any]] | None  # for each condition by key, values to draw in turn
_GRID = 8192  # grids are padded to this many steps, so that one program serves all step counts


def at_a_time(space: Space, image_shape: tuple[int, ...], most: int, num_samples: int) -> int:
  """Returns how many images to draw at a time: `most`, unless they are large, because a network decodes them."""
  if not space.own_programs:
    return most
  height, width = image_shape[:2]
  return min(most, num_samples, max(1, _PIXELS // (height * width)))


@dataclasses.dataclass(frozen=True)
class Drawer:
  """Draws images with one denoiser, sampler and schedule; a single compiled program serves all step counts.

  Attributes:
    denoise: the network as a denoiser, without dropout.
    sampler: the sampler, which defines one step.
    schedule: t to logsnr.
    space: the space of x.
    image_shape: (H, W, C).
    batch_size: number of images at a time, over all devices; rounded up to a multiple of the number of devices.
    clip_x: whether x is clipped to the range of images after each network call and its guidance.
    label_counts: number of images of each class, to whose proportions labels are drawn; (): all classes in turn. Not
      part of the compiled program.
    guidance: guidance towards the conditions; a network that takes its weight as an input receives it with the conditions.
    spread: whether such a network receives weights spread over its range instead of that of `guidance`.
    guiding: the model that guides in place of the unconditional predictions; its parameters are not part of the program.
    texts: the texts to draw from if none are chosen; not part of the compiled program.
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
  spread: bool = dataclasses.field(default=False, compare=False)
  guiding: GuidingModel | None = None
  texts: conditioning.Texts | None = dataclasses.field(default=None, compare=False)

  @property
  def program(self) -> 'Drawer':
    """The drawer with only what its compiled program depends on: neither a weight that is an input, nor parameters, nor texts."""
    known = conditioning.weights(self.denoise.conditioning)
    guiding = self.guiding and dataclasses.replace(self.guiding, params=None)
    guidance = NONE if known else self.guidance
    return dataclasses.replace(self, guidance=guidance, guiding=guiding, texts=None)

  def on_devices(self, params: Params) -> Params:
    """Returns what the compiled program takes as parameters, on all devices: those of the network and of its guiding model."""
    if self.guidance and self.guiding is not None:
      return sharding.replicate(AutoParams(params, self.guiding.params))
    return sharding.replicate(params)

  def calls(self, grid: np.ndarray) -> int:
    """Returns the number of network calls per image on a grid of times (N + 1,)."""
    conditions = self.denoise.conditioning
    return calls_per_image(conditions, self.guidance, self.sampler, grid, self.schedule)

  def cond(self, index: np.ndarray, seed: int, chosen: Chosen = None) -> Cond:
    """Returns the conditioning of the images at `index`: the chosen values in turn, or else as `conditioning.draw`."""
    conditions = self.denoise.conditioning
    if chosen:
      found = conditioning.in_turn(conditions, index, chosen)
    else:
      found = conditioning.draw(conditions, index, seed, self.label_counts, self.texts)
    if known := conditioning.weights(conditions):
      weight = self.guidance.weight if self.guidance else known.low
      one = np.full(len(index), weight, np.float32)
      found = {**(found or {}), conditioning.WEIGHT: known.spread(index) if self.spread else one}
    return found

  def batches(
    self,
    params: Params,
    grid: np.ndarray,
    num_samples: int,
    seed: int,
    chosen: Chosen = None,
    first: int = 0,
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields batches (B, H, W, C) uint8 on the devices, and the number of images in each that are not padding.

    In total, `num_samples - first` images are not padding: those from `first` on, a multiple of the batch size. Batches are dispatched without waiting for their results. `grid`
    (N + 1,) contains the times.
    """
    grid = _padded(grid)
    size, params = sharding.round_up(self.batch_size), self.on_devices(params)
    for start in range(first, num_samples, size):
      interrupts.check()
      index = np.arange(start, start + size, dtype=np.int32)
      count = min(size, num_samples - start)
      index, cond = sharding.spread((index, self.cond(index, seed, chosen)))
      with contextlib.nullcontext() if start else announcing.compiling('the sampler'):
        images = _images(self.program, params, grid, np.int32(seed), index, cond)
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
    """Returns the images of all batches, (num_samples, H, W, C) uint8, without padding.

    If `name` is given and there is more than one batch, shows a progress bar of this name.
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
    """Returns the noise, the sampler's final x (both (n, ...)) and the conditioning of the images at `index` (n,)."""
    grid = _padded(grid)
    padded = np.pad(index.astype(np.int32), (0, sharding.round_up(len(index)) - len(index)))
    given = sharding.spread((padded, self.cond(padded, seed)))
    arrays = (self.on_devices(params), grid, np.int32(seed), *given)
    z, x = sharding.to_host(_run(self.program, *arrays))
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
      params: the parameters of the network.
      grid: (N + 1,), the times.
      num_samples: number of images to draw.
      seed: seed of the noise.
      then: called with a batch on the devices, (B, H, W, C) uint8; returns arrays without waiting for them.
      use: called with these arrays and the number of images that are not padding; returns True to stop drawing.

    Returns:
      The seconds per image of the first batch, which is timed alone and without compilation.
    """
    jax.block_until_ready(next(self.batches(params, times.uniform(1), 1, 1))[0])
    began, seconds = time.monotonic(), 0.0
    waiting: tuple[Any, int] | None = None
    for images, count in self.batches(params, grid, num_samples, seed):
      if waiting is None:
        jax.block_until_ready(images)
        seconds = (time.monotonic() - began) / count
      made = then(images)
      sharding.wait_on_cpu(made)
      if waiting is not None and use(*waiting):
        return seconds
      waiting = made, count
    if waiting is not None:
      use(*waiting)
    return seconds


def _padded(grid: np.ndarray) -> np.ndarray:
  """Returns a grid of times that is padded to the length of all grids; see `samplers.sample`."""
  return np.pad(grid, (max(0, _GRID + 1 - len(grid)), 0), mode='edge')


def _sample(
  drawer: Drawer,
  params: Params,
  grid: jax.Array,
  seed: jax.Array,
  index: jax.Array,
  cond: Cond,
) -> tuple[jax.Array, jax.Array]:
  """Returns the noise that each image starts from, and the image."""
  z, step_keys = noise(drawer, seed, index)
  return z, from_noise(drawer, params, grid, z, step_keys, cond)


def noise(drawer: Drawer, seed: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the initial noise (B, ...) of the images at `index` (B,), and keys (B,) for the noise that the sampler adds."""
  keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(index)
  noise_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  return samplers.normal(noise_keys, drawer.space.shape(drawer.image_shape)), step_keys


def from_noise(
  drawer: Drawer, params: Params, grid: jax.Array, z: jax.Array, step_keys: jax.Array, cond: Cond
) -> jax.Array:
  """Returns the sampler's last x (B, ...), given noise z (B, ...), the keys (B,) of its steps, and the times (N + 1,)."""

  guiding = None if drawer.guiding is None else drawer.guiding.denoise
  model, step = guide(drawer.denoise, drawer.guidance, guiding), drawer.sampler
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


def _images(drawer: Drawer, *args: Any) -> jax.Array:
  """Returns only the images, uint8, in one program or, if the space decodes with a network, in two."""
  if drawer.space.own_programs:
    return drawer.space.decode(_run(drawer, *args)[1])
  return _draw(drawer, *args)


@functools.partial(compilation.jit, static_argnums=0)
def _draw(drawer: Drawer, *args: Any) -> jax.Array:
  """Returns only the images, uint8."""
  return drawer.space.decode(_sample(drawer, *args)[1])
