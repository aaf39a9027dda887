"""Mesh and shardings: the only file that names devices.

The mesh has two axes, `data` and `fsdp`, and batches are split over both. Over `fsdp` alone networks are split as well,
with their averages and optimizer states, and so is the frozen teacher: each array along its longest axis that
divides. A network's parameters are gathered where it is called, and its gradients are scattered where they arise;
all that lies between sees global arrays.
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
_in_use: list[Mesh] = []  # the last one counts; without any, all devices are along `data`


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """The layout of all devices: data x fsdp. Batches are split over both axes."""

  data: int = key(-1, 'Number of devices along `data`; -1 for all devices divided by `mesh.fsdp`.')
  fsdp: int = key(
    1,
    'Number of devices that every network, its moving averages and its optimizer state are split over; a divisor of '
    'the number of devices.',
  )


@contextlib.contextmanager
def laid_out(data: int = -1, fsdp: int = 1) -> Iterator[None]:
  """The devices of all processes are laid out so while the body runs, and afterwards as before.

  Args:
    data: devices along this axis; -1: those that `fsdp` leaves.
    fsdp: devices that each network is split over.

  Raises:
    UserError: the axes do not make up the devices there are.
  """
  count = jax.device_count()
  if fsdp < 1 or count % fsdp or data not in (-1, count // fsdp):
    raise UserError(
      f'mesh.data={data} times mesh.fsdp={fsdp} is not the {count} devices of this run; mesh.data=-1 takes what '
      'mesh.fsdp, a divisor of them, leaves'
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
  """The devices and their layout, for people."""
  shape = dict(_mesh().shape)
  processes = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  layout = f' (data {shape["data"]} x fsdp {shape["fsdp"]})' if shape['fsdp'] > 1 else ''
  return f'{_mesh().size} {jax.default_backend()} device(s){processes}{layout}'


def replicated() -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(_mesh(), PartitionSpec())


def split() -> NamedSharding:
  """The leading axis, that of the examples, is split over all devices."""
  return NamedSharding(_mesh(), PartitionSpec(_AXES))


def of(tree: Any) -> Any:
  """The sharding of each array of a network, an average or an optimizer state, by its shape alone."""
  return jax.tree.map(lambda leaf: _of_shape(_mesh(), tuple(leaf.shape)), tree)


def _of_shape(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  parts = mesh.shape['fsdp']
  divisible = [k for k, size in enumerate(shape) if size % parts == 0]
  if len(shape) > 1 and divisible and parts > 1:
    longest = max(divisible, key=lambda k: (shape[k], k))
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, 'fsdp'))
  return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(tree: Any) -> int:
  """What each device holds of arrays (or their shapes) that are laid out as `of` says."""
  shapes = zip(jax.tree.leaves(tree), jax.tree.leaves(of(tree)), strict=True)
  return sum(
    int(np.prod(sharding.shard_shape(tuple(leaf.shape)), dtype=np.int64)) * leaf.dtype.itemsize
    for leaf, sharding in shapes
  )


def check_batch(section: str, batch_size: int, micro_batches: int) -> None:
  """Raises UserError, naming the config keys, unless each micro-batch divides by the devices."""
  unit = micro_batches * jax.device_count()
  if batch_size % unit:
    parts = f'{section}.micro_batches={micro_batches} times ' if micro_batches > 1 else ''
    raise UserError(
      f'{section}.batch_size={batch_size} does not divide by {parts}the {jax.device_count()} devices of '
      f'this run; set it to a multiple of {unit}'
    )


def check_attention(kernel: str, dtype: str) -> None:
  """Raises UserError unless these devices have the kernel, and for this type; see `layers.attention`."""
  if kernel == 'cudnn' and dtype != 'bfloat16':
    raise UserError('compute.attention=cudnn needs compute.dtype=bfloat16')
  if kernel == 'cudnn' and jax.default_backend() != 'gpu':
    raise UserError(
      f'compute.attention=cudnn is for GPUs, and this run has {jax.default_backend()} devices: leave it out'
    )


def device_count() -> int:
  """Devices of all processes."""
  return jax.device_count()


def local_device_count() -> int:
  """Devices of this process."""
  return jax.local_device_count()


def memory_per_device() -> int | None:
  """Bytes that a device of this process has for this program, where it says so: a GPU or TPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit')


