"""Estimates the device memory of a stage on any layout of devices, from shapes alone."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.extend import core

from diffusion_distillation.run.inputs import shapes
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training import step
from diffusion_distillation.training.state import Params

_PRIME = 10_007  # batch size of an abstract batch; sizes that divide by it grow with the batch


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while a stage trains.

  Attributes:
    params: parameters of the networks in training.
    averages: moving averages of the student's parameters.
    optimizer: moments of the optimizer.
    frozen: parameters of the teacher and weights of a distance.
    gradients: gradients of the networks in training, and the updates computed from them; with LoRA also the kernels that are
      merged with adapters, and their gradients.
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
    merged: the kernels that an update computes from frozen ones and their low-rank adapters, by network.
  """

  state: Any
  trained: Any
  frozen: Any
  activations: int
  batch_size: int
  merged: Any = ()

  def on(self, devices: int, fsdp: int, micro_batches: int) -> Memory:
    """Returns the memory on each of a number of devices, over `fsdp` of which each network is split."""
    state, per_device = self.state, functools.partial(sharding.bytes_in_parts, parts=fsdp)
    examples = self.batch_size // micro_batches
    return Memory(
      params=per_device(state.params),
      averages=per_device(state.ema_params),
      optimizer=per_device(state.opt_state),
      frozen=per_device(self.frozen),
      gradients=2 * (per_device(self.trained) + per_device(self.merged)),
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


def count(stage: Stage, distance: Params = None) -> Shapes:
  """Returns the shapes of a stage; compiles and computes nothing, and uses no device memory."""
  state, frozen = stage.abstract_state, _frozen(stage, distance)
  recipe = stage.recipe.at(stage.recipe.method.period - 1)  # an update that trains all networks
  trained = {name: state.params[name] for name in recipe.method.trained}
  activations = _activations(stage, state, frozen)
  return Shapes(state, trained, frozen, activations, stage.batch_size, _merged(stage, frozen, state))


def arguments(stage: Stage, distance: Params = None) -> int:
  """Returns `Memory.arguments` of a stage, without tracing its loss."""
  state = stage.abstract_state
  held = (state.params, state.ema_params, state.opt_state, _frozen(stage, distance))
  return sum(map(sharding.bytes_per_device, held))


def _frozen(stage: Stage, distance: Params) -> dict[str, Params]:
  teacher, start = map(_as_numbers, (stage.abstract_teacher, stage.abstract_params))
  return stage.frozen(teacher, distance, start)


def _merged(stage: Stage, frozen: Mapping[str, Params], state: Any) -> dict[str, Params]:
  """Returns the shapes of the kernels that an update merges with adapters, by network."""
  of, found = stage.recipe.lora, {}
  for network, _ in () if of is None else of.bases:
    held = {**frozen, **state.params, 'average': state.params['student']}
    merged = jax.eval_shape(lambda held, name=network: stage.recipe.weights(name, held), held)
    flat = traverse_util.flatten_dict(merged, sep='/')
    found[network] = {module: flat[f'{module}/kernel'] for module in held[network]}
  return found


def memory(stage: Stage, distance: Params = None) -> Memory:
  """Estimates the memory of a stage from shapes alone; see `count`."""
  layout = (sharding.device_count(), sharding.fsdp(), stage.recipe.micro_batches)
  return count(stage, distance).on(*layout)


def _gathered(networks: Any, fsdp: int) -> int:
  """Bytes of the largest layers that are gathered: one that is computed, one that is fetched meanwhile; 0 without fsdp."""
  fetched = [bytes_of(leaf) - sharding.bytes_in_parts(leaf, fsdp) for leaf in jax.tree.leaves(networks)]
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
  traced = jax.make_jaxpr(loss)(trained, state, dict(frozen), shapes(stage, _PRIME))
  blocks = {str(block.in_avals): block for block in _recomputed(traced.jaxpr)}
  largest = max((_growing(_residuals_of(block)) for block in blocks.values()), default=0)
  return _growing(_residuals_of(traced, len(jax.tree.leaves(trained)))) + largest


def _growing(tree: Any) -> int:
  """Returns the bytes per example of those arrays that grow with the batch."""
  grows = [leaf for leaf in jax.tree.leaves(tree) if any(n and n % _PRIME == 0 for n in leaf.shape)]
  return bytes_of(grows) // _PRIME


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


def _residuals_of(traced: Any, count: int | None = None) -> Any:
  """Returns the shapes of what a function keeps for its gradient with respect to its first arguments; None for all of them."""
  function = core.jaxpr_as_fun(traced)
  given = [jax.ShapeDtypeStruct(var.shape, var.dtype) for var in traced.in_avals]

  def residuals(*args: Any) -> Any:
    return jax.vjp(lambda *first: function(*first, *args[len(first) :]), *args[:count])[1]

  return jax.eval_shape(residuals, *given)


def bytes_of(tree: Any) -> int:
  """Returns the bytes of arrays, or of their shapes."""
  return sharding.bytes_in_parts(tree, 1)
