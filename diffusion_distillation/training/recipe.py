"""The recipe of a stage: everything that its compiled training step depends on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
from flax.core import FrozenDict

from diffusion_distillation.methods import Method
from diffusion_distillation.networks import lora
from diffusion_distillation.networks.conditioning import Conditioning
from diffusion_distillation.networks.denoiser import Bound, Denoiser
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.training.lora import Lora
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.state import Params, TrainState

_NO_UPDATE = 2**32 - 1  # which is folded into the seed where an update folds its own number


@flax.struct.dataclass
class Recipe:
  """The constants of a stage. Pytree leaves are arguments of the compiled step; the rest is static.

  Attributes:
    networks: every network that the method's loss receives, by name; see `Method.networks`.
    method: the method, which defines the loss.
    optimizer: maps a network's gradients to updates for learning rate 1; each network has its own optimizer state.
    learning_rate: learning-rate schedule of each network in training, by name.
    ema_decay: decay of each moving average that can be sampled; 0 copies the parameters.
    seed: seed of all random numbers in this stage.
    space: the space of x.
    shape: shape of a batch of x, (B, H, W, C).
    random_flip: whether images are mirrored at random.
    dequantize: whether uniform noise is added to x that does not change the decoded image.
    cond_dropout: probability that an example's conditions are dropped.
    ema_ramp: how soon the averages reach their decay; see `average_weight`.
    micro_batches: number of parts of a batch over which gradients are accumulated.
    target_decay: decay of an additional average, the last one, which the loss receives as `average`; None: the loss receives
      the first average.
    lora: which networks are trained by low-rank adapters; their parameters in the training state are the factors. None: none.
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
  target_decay: float | Any = None
  lora: Lora | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def student(self) -> Denoiser:
    """The network that the stage trains."""
    found: Denoiser = self.networks['student']
    return found

  @property
  def conditioning(self) -> Conditioning:
    """The conditions that the student takes besides z and the time."""
    return self.student.conditioning

  @property
  def decays(self) -> tuple[Any, ...]:
    """The decays of all moving averages, in the order of the state."""
    return self.ema_decay if self.target_decay is None else (*self.ema_decay, self.target_decay)

  def at(self, step: int) -> 'Recipe':
    """Returns the recipe of update `step`; see `Method.at`."""
    return dataclasses.replace(self, method=self.method.at(step))

  def ending_at(self, num_updates: int) -> 'Recipe':
    """Returns the recipe of a stage of `num_updates` updates: its learning rates, and its loss if that depends on the number.

    A method whose loss depends on the length of its stage has a field `num_updates`.
    """
    method: Any = self.method
    if any(field.name == 'num_updates' for field in dataclasses.fields(method)):
      method = dataclasses.replace(method, num_updates=num_updates)
    rates = {
      name: dataclasses.replace(rate, num_updates=num_updates)
      for name, rate in self.learning_rate.items()
    }
    return dataclasses.replace(self, learning_rate=rates, method=method)

  def map_networks(self, function: Callable[[Any], Any]) -> 'Recipe':
    """Returns the recipe with `function(network)` in place of each network."""
    mapped = {name: function(network) for name, network in self.networks.items()}
    return dataclasses.replace(self, networks=FrozenDict(mapped))

  def bind(self, params: Mapping[str, Params]) -> dict[str, Bound]:
    """Binds networks to the given parameters, see `weights`; networks without parameters are left out."""
    return {
      name: Bound(net, self.weights(name, params))
      for name, net in self.networks.items()
      if name in params
    }

  def weights(self, name: str, params: Mapping[str, Params]) -> Params:
    """Returns the weights of a network: its parameters or, if it is adapted, the frozen weights with its adapters.

    Args:
      name: the network.
      params: parameters by name; those of an adapted network are its factors, and the weights that it adapts are beside them.
    """
    base = None if self.lora is None else self.lora.base_of(name)
    if self.lora is None or base is None:
      return params[name]
    return lora.merged(params[base], params[name], self.lora.scale)

  def create_state(self, student: Params, teacher: Params = None) -> TrainState:
    """Returns the state before the first update; the student starts from `student`, which also replaces a missing teacher."""
    teacher = student if teacher is None else teacher
    networks = self.method.init(student, teacher, jax.random.key(self.seed))
    if self.lora is not None:
      networks = self._with_adapters(self.lora, networks)
    return TrainState.create(networks, self.optimizer.transform(), len(self.decays))

  def _with_adapters(self, of: Lora, networks: Mapping[str, Params]) -> dict[str, Params]:
    """Returns the networks with new factors in place of the parameters of those that are adapted."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), _NO_UPDATE), len(networks))
    return {
      name: params if of.base_of(name) is None else lora.init(key, params, of.rank, of.modules)
      for key, (name, params) in zip(keys, sorted(networks.items()), strict=True)
    }
