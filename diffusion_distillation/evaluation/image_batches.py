"""Batches of images for large networks: in parts that fit into memory, and of images in many sizes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.evaluation.given_images import Batch
from diffusion_distillation.system import sharding


def in_parts(function: Callable[[jax.Array], Any], images: jax.Array, devices: int, at_once: int) -> Any:
  """Maps images (n, ...), which are split over the devices, by a function: at most `at_once` on each device at a time.

  Args:
    function: maps (m, ...) to a pytree of arrays with a leading axis of m.
    images: the images; n is a multiple of `devices`.
    devices: number of devices.
    at_once: maximum number of images on each device.

  Returns:
    The pytree for all images, with arrays (n, D).
  """
  each = len(images) // devices
  times = -(-each // at_once)
  size = -(-each // times)
  parts = images.reshape(devices, each, *images.shape[1:])
  parts = jnp.pad(parts, [(0, 0), (0, times * size - each), *[(0, 0)] * (images.ndim - 1)])
  parts = parts.reshape(devices, times, size, *images.shape[1:]).swapaxes(0, 1)

  def of_part(part: jax.Array) -> Any:
    found = function(part.reshape(-1, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(devices, size, -1), found)

  def joined(x: jax.Array) -> jax.Array:  # (times, devices, size, D)
    whole = x.swapaxes(0, 1).reshape(devices, times * size, -1)
    return whole[:, :each].reshape(len(images), -1)

  return jax.tree.map(joined, jax.lax.map(of_part, parts))


def preprocessed(
  batches: Iterable[Batch],
  size: int,
  by_numpy: Callable[[np.ndarray], np.ndarray],
  on_devices: Callable[[Any], jax.Array],
) -> Iterator[tuple[np.ndarray, jax.Array]]:
  """Yields places and preprocessed images (size, ...) on the devices, of batches of at most `size` images.

  The images beyond the places are padding. Complete batches are preprocessed on the devices, by a small program for each size of
  images. The rest is preprocessed by NumPy and put together, so that a folder of many sizes needs few programs and no
  half-empty batches.

  Args:
    batches: the images.
    size: number of images in a batch, a multiple of the number of devices.
    by_numpy: maps images (n, H, W, C) uint8 to the network's input.
    on_devices: the same, compiled.
  """
  places, rest = np.empty(0, np.int64), list[np.ndarray]()
  for batch in batches:
    if len(batch.places) == size:
      yield batch.places, on_devices(sharding.spread(batch.images))
      continue
    places = np.concatenate([places, batch.places])
    rest.append(by_numpy(batch.images))
    if len(places) >= size:
      together = np.concatenate(rest)
      yield places[:size], sharding.spread(together[:size])
      places, rest = places[size:], [together[size:]]
  if len(places):
    together = np.concatenate(rest)
    padding = np.zeros((size - len(together), *together.shape[1:]), np.float32)
    yield places, sharding.spread(np.concatenate([together, padding]))
