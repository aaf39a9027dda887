"""The recipe of a stage: everything that its compiled training step depends on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
from flax.core import FrozenDict

from diffusion_distillation.methods import Method
from diffusion_distillation.networks.conditioning import Conditioning
from diffusion_distillation.networks.denoiser import Bound, Denoiser
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.state import Params, TrainState


@flax.struct.dataclass
class Recipe:
  """The constants of a stage. Pytree leaves are arguments of the compiled step; the rest is static.

  Attributes:
    networks: every network that the method's loss receives, by name; see `Method.networks`.
    method: the loss.
    optimizer: the optimizer of each network, for unit learning rate; every network has its own state.
    learning_rate: learning rate as a function of the step, by network in training.
    ema_decay: decay rate of each moving average; 0 follows the parameters.
    seed: seed of all randomness in this stage.
    space: what x is.
    shape: shape of a batch of x, (B, H, W, C).
    random_flip: whether images are mirrored at random.
    dequantize: whether uniform noise is added to x; see `Space.dequantize`.
    cond_dropout: probability that the conditioning of an example is dropped.
    ema_ramp: limit of the averages' half-life early in the stage; see `average_weight`.
    micro_batches: number of parts that a batch is split into, whose gradients are accumulated.
  """

  networks: FrozenDict[str, Any] = flax.struct.field(pytree_node=False)
  method: Method
  optimizer: Adam = flax.struct.field(pytree_node=False)
  learning_rate: Mapping[str, LearningRate]
  ema_decay: tuple[Any, ...]
  seed: int | Any
  space: Space = flax.struct.field(pytree_node=False)
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  random_flip: bool = flax.struct.field(pytree_node=False, default=False)
  dequantize: bool = flax.struct.field(pytree_node=False, default=False)
  cond_dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  ema_ramp: float = flax.struct.field(pytree_node=False, default=0.0)
  micro_batches: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def student(self) -> Denoiser:
    """The network that the stage trains."""
    found: Denoiser = self.networks['student']
    return found

  @property
  def conditioning(self) -> Conditioning:
    """What the student is told beside z and the time."""
    return self.student.conditioning

  def at(self, step: int) -> 'Recipe':
    """The recipe of update `step`; see `Method.at`."""
    return dataclasses.replace(self, method=self.method.at(step))

  def map_networks(self, function: Callable[[Any], Any]) -> 'Recipe':
    """The recipe with `function(network)` in place of each network."""
    mapped = {name: function(network) for name, network in self.networks.items()}
    return dataclasses.replace(self, networks=FrozenDict(mapped))

  def bind(self, params: Mapping[str, Params]) -> dict[str, Bound]:
    """Each network that there are parameters of, by name, holding these."""
    return {name: Bound(net, params[name]) for name, net in self.networks.items() if name in params}

  def create_state(self, student: Params, teacher: Params = None) -> TrainState:
    """The state before the first update of a student that starts from `student`; without a teacher, from itself."""
    teacher = student if teacher is None else teacher
    networks = self.method.init(student, teacher, jax.random.key(self.seed))
    return TrainState.create(networks, self.optimizer.transform(), len(self.ema_decay))
