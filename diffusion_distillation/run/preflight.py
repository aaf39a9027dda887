"""Estimates the memory and disk space that a run needs, and refuses runs that cannot fit, before anything is compiled."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    activations: activations that one micro-batch keeps for the backward pass.
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


def memory(stage: Stage, distance: Params = None) -> Memory:
  """Estimates the memory of a stage from shapes alone; compiles and computes nothing, and uses no device memory."""
  state = stage.abstract_state()
  frozen = stage.frozen(_as_numbers(stage.abstract_teacher()), distance)
  recipe = stage.recipe.at(stage.recipe.method.period - 1)  # an update that trains all networks
  trained = {name: state.params[name] for name in recipe.method.trained}
  per_device = sharding.bytes_per_device
  return Memory(
    params=per_device(state.params),
    averages=per_device(state.ema_params),
    optimizer=per_device(state.opt_state),
    frozen=per_device(frozen),
    gradients=2 * per_device(trained),
    gathered=_gathered((state.params, frozen)),
    activations=_activations(stage, state, frozen),
    snapshot=per_device(state),
  )


def _gathered(networks: Any) -> int:
  """Bytes of the largest layers that are gathered: one that is computed, one that is fetched meanwhile; 0 without fsdp."""
  fetched = [_bytes(leaf) - sharding.bytes_per_device(leaf) for leaf in jax.tree.leaves(networks)]
  return sum(sorted(fetched)[-2:])


def _as_numbers(tree: Any) -> Any:
  """Returns arrays of these shapes and types that take no memory, for code that does not read the values."""
  return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree)


def _activations(stage: Stage, state: Any, frozen: Mapping[str, Params]) -> int:
  """Returns the bytes per device of the residuals that the loss keeps for its gradient and that grow with the batch."""
  recipe = stage.recipe.at(stage.recipe.method.period - 1)
  recipe = dataclasses.replace(recipe, shape=(_PRIME, *recipe.shape[1:]))

  def residuals(state: Any, frozen: Any, batch: Any) -> Any:
    rng = jax.random.key(0)
    examples = step.make_examples(recipe, batch, rng, rng)
    fixed = {**frozen, **state.params, 'average': state.ema_params[0]}

    def loss(trained: Any) -> Any:
      nets = recipe.bind({**fixed, **trained})
      return recipe.method.loss(nets, examples, rng, jnp.array(0))[0]

    return jax.vjp(loss, {name: state.params[name] for name in recipe.method.trained})[1]

  batch = shapes(stage, _PRIME)
  kept = jax.tree.leaves(jax.eval_shape(residuals, state, dict(frozen), batch))
  grows = [leaf for leaf in kept if any(size and size % _PRIME == 0 for size in leaf.shape)]
  examples = stage.batch_size // recipe.micro_batches
  return _bytes(grows) // _PRIME * -(-examples // sharding.device_count())


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
) -> Iterator[str]:
  """Yields lines with the device memory of each unfinished stage, then the host memory and the disk space of the run.

  Raises:
    UserError: the parameters, averages, optimizer and teacher alone exceed the memory of a device, or the host memory or the
      disk is too small.
  """
  limit = sharding.memory_per_device() or _memory_of_the_host() // sharding.local_device_count()
  yield 'memory of each device, GB:  parameters  averages  optimizer  frozen  gradients  gathered  activations  snapshot  together'
  kinds: dict[Any, Memory] = {}
  for stage in stages:
    if stage.name in finished:
      continue
    kind = (jax.tree.structure(stage.recipe), stage.batch_size, stage.parent is None)
    if kind not in kinds:
      kinds[kind] = memory(stage, distances.get(stage.name))
    of = kinds[kind]
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
    if of.arguments > limit:
      raise UserError(
        f'stage {stage.name}: parameters, averages, optimizer and teacher take {of.arguments / _GB:.1f} GB of the '
        f'{limit / _GB:.1f} GB of a device; raise mesh.fsdp, or set compute.teacher_dtype=bfloat16'
      )
    if of.total > limit:
      yield (
        f'  warning: {of.total / _GB:.1f} GB may not fit the {limit / _GB:.1f} GB of a device; raise micro_batches '
        'or mesh.fsdp, or set compute.remat=True or compute.dtype=bfloat16'
      )
  yield from _host_needs(stages, finished)
  needed, free = disk(stages, finished), _free(workdir)
  yield f'disk, GB: {needed / _GB:.3f} for checkpoints and pairs; {free / _GB:.1f} free'
  if needed > free:
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


def _host_needs(stages: list[Stage], finished: set[str]) -> Iterator[str]:
  needed, there = host(stages, finished), _memory_of_the_host()
  yield (
    f'memory of the host, GB: {needed / _GB:.3f} for the weights that later stages need and for writing a checkpoint; '
    f'{there / _GB:.1f} in total'
  )
  if needed > there:
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
