"""The mesh and the shardings; all code that handles devices is in this file.

The mesh has two axes, `data` and `fsdp`. Batches are sharded over both axes. Networks, their averages and optimizer states,
and the frozen teacher are sharded over `fsdp` only: each array along its longest axis that is divisible. A network's
parameters are gathered where it is called, and its gradients are scattered where they are computed; all other code works
with global arrays.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_distillation.config import key
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import compilation
from diffusion_distillation.system.gathering import Gathered

_AXES = ('data', 'fsdp')
_in_use: list[Mesh] = []  # the last one is in use; if empty, all devices are along `data`


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """The layout of all devices: data x fsdp. Batches are split over both axes."""

  data: int = key(-1, 'Number of devices along `data`; -1 for all devices divided by `mesh.fsdp`.')
  fsdp: int = key(
    1,
    'Number of devices over which every network, its moving averages and its optimizer state are split; a divisor of '
    'the number of devices.',
  )


@contextlib.contextmanager
def laid_out(data: int = -1, fsdp: int = 1) -> Iterator[None]:
  """Sets the mesh over the devices of all processes while the body runs.

  Args:
    data: number of devices along this axis; -1 for all devices divided by `fsdp`.
    fsdp: number of devices over which each network is split.

  Raises:
    UserError: the product of the axes is not the number of devices.
  """
  count = jax.device_count()
  if fsdp < 1 or count % fsdp or data not in (-1, count // fsdp):
    raise UserError(
      f'mesh.data={data} times mesh.fsdp={fsdp} is not {count}, the number of devices of this run; set mesh.fsdp to a '
      'divisor of it, and mesh.data to -1'
    )
  _in_use.append(_make(jax.devices(), fsdp))
  try:
    yield
  finally:
    _in_use.pop()


def _make(devices: list[Any], fsdp: int) -> Mesh:
  shape = (len(devices) // fsdp, fsdp)
  return jax.make_mesh(shape, _AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def _mesh() -> Mesh:
  return _in_use[-1] if _in_use else _along_data()


@functools.cache
def _along_data() -> Mesh:
  return _make(jax.devices(), 1)


def describe() -> str:
  """Describes the devices and their layout as text."""
  shape = dict(_mesh().shape)
  processes = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  layout = f' (data {shape["data"]} x fsdp {shape["fsdp"]})' if shape['fsdp'] > 1 else ''
  return f'{_mesh().size} {jax.default_backend()} device(s){processes}{layout}'


def replicated() -> NamedSharding:
  """Returns the sharding of arrays that every device holds completely."""
  return NamedSharding(_mesh(), PartitionSpec())


def split() -> NamedSharding:
  """Returns the sharding of batches: the leading axis is split over all devices."""
  return NamedSharding(_mesh(), PartitionSpec(_AXES))


def of(tree: Any) -> Any:
  """Returns the sharding of each array of a network, an average or an optimizer state; depends on shapes only."""
  return jax.tree.map(lambda leaf: _of_shape(_mesh(), tuple(leaf.shape)), tree)


def _of_shape(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  axis = _split_axis(shape, mesh.shape['fsdp'])
  spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, 'fsdp')
  return NamedSharding(mesh, spec)


def _split_axis(shape: tuple[int, ...], parts: int) -> int | None:
  """Returns the axis along which an array is split into `parts`; None if every device holds it completely."""
  divisible = [k for k, size in enumerate(shape) if size % parts == 0]
  if len(shape) < 2 or not divisible or parts == 1:
    return None
  return max(divisible, key=lambda k: (shape[k], k))


def fsdp() -> int:
  """Returns the number of devices over which each network is split."""
  return int(_mesh().shape['fsdp'])


def bytes_in_parts(tree: Any, parts: int) -> int:
  """Returns the bytes per device of arrays (or their shapes) if each network is split over `parts` devices."""

  def held(leaf: Any) -> int:
    whole = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    return whole if _split_axis(tuple(leaf.shape), parts) is None else whole // parts

  return sum(map(held, jax.tree.leaves(tree)))


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes per device of arrays (or their shapes) that are sharded by `of`."""
  return bytes_in_parts(tree, fsdp())


def check_batch(section: str, batch_size: int, micro_batches: int) -> None:
  """Raises UserError, naming the config keys, unless each micro-batch is divisible by the number of devices."""
  unit = micro_batches * jax.device_count()
  if batch_size % unit:
    parts = f'{section}.micro_batches={micro_batches} times ' if micro_batches > 1 else ''
    raise UserError(
      f'{section}.batch_size={batch_size} is not divisible by {parts}the {jax.device_count()} devices of '
      f'this run; set it to a multiple of {unit}'
    )


def check_attention(kernel: str, dtype: str) -> None:
  """Raises UserError unless the kernel supports these devices and this type; see `layers.attention`."""
  if kernel == 'cudnn' and dtype != 'bfloat16':
    raise UserError('compute.attention=cudnn needs compute.dtype=bfloat16')
  if kernel == 'cudnn' and jax.default_backend() != 'gpu':
    raise UserError(
      f'compute.attention=cudnn needs GPUs, but this run has {jax.default_backend()} devices; set compute.attention=xla'
    )


def device_count() -> int:
  """Returns the number of devices of all processes."""
  return jax.device_count()


def local_device_count() -> int:
  """Returns the number of devices of this process."""
  return jax.local_device_count()


