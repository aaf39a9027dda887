"""What a stage is: the recipe of its training step, and its place in the run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax

from diffusion_distillation.diffusion.samplers import Sampler
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.methods import METHODS, Method
from diffusion_distillation.networks.unet import Denoiser
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.state import Params, TrainState


@flax.struct.dataclass
class Recipe:
  """All that the compiled step knows of a stage; its leaves are arguments, the rest is static.

  Attributes:
    denoise: the network, seen as a denoiser.
    method: the loss.
    optimizer: from a network's gradients to its updates of unit learning rate; each network has one of its own.
    learning_rate: of each step, by network.
    ema_decay: of each moving average; 0 follows the parameters.
    seed: of all noise in this stage.
    random_flip: whether images are mirrored at random.
    dequantize: whether pixels are spread evenly over what rounds to them.
    label_dropout: probability that an example's class is not told.
    micro_batches: parts that a batch is cut into, whose gradients are added up.
  """

  denoise: Denoiser = flax.struct.field(pytree_node=False)
  method: Method
  optimizer: Adam = flax.struct.field(pytree_node=False)
  learning_rate: Mapping[str, LearningRate]
  ema_decay: tuple[Any, ...]
  seed: int | Any
  random_flip: bool = flax.struct.field(pytree_node=False, default=False)
  dequantize: bool = flax.struct.field(pytree_node=False, default=False)
  label_dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  micro_batches: int = flax.struct.field(pytree_node=False, default=1)

  def at(self, step: int) -> 'Recipe':
    """The recipe of update `step`; see `Method.at`."""
    return dataclasses.replace(self, method=self.method.at(step))

  def create_state(self, student: Params, teacher: Params = None) -> TrainState:
    """The state before the first update of a student that starts from `student`; without a teacher, from itself."""
    teacher = student if teacher is None else teacher
    networks = self.method.init(student, teacher, jax.random.key(self.seed))
    return TrainState.create(networks, self.optimizer.transform(), len(self.ema_decay))


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Stored (noise, image) pairs of a teacher's deterministic sampler.

  Attributes:
    count: how many.
    sampler: of the teacher; deterministic.
    num_steps: its steps.
    grid: how they are spaced, a name in `times.GRIDS`.
    seed: of the noise.
    batch_size: drawn at a time.
  """

  count: int
  sampler: Sampler
  num_steps: int
  grid: str
  seed: int
  batch_size: int


@dataclasses.dataclass(frozen=True)
class Stage:
  """One directory of the workdir: what is trained there, from whom, for how long.

  Attributes:
    name: of the stage and its directory.
    parent: the stage that teaches it, or None.
    parent_weights: which of the parent's weights: 'ema' or 'last'.
    start: the stage that it starts from; None: its parent.
    pairs: of its parent, that it learns from, or None.
    distance_weights: file of the weights of its method's distance; '' for none.
    recipe: what the compiled step needs.
    num_steps: sampling steps that its model is made for.
    num_updates: updates until it is finished.
    batch_size: examples an update, over all devices.
    schedule: t to logsnr.
    image_shape: (H, W, C).
    sampler: that its model is made for.
    measured_steps: step counts that its model is measured at.
    teacher_dtype: that the frozen teacher is kept in, 'float32' or 'bfloat16'.
  """

  name: str
  parent: str | None
  parent_weights: str
  recipe: Recipe
  num_steps: int
  num_updates: int
  batch_size: int
  schedule: Schedule
  image_shape: tuple[int, ...]
  start: str | None = None
  pairs: Pairs | None = None
  distance_weights: str = ''
  sampler: str = 'ddim'
  measured_steps: tuple[int, ...] = ()
  teacher_dtype: str = 'float32'

  @property
  def method(self) -> str:
    """The name of its method, in METHODS."""
    return next(name for name, cls in METHODS.items() if isinstance(self.recipe.method, cls))

  @property
  def weights(self) -> tuple[str, ...]:
    """Names of the weights it keeps: 'ema', then 'ema_0.99' and so on for further averages, and 'last'."""
    return ('ema', *(f'ema_{decay}' for decay in self.recipe.ema_decay[1:]), 'last')

  @property
  def denoise(self) -> Denoiser:
    """The stage's model as it is sampled from: without dropout."""
    return without_dropout(self.recipe.denoise)

  def without_parents(self) -> 'Stage':
    """The stage as it stands where its model came from elsewhere: nothing of the run has made it."""
    return dataclasses.replace(
      self, parent=None, parent_weights='', start=None, pairs=None, distance_weights=''
    )

  def frozen(self, networks: Mapping[str, Params | None]) -> dict[str, Params]:
    """What the step only reads of these, `teacher` and `distance`: those there are, the teacher as it is kept."""
    found = {name: params for name, params in networks.items() if params is not None}
    if self.teacher_dtype != 'float32' and 'teacher' in found:
      found['teacher'] = jax.tree.map(lambda leaf: leaf.astype(self.teacher_dtype), found['teacher'])
    return found

  def inputs(self, batch: Mapping[str, Any], pairs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the step is given: `image`, and `label` if the network is told, else None; and `pairs`, where there are."""
    told = self.denoise.network.num_classes
    given = {'image': batch['image'], 'label': batch['label'] if told else None}
    return given if pairs is None else given | {'pairs': pairs}


def without_dropout(denoise: Denoiser) -> Denoiser:
  """The same denoiser over a network that has no dropout; equal to every other of its shape."""
  return dataclasses.replace(denoise, network=dataclasses.replace(denoise.network, dropout=0.0))
