"""Mesh and shardings: the only file that names devices.

The step sees global arrays; batches are split over the mesh's `data` axis, all else is replicated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusion_distillation.errors import UserError


def _mesh() -> jax.sharding.Mesh:
  return jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(_mesh(), PartitionSpec())


def split() -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(_mesh(), PartitionSpec('data'))


def check_batch(key: str, batch_size: int) -> None:
  """Raises UserError, naming the config key, unless the batch divides by the devices."""
  if batch_size < 1 or batch_size % jax.device_count():
    raise UserError(
      f'{key}={batch_size} does not divide by the {jax.device_count()} devices of this run; '
      f'set it to a multiple of {jax.device_count()}'
    )


def put(batch: Any) -> Any:
  """This process's share of a batch (NumPy) to one global array split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(), x), batch)


def replicate(tree: Any) -> Any:
  """A tree of arrays, on every device."""
  return jax.device_put(tree, replicated())


def compile_step(step: Callable) -> Callable:
  """Jits step(recipe, state, teacher, batch) -> (state, metrics), donating the state."""
  whole, parts = replicated(), split()
  return jax.jit(
    step,
    donate_argnums=1,
    in_shardings=(whole, whole, whole, parts),
    out_shardings=(whole, whole),
  )


def compile_split(static_argnums: tuple[int, ...]) -> Callable:
  """Decorator: jits a function whose output is split over the devices along its leading axis."""

  def decorate(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
      return compiled()(*args)

    @functools.cache
    def compiled() -> Callable:  # not before the first call: importing this starts no backend
      return jax.jit(function, static_argnums=static_argnums, out_shardings=split())

    return call

  return decorate


def to_host(tree: Any) -> Any:
  """NumPy copies that share no memory with the devices."""
  return jax.tree.map(lambda x: np.array(x), tree)