def memory_per_device() -> int | None:
  """Returns the bytes that this program may use on a device; None for devices that do not report it, such as CPUs."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')


def round_up(batch_size: int) -> int:
  """Rounds a batch size up to a multiple of the number of devices."""
  return -(-batch_size // jax.device_count()) * jax.device_count()


def part() -> tuple[int, int]:
  """Returns this process's index and the number of processes; each reads its own part of every batch."""
  return jax.process_index(), jax.process_count()


def put(batch: Any) -> Any:
  """Converts this process's part of a batch (NumPy) to global arrays that are split over all devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(), x), batch)


def spread(batch: Any) -> Any:
  """Converts a whole batch (NumPy), the same in every process, to global arrays that are split over all devices."""
  return jax.tree.map(lambda x: _make_global(x, split()), batch)


def ahead(batches: Iterable[Any], count: int = 2) -> Iterator[Any]:
  """Yields batches converted by `put`, with `count` of them prefetched."""
  ready: collections.deque[Any] = collections.deque()
  for batch in batches:
    ready.append(put(batch))
    if len(ready) > count:
      yield ready.popleft()
  yield from ready


def _make_global(x: Any, sharding: NamedSharding) -> jax.Array:
  whole = np.asarray(x)
  return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(tree: Any) -> Any:
  """Replicates a tree of arrays on every device; arrays of the host must be the same in every process."""
  whole = replicated()
  leaves, structure = jax.tree.flatten(tree)
  if jax.process_count() == 1:
    return jax.device_put(tree, whole)
  split_up = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves]
  gathered = _gathering(_mesh())([leaf for leaf, far in zip(leaves, split_up, strict=True) if far])
  wait_on_cpu(gathered)
  of_both = iter(gathered)
  return jax.tree.unflatten(
    structure,
    [
      next(of_both) if far else _make_global(leaf, whole)
      for leaf, far in zip(leaves, split_up, strict=True)
    ],
  )


def wait_on_cpu(tree: Any) -> None:
  """Waits for `tree` on CPUs with several devices, where concurrent programs can deadlock for lack of threads."""
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.block_until_ready(tree)


@functools.cache
def _gathering(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
  return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))


def place(tree: Any) -> Any:
  """Places a tree of arrays of the host, the same in every process, on the devices, sharded by `of`."""
  return jax.tree.map(_make_global, tree, of(tree))


def create(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)` of trees of the host, sharded by `of`; the result is never whole on one device."""
  layout = of(jax.eval_shape(function, *args))
  return compilation.run_once(function, *args, out_shardings=layout)


def abstract(tree: Any) -> Any:
  """Returns the shapes, types and shardings of a tree, to restore a checkpoint on any number of devices."""

  def describe(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(describe, tree, of(tree))


def to_host(tree: Any) -> Any:
  """Copies whole arrays to NumPy in every process, one at a time; the copies share no memory with the devices."""

  def copy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      leaf = replicate(leaf)
    return np.array(leaf)

  return jax.tree.map(copy, tree)


def gather_batch(batch: Any) -> Any:
  """Returns the whole batch (NumPy) in every process, from the parts that the processes have read."""
  return batch if jax.process_count() == 1 else to_host(put(batch))


def snapshot(tree: Any) -> Any:
  """Copies a tree on the devices, to be read in the background while the next update reuses the memory of the original.

  The transfer to the host has been started; each process transfers its own shards.
  """
  copy = _copy(tree)
  wait_on_cpu(copy)
  for leaf in jax.tree.leaves(copy):
    leaf.copy_to_host_async()
  return copy


_copy = jax.jit(functools.partial(jax.tree.map, jax.numpy.copy))


def compile_step(step: Callable) -> Callable:
  """Jits step(recipe, state, frozen, batch) -> (state, metrics) for the mesh in use, donating the state."""
  mesh = _mesh()

  def gathering(recipe: Any) -> Any:
    if isinstance(recipe, tuple):  # several updates in one program
      return tuple(map(gathering, recipe))
    if mesh.shape['fsdp'] == 1:
      return recipe
    whole, part = NamedSharding(mesh, PartitionSpec()), functools.partial(_of_shape, mesh)
    return recipe.map_networks(lambda network: Gathered(network, whole, part))

  def compiled(recipe: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
    state, metrics = step(gathering(recipe), state, frozen, batch)
    layout = jax.tree.map(lambda leaf: _of_shape(mesh, leaf.shape), state)
    whole = NamedSharding(mesh, PartitionSpec())
    return (
      jax.lax.with_sharding_constraint(state, layout),
      jax.lax.with_sharding_constraint(metrics, whole),
    )

  return jax.jit(compiled, donate_argnums=1, compiler_options=compilation.options())


@contextlib.contextmanager
def compiled_meanwhile(step: Any, recipe: Any, state: Any, frozen: Any, batch: Any) -> Iterator[None]:
  """Compiles the program of `compile_step` in a thread while the body runs, so that the first call finds it.

  It is traced before the body, because two threads of Python would only take turns. With several processes, or with a `step`
  that is not jitted, nothing is compiled ahead of time.

  Args:
    step: the result of `compile_step`.
    recipe: the recipe that the step will be called with.
    state, frozen, batch: arrays or their shapes and types.
  """
  if jax.process_count() > 1 or not hasattr(step, 'lower'):
    yield
    return
  examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split()), batch)
  # Traced here, not in the thread, which may outlive the layout.
  lowered = step.lower(recipe, abstract(state), abstract(frozen), examples)
  thread = concurrent.futures.ThreadPoolExecutor(1)
  program = thread.submit(lowered.compile)
  thread.shutdown(wait=False)
  yield  # an error in the body is reported at once, but the process exits only when the compiler is done
  concurrent.futures.wait([program])  # an error of the compiler is raised by the first call
