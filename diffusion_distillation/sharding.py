"""Mesh and shardings: the only file that names devices.

The step sees global arrays; batches are split over the mesh's `data` axis, all else is replicated.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusion_distillation.errors import UserError


@functools.cache
def _mesh() -> jax.sharding.Mesh:
  return jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(_mesh(), PartitionSpec())


def split() -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(_mesh(), PartitionSpec('data'))


def check_batch(section: str, batch_size: int, micro_batches: int) -> None:
  """Raises UserError, naming the config keys, unless each micro-batch divides by the devices."""
  if jax.process_count() > 1:
    raise UserError(f'{jax.process_count()} processes: this version runs on the devices of one only')
  unit = micro_batches * jax.device_count()
  if batch_size % unit:
    parts = f'{section}.micro_batches={micro_batches} times ' if micro_batches > 1 else ''
    raise UserError(
      f'{section}.batch_size={batch_size} does not divide by {parts}the {jax.device_count()} devices of '
      f'this run; set it to a multiple of {unit}'
    )


def round_up(batch_size: int) -> int:
  """The next batch size that divides by the devices."""
  return -(-batch_size // jax.device_count()) * jax.device_count()


def put(batch: Any) -> Any:
  """A batch (NumPy) to global arrays split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(), x), batch)


def ahead(batches: Iterable[Any], count: int = 2) -> Iterator[Any]:
  """Yields batches as `put` gives them, `count` of them on their way before they are asked for."""
  ready: collections.deque[Any] = collections.deque()
  for batch in batches:
    ready.append(put(batch))
    if len(ready) > count:
      yield ready.popleft()
  yield from ready


def part() -> tuple[int, int]:
  """This process, of how many: the part of each batch that it reads."""
  return jax.process_index(), jax.process_count()


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


def to_host(tree: Any) -> Any:
  """NumPy copies that share no memory with the devices."""
  return jax.tree.map(lambda x: np.array(x), tree)
