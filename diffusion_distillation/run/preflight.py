"""Estimates the memory and disk space that a run needs, and refuses a run that cannot fit, before anything is compiled."""

import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.run import inputs
from diffusion_distillation.run.device_memory import (
  Memory,
  Shapes,
  arguments,
  bytes_of,
  count,
  memory,
  smallest_layout,
)
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import Params

_CHECKPOINTS = 2  # kept per stage
_GB = 1e9


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
    narrower = '' if stage.adapts_teacher else ', and compute.teacher_dtype=bfloat16'
    return f'fits no layout of devices of {limit / _GB:g} GB; set compute.remat=True and compute.dtype=bfloat16{narrower}'
  section = {'denoising': 'train', 'progressive': 'distill'}.get(stage.method, stage.method)
  keys = [f'mesh.fsdp={found.fsdp}'] * (found.fsdp > 1)
  keys += [f'{section}.micro_batches={found.micro_batches}'] * (found.micro_batches > 1)
  of = f'{found.devices} device{"s" * (found.devices > 1)} of {limit / _GB:g} GB'
  return (
    f'fits {of}{" with " * bool(keys)}{" and ".join(keys)}: {found.memory.total / _GB:.1f} GB on each'
  )


def disk(stages: list[Stage], finished: set[str]) -> int:
  """Returns the bytes that checkpoints and pairs of unfinished stages will take at most."""
  todo = [stage for stage in stages if stage.name not in finished]
  states = [bytes_of(stage.abstract_state) for stage in todo]
  pairs = next(
    (
      stage.pairs.count * (8 * int(np.prod(stage.recipe.shape[1:])) + 4) for stage in todo if stage.pairs
    ),
    0,
  )
  # The weights of a student are in its state, unless that only has adapters.
  models = [bytes_of(stage.abstract_params) for stage in todo if stage.recipe.lora is not None]
  return _CHECKPOINTS * sum(states) + max(states, default=0) + sum(models) + pairs


def check(
  stages: list[Stage],
  finished: set[str],
  workdir: pathlib.Path,
  distances: Mapping[str, Params],
  encoded: int = 0,
) -> None:
  """Refuses a run that cannot fit this machine; traces no loss and compiles nothing. See `needs` for the arguments.

  Raises:
    UserError: the parameters, averages, optimizer and teacher alone exceed the memory of a device, or the host memory or the
      disk is too small.
  """
  limit = _memory_of_a_device()
  for stage in (stage for stage in stages if stage.name not in finished):
    if (held := arguments(stage, distances.get(stage.name))) > limit:
      narrower = '' if stage.adapts_teacher else ', or set compute.teacher_dtype=bfloat16'
      raise UserError(
        f'stage {stage.name}: parameters, averages, optimizer and teacher take {held / _GB:.1f} GB of the '
        f'{limit / _GB:.1f} GB of a device; raise mesh.fsdp{narrower}'
      )
  needed, there = host(stages, finished), _memory_of_the_host()
  if needed > there:
    raise UserError(
      f'the weights that later stages need and writing a checkpoint take {needed / _GB:.1f} GB of the '
      f"{there / _GB:.1f} GB of this host's memory; use a larger host, or keep fewer averages (ema_decay)"
    )
  needed, free = disk(stages, finished) + encoded, _free(workdir)
  if needed > free:
    raise UserError(
      f'--workdir={workdir}: {_on_disk(encoded)} will take {needed / _GB:.2f} GB, but only {free / _GB:.2f} GB are '
      'free; free up space, or choose another disk'
    )


def needs(
  stages: list[Stage],
  finished: set[str],
  workdir: pathlib.Path,
  distances: Mapping[str, Params],
  encoded: int = 0,
  device_gb: float = 0.0,
) -> Iterator[str]:
  """Yields lines with the device memory of each unfinished stage, then the host memory and the disk space of the run.

  Args:
    stages: the stages of the run.
    finished: names of the finished stages.
    workdir: the workdir of the run; it need not exist.
    distances: weights of the distance, for each stage that has one with weights.
    encoded: bytes of encoded texts that are still to be written.
    device_gb: memory in gigabytes of other devices to plan for, the smallest layout of which is then named for each stage; 0
      for the devices of this machine.
  """
  limit = _memory_of_a_device()
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
    elif of.total > limit:
      yield (
        f'  warning: {of.total / _GB:.1f} GB may not fit the {limit / _GB:.1f} GB of a device; raise micro_batches '
        'or mesh.fsdp, or set compute.remat=True or compute.dtype=bfloat16'
      )
  yield (
    f'memory of the host, GB: {host(stages, finished) / _GB:.3f} for the weights that later stages need and for writing '
    f'a checkpoint; {_memory_of_the_host() / _GB:.1f} in total'
  )
  needed = disk(stages, finished) + encoded
  yield f'disk, GB: {needed / _GB:.3f} for {_on_disk(encoded)}; {_free(workdir) / _GB:.1f} free'


def _on_disk(encoded: int) -> str:
  return 'checkpoints, pairs and encoded texts' if encoded else 'checkpoints and pairs'


def host(stages: list[Stage], finished: set[str]) -> int:
  """Returns the peak bytes of weights in each process's host memory: those that later stages need, and a checkpoint."""
  most = 0
  for k, stage in enumerate(stages):
    if stage.name not in finished:
      left = [later for later in stages[k:] if later.name not in finished]
      held = [len(inputs.needed(left, by.name)) * bytes_of(by.abstract_params) for by in stages[:k]]
      most = max(most, sum(held) + _on_host(stage))
  return most


def _on_host(stage: Stage) -> int:
  """Returns the bytes of the state that this process writes; several processes each write a share."""
  state = stage.abstract_state
  own = sharding.bytes_per_device(state) * sharding.local_device_count()
  if stage.recipe.lora is not None:  # the merged weights are larger than the state
    return bytes_of(state) + len(stage.weights) * bytes_of(stage.abstract_params)
  return bytes_of(state) if sharding.part()[1] == 1 else min(own, bytes_of(state))


def _memory_of_a_device() -> int:
  """Returns the bytes that this program may use on a device, or its share of the host's memory if that is not reported."""
  return sharding.memory_per_device() or _memory_of_the_host() // sharding.local_device_count()


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
