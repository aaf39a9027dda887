"""Estimates the memory and disk space that a run needs, and refuses runs that cannot fit, before anything is compiled."""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from diffusion_distillation.errors import UserError
from diffusion_distillation.run import inputs
from diffusion_distillation.run.inputs import shapes
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training import step
from diffusion_distillation.training.state import Params

_CHECKPOINTS = 2  # kept per stage
_GB = 1e9
_PRIME = 10_007  # batch size of an abstract batch; sizes that divide by it grow with the batch


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while a stage trains.

  Attributes:
    params: parameters of the networks in training.
    averages: moving averages of the student's parameters.
    optimizer: moments of the optimizer.
    frozen: parameters of the teacher and weights of a distance.
    gradients: gradients of the networks in training, and the updates computed from them.
    gathered: parameters of sharded networks that an update fetches from other devices at a time.
    activations: activations that one micro-batch keeps for the backward pass, and those of the largest block that it recomputes.
    snapshot: the copy of networks, averages and optimizer that a checkpoint is written from in the background.
  """

  params: int
  averages: int
  optimizer: int
  frozen: int
  gradients: int
  gathered: int
  activations: int
  snapshot: int

  @property
  def arguments(self) -> int:
    """The arguments of the step except for the batch; this number is exact."""
    return self.params + self.averages + self.optimizer + self.frozen

  @property
  def total(self) -> int:
    """The sum of all."""
    return self.arguments + self.gradients + self.gathered + self.activations + self.snapshot


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The arrays of a stage, as shapes, from which its memory on any layout of devices follows.

  Attributes:
    state: the training state.
    trained: the parameters of the networks that an update trains.
    frozen: the parameters that updates only read.
    activations: bytes of activations per example.
    batch_size: examples per update.
  """

  state: Any
  trained: Any
  frozen: Any
  activations: int
  batch_size: int

  def on(self, devices: int, fsdp: int, micro_batches: int) -> Memory:
    """Returns the memory on each of a number of devices, over `fsdp` of which each network is split."""
    state, per_device = self.state, functools.partial(sharding.bytes_in_parts, parts=fsdp)
    examples = self.batch_size // micro_batches
    return Memory(
      params=per_device(state.params),
      averages=per_device(state.ema_params),
      optimizer=per_device(state.opt_state),
      frozen=per_device(self.frozen),
      gradients=2 * per_device(self.trained),
      gathered=_gathered((state.params, self.frozen), fsdp),
      activations=self.activations * -(-examples // devices),
      snapshot=per_device(state),
    )


class Layout(NamedTuple):
  """A layout of devices, and the memory on each of them; see `Shapes.on`."""

  devices: int
  fsdp: int
  micro_batches: int
  memory: Memory


def smallest_layout(shapes: Shapes, limit: float) -> Layout | None:
  """Returns the smallest layout with at most `limit` bytes on each device: the fewest devices, then the least fsdp, then the
  fewest micro-batches; None if up to 1024 devices are too few.
  """
  size = shapes.batch_size
  for devices in (2**k for k in range(11)):
    for fsdp in (2**k for k in range(devices.bit_length())):
      least = shapes.on(devices, fsdp, max(1, size // devices))
      room = limit - (least.total - least.activations)
      for micro_batches in (m for m in range(1, size // devices + 1) if size % (m * devices) == 0):
        activations = shapes.activations * (size // (m := micro_batches * devices))
        if activations <= room:
          found = dataclasses.replace(least, activations=activations)
          return Layout(devices, fsdp, m // devices, found)
  return None


def _memory_and_layout(stage: Stage, distance: Params, device_gb: float) -> tuple[Memory, str]:
  """Returns the memory of a stage on this machine and, if `device_gb` is not 0, the smallest layout of such devices."""
  if not device_gb:
    return memory(stage, distance), ''
  shapes = count(stage, distance)
  layout = (sharding.device_count(), sharding.fsdp(), stage.recipe.micro_batches)
  return shapes.on(*layout), _name_layout(stage, shapes, device_gb * _GB)


def _name_layout(stage: Stage, shapes: Shapes, limit: float) -> str:
  """Returns the words that name the smallest layout of devices with `limit` bytes that a stage fits."""
  found = smallest_layout(shapes, limit)
  if found is None:
    return (
      f'fits no layout of devices of {limit / _GB:g} GB; set compute.remat=True, compute.dtype=bfloat16 and '
      'compute.teacher_dtype=bfloat16'
    )
  section = {'denoising': 'train', 'progressive': 'distill'}.get(stage.method, stage.method)
  keys = [f'mesh.fsdp={found.fsdp}'] * (found.fsdp > 1)
  keys += [f'{section}.micro_batches={found.micro_batches}'] * (found.micro_batches > 1)
  of = f'{found.devices} device{"s" * (found.devices > 1)} of {limit / _GB:g} GB'
  return (
    f'fits {of}{" with " * bool(keys)}{" and ".join(keys)}: {found.memory.total / _GB:.1f} GB on each'
  )


def count(stage: Stage, distance: Params = None) -> Shapes:
  """Returns the shapes of a stage; compiles and computes nothing, and uses no device memory."""
  state = stage.abstract_state()
  frozen = stage.frozen(_as_numbers(stage.abstract_teacher()), distance)
  recipe = stage.recipe.at(stage.recipe.method.period - 1)  # an update that trains all networks
  trained = {name: state.params[name] for name in recipe.method.trained}
  return Shapes(state, trained, frozen, _activations(stage, state, frozen), stage.batch_size)


def memory(stage: Stage, distance: Params = None) -> Memory:
  """Estimates the memory of a stage from shapes alone; see `count`."""
  layout = (sharding.device_count(), sharding.fsdp(), stage.recipe.micro_batches)
  return count(stage, distance).on(*layout)


def _gathered(networks: Any, fsdp: int) -> int:
  """Bytes of the largest layers that are gathered: one that is computed, one that is fetched meanwhile; 0 without fsdp."""
  fetched = [_bytes(leaf) - sharding.bytes_in_parts(leaf, fsdp) for leaf in jax.tree.leaves(networks)]
  return sum(sorted(fetched)[-2:])


def _as_numbers(tree: Any) -> Any:
  """Returns arrays of these shapes and types that take no memory, for code that does not read the values."""
  return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree)


def _activations(stage: Stage, state: Any, frozen: Mapping[str, Params]) -> int:
  """Returns the bytes per example of the residuals that the loss keeps for its gradient and that grow with the batch.

  Where blocks are recomputed (`compute.remat`), the residuals of the largest block are added, which its gradient needs.
  """
  recipe = stage.recipe.at(stage.recipe.method.period - 1)
  recipe = dataclasses.replace(recipe, shape=(_PRIME, *recipe.shape[1:]))

  def loss(trained: Any, state: Any, frozen: Any, batch: Any) -> Any:
    rng = jax.random.key(0)
    examples = step.make_examples(recipe, batch, rng, rng)
    nets = recipe.bind({**frozen, **state.params, 'average': state.ema_params[0], **trained})
    return recipe.method.loss(nets, examples, rng, jnp.array(0))[0]

  trained = {name: state.params[name] for name in recipe.method.trained}
  given = (trained, state, dict(frozen), shapes(stage, _PRIME))

  def residuals(trained: Any, *others: Any) -> Any:
    return jax.vjp(lambda trained: loss(trained, *others), trained)[1]

  blocks = {str(block.in_avals): block for block in _recomputed(jax.make_jaxpr(loss)(*given).jaxpr)}
  largest = max((_growing(_residuals_of(block)) for block in blocks.values()), default=0)
  return _growing(jax.eval_shape(residuals, *given)) + largest


def _growing(tree: Any) -> int:
  """Returns the bytes per example of those arrays that grow with the batch."""
  grows = [leaf for leaf in jax.tree.leaves(tree) if any(n and n % _PRIME == 0 for n in leaf.shape)]
  return _bytes(grows) // _PRIME


def _recomputed(jaxpr: Any) -> Iterator[Any]:
  """Yields the blocks, as closed jaxprs, whose residuals are recomputed in the backward pass."""
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
      found: Any = getattr(value, 'jaxpr', value)
      if hasattr(found, 'eqns'):
        if equation.primitive.name in ('checkpoint', 'remat', 'remat2'):
          yield core.ClosedJaxpr(found, ())
        else:
          yield from _recomputed(found)


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


def _residuals_of(block: Any) -> Any:
  function = core.jaxpr_as_fun(block)
  given = [jax.ShapeDtypeStruct(var.shape, var.dtype) for var in block.in_avals]
  return jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *given)


def disk(stages: list[Stage], finished: set[str]) -> int:
  """Returns the bytes that checkpoints and pairs of unfinished stages will take at most."""
  todo = [stage for stage in stages if stage.name not in finished]
  states = [_bytes(stage.abstract_state()) for stage in todo]
  pairs = next(
    (
      stage.pairs.count * (8 * int(np.prod(stage.recipe.shape[1:])) + 4) for stage in todo if stage.pairs
    ),
    0,
  )
  return _CHECKPOINTS * sum(states) + max(states, default=0) + pairs


def _bytes(tree: Any) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def needs(
  stages: list[Stage],
  finished: set[str],
  workdir: pathlib.Path,
  distances: Mapping[str, Params],
  device_gb: float = 0.0,
) -> Iterator[str]:
  """Yields lines with the device memory of each unfinished stage, then the host memory and the disk space of the run.

  With `device_gb`, the run is planned for other devices, of so many gigabytes: the smallest layout of them that each stage
  fits is named, and nothing is raised.

  Raises:
    UserError: the parameters, averages, optimizer and teacher alone exceed the memory of a device, or the host memory or the
      disk is too small.
  """
  limit = sharding.memory_per_device() or _memory_of_the_host() // sharding.local_device_count()
  yield 'memory of each device, GB:  parameters  averages  optimizer  frozen  gradients  gathered  activations  snapshot  together'
  kinds: dict[Any, tuple[Memory, str]] = {}
  for stage in stages:
    if stage.name in finished:
      continue
    kind = (jax.tree.structure(stage.recipe), stage.batch_size, stage.parent is None)
    if kind not in kinds:
      kinds[kind] = _memory_and_layout(stage, distances.get(stage.name), device_gb)
    of, layout = kinds[kind]
    figures = (
      of.params,
      of.averages,
      of.optimizer,
      of.frozen,
      of.gradients,
      of.gathered,
      of.activations,
      of.snapshot,
      of.total,
    )
    columns = zip((12, 10, 11, 8, 11, 10, 13, 10, 10), figures, strict=True)
    per_device = stage.batch_size // sharding.device_count()
    yield (
      f'  {stage.name:<25}'
      + ''.join(f'{x / _GB:>{w}.3f}' for w, x in columns)
      + f'  ({per_device} images)'
    )
    if layout:
      yield f'  {stage.name:<25}{layout}'
    elif of.arguments > limit:
      raise UserError(
        f'stage {stage.name}: parameters, averages, optimizer and teacher take {of.arguments / _GB:.1f} GB of the '
        f'{limit / _GB:.1f} GB of a device; raise mesh.fsdp, or set compute.teacher_dtype=bfloat16'
      )
    elif of.total > limit:
      yield (
        f'  warning: {of.total / _GB:.1f} GB may not fit the {limit / _GB:.1f} GB of a device; raise micro_batches '
        'or mesh.fsdp, or set compute.remat=True or compute.dtype=bfloat16'
      )
  yield from _host_needs(stages, finished, bool(device_gb))
  needed, free = disk(stages, finished), _free(workdir)
  yield f'disk, GB: {needed / _GB:.3f} for checkpoints and pairs; {free / _GB:.1f} free'
  if needed > free and not device_gb:
    raise UserError(
      f'--workdir={workdir}: checkpoints and pairs will take {needed / _GB:.2f} GB, but only {free / _GB:.2f} GB are '
      'free; free up space, or choose another disk'
    )


def host(stages: list[Stage], finished: set[str]) -> int:
  """Returns the peak bytes of weights in each process's host memory: those that later stages need, and a checkpoint."""
  most = 0
  for k, stage in enumerate(stages):
    if stage.name not in finished:
      left = [later for later in stages[k:] if later.name not in finished]
      held = [len(inputs.needed(left, by.name)) * _bytes(by.abstract_params()) for by in stages[:k]]
      most = max(most, sum(held) + _on_host(stage))
  return most


def _on_host(stage: Stage) -> int:
  """Returns the bytes of the state that this process writes; several processes each write a share."""
  state = stage.abstract_state()
  own = sharding.bytes_per_device(state) * sharding.local_device_count()
  return _bytes(state) if sharding.part()[1] == 1 else min(own, _bytes(state))


def _host_needs(stages: list[Stage], finished: set[str], elsewhere: bool) -> Iterator[str]:
  needed, there = host(stages, finished), _memory_of_the_host()
  yield (
    f'memory of the host, GB: {needed / _GB:.3f} for the weights that later stages need and for writing a checkpoint; '
    f'{there / _GB:.1f} in total'
  )
  if needed > there and not elsewhere:
    raise UserError(
      f'the weights that later stages need and writing a checkpoint take {needed / _GB:.1f} GB of the '
      f"{there / _GB:.1f} GB of this host's memory; use a larger host, or keep fewer averages (ema_decay)"
    )


def _memory_of_the_host() -> int:
  """Returns the bytes of this machine's memory, or the limit of the container if that is lower."""
  pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return min([pages, *_container_limits()])


def _container_limits(root: pathlib.Path = pathlib.Path('/')) -> list[int]:
  """Returns the memory limits in bytes of this process's control groups and their ancestors, for cgroup versions 1 and 2."""
  groups = root / 'proc/self/cgroup'
  found = []
  for line in groups.read_text().splitlines() if groups.is_file() else []:
    _, kinds, path = line.split(':', 2)
    if kinds not in ('', 'memory'):
      continue
    top = root / 'sys/fs/cgroup' / kinds
    own = top / path.lstrip('/')
    for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
      limit = folder / ('memory.limit_in_bytes' if kinds else 'memory.max')
      text = limit.read_text().strip() if limit.is_file() else 'max'
      found += [int(text)] if text.isdigit() else []
  return found


def _free(path: pathlib.Path) -> int:
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free