def round_up(batch_size: int) -> int:
  """The next batch size that divides by the devices."""
  return -(-batch_size // jax.device_count()) * jax.device_count()


def part() -> tuple[int, int]:
  """This process, of how many: the part of each batch that it reads."""
  return jax.process_index(), jax.process_count()


def put(batch: Any) -> Any:
  """This process's part of a batch (NumPy) to global arrays split over all devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(), x), batch)


def spread(batch: Any) -> Any:
  """A whole batch (NumPy), the same in every process, to global arrays split over all devices."""
  return jax.tree.map(lambda x: _make_global(x, split()), batch)


def ahead(batches: Iterable[Any], count: int = 2) -> Iterator[Any]:
  """Yields batches as `put` gives them, `count` of them on their way before they are asked for."""
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
  """A tree of arrays, on every device as a whole; those of the host are the same in every process."""
  whole = replicated()
  leaves, structure = jax.tree.flatten(tree)
  if jax.process_count() == 1:
    return jax.device_put(tree, whole)
  split_up = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves]
  gathered = _gathering(_mesh())([leaf for leaf, far in zip(leaves, split_up, strict=True) if far])
  settle(gathered)
  of_both = iter(gathered)
  return jax.tree.unflatten(
    structure,
    [
      next(of_both) if far else _make_global(leaf, whole)
      for leaf, far in zip(leaves, split_up, strict=True)
    ],
  )


def settle(tree: Any) -> None:
  """Waits for `tree` on CPUs of several devices: programs in flight could take each other's threads, and wait for ever."""
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.block_until_ready(tree)


@functools.cache
def _gathering(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
  return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))


def place(tree: Any) -> Any:
  """A tree of arrays of the host, the same in every process, laid out as `of` says."""
  return jax.tree.map(_make_global, tree, of(tree))


def create(function: Callable[..., Any], *args: Any) -> Any:
  """What `function` makes of trees of the host, laid out as `of` says, without ever being whole on one device."""
  layout = of(jax.eval_shape(function, *args))
  return compilation.run_once(function, *args, out_shardings=layout)


def abstract(tree: Any) -> Any:
  """Shapes and types of a tree, each with its sharding: what a checkpoint is restored to, on however many devices."""

  def describe(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(describe, tree, of(tree))


def to_host(tree: Any) -> Any:
  """NumPy copies of whole arrays in every process, that share no memory with the devices; array by array."""

  def copy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      leaf = replicate(leaf)
    return np.array(leaf)

  return jax.tree.map(copy, tree)


def whole(batch: Any) -> Any:
  """The whole batch (NumPy) in every process, of the parts that each has read."""
  return batch if jax.process_count() == 1 else to_host(put(batch))


def snapshot(tree: Any) -> Any:
  """A copy on the devices, to be read in the background: the next update, that is donated the original, leaves it as it is.

  Its way to the host, each process its share, has begun.
  """
  copy = _copy(tree)
  settle(copy)
  for leaf in jax.tree.leaves(copy):
    leaf.copy_to_host_async()
  return copy


_copy = jax.jit(functools.partial(jax.tree.map, jax.numpy.copy))


def compile_step(step: Callable) -> Callable:
  """Jits step(recipe, state, frozen, batch) -> (state, metrics) for the mesh in use, donating the state."""
  mesh = _mesh()

  def gathering(recipe: Any) -> Any:
    if isinstance(recipe, tuple):  # of several updates in one program
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
  """Has the program of `compile_step` compiled in a thread while the body runs; the first call then finds it.

  With several processes, or a `step` that is not jitted, nothing is compiled ahead.

  Args:
    step: of `compile_step`.
    recipe: as the step is given it.
    state, frozen, batch: arrays or their shapes and types.
  """
  if jax.process_count() > 1 or not hasattr(step, 'lower'):
    yield
    return
  examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split()), batch)
  # Not in the thread, which may outlive the layout.
  given = (recipe, abstract(state), abstract(frozen), examples)
  thread = concurrent.futures.ThreadPoolExecutor(1)
  program = thread.submit(lambda: step.lower(*given).compile())
  thread.shutdown(wait=False)
  yield  # an error here is reported at once, though the process ends only after the compiler has
  concurrent.futures.wait([program])  # a failure of the compiler shows in the first call
