"""The interface between training and methods."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax

from diffusion_distillation.config import FRACTION, NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.samplers import Clip
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.times import Law, Uniform
from diffusion_distillation.diffusion.weightings import Weighting
from diffusion_distillation.methods.distances import DISTANCES
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import INNERMOST, Denoiser

Params = Any
Batch = Mapping[str, Any]
Loss = tuple[jax.Array, dict[str, jax.Array]]
Nets = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainingSection:
  """The keys that every section of a stage has."""

  batch_size: int = key(128, 'Number of examples per update, over all devices.', POSITIVE)
  micro_batches: int = key(
    1,
    'Number of parts that a batch is split into; they go through the network one after the other, and their gradients '
    'are accumulated.',
    POSITIVE,
  )
  warmup: int = key(
    0, 'Number of updates over which the learning rate rises linearly to its peak.', NOT_NEGATIVE
  )
  decay: str = key(
    'none',
    'How the learning rate decays from its peak to 0 over the stage.',
    choices=('none', 'linear', 'cosine'),
  )
  weight_decay: float = key(
    0.0, 'Decoupled weight decay per update, multiplied by the learning rate.', NOT_NEGATIVE
  )
  ema_decay: tuple[float, ...] = key(
    (0.9999,),
    'Decay rates of the exponential moving averages (EMA) of the weights, one or several; 0 follows the weights. The '
    "first average is the stage's model.",
    FRACTION,
    distinct=True,
  )
  ema_ramp: float = key(
    0.0,
    "Upper limit of the averages' half-life, as a fraction of the student's updates so far (EDM: 0.05), so that the averages "
    'of a short run forget the initial weights; 0 for no limit.',
    NOT_NEGATIVE,
  )


@dataclasses.dataclass(frozen=True)
class StudentSection(TrainingSection):
  """The keys of every method that distills the base model to few steps in a single stage."""

  start: str = key(
    'base',
    'Stage whose weights initialize the student: `base` (after `guided`, that stage), or an earlier stage, such as '
    '`progressive_0004`.',
  )
  num_updates: int = key(100_000, 'Number of updates.', POSITIVE)
  learning_rate: float = key(1e-4, 'Peak learning rate of the student.', POSITIVE)
  warmup: int = 500
  clip_norm: float = key(
    10.0,
    "Global norm to which each network's gradients are clipped, in place of `optimizer.clip_norm`.",
    POSITIVE,
  )
  distance: str = key(
    'l2',
    'Distance between images that the regression minimizes: pixel-wise (`l2`, `pseudo_huber`), or between the '
    'activations of a classifier (`features`, `lpips`).',
    choices=DISTANCES,
  )
  distance_weights: str = key(
    '',
    'Weights of the distance, a .safetensors file: the `extractor.safetensors` of a run for `features`, converted '
    'LPIPS weights for `lpips`.',
    path='disk',
  )


class BoundDenoiser(Protocol):
  """A student, teacher or fake score as a method receives it: a denoiser that is bound to its parameters.

  It is a pytree of the parameters, so `jax.lax.stop_gradient(net)` is the same denoiser without gradients.
  """

  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond, rng: jax.Array | None = None
  ) -> Prediction:
    """Denoises z (B, ...) at logsnr (B,); `rng` enables dropout."""
    ...

  def bottleneck(self, z: jax.Array, logsnr: jax.Array, cond: Cond, place: str = INNERMOST) -> jax.Array:
    """Returns the network's activations at `place`, (B, h, w, c), for GAN heads; see `Denoiser.bottleneck`."""
    ...


class Method(Protocol):
  """The interface that `train_step` needs from a method; in practice a frozen `flax.struct.dataclass`.

  Numbers that differ between rounds are pytree leaves and therefore arguments of the compiled step, so that all rounds share
  one program. Everything else is static.
  """

  @property
  def name(self) -> str:
    """The name of the method in reports and in the provenance of stages."""
    ...

  @property
  def needs(self) -> frozenset[str]:
    """The contents of its batches: a subset of `images`, `labels` (any conditioning) and `pairs`."""
    ...

  @property
  def trained(self) -> tuple[str, ...]:
    """The networks that this update trains, which may not include the student."""
    ...

  @property
  def calls(self) -> float:
    """Mean number of network calls per example of an update, over all networks and one period."""
    ...

  @property
  def period(self) -> int:
    """Number of updates after which `at` repeats."""
    ...

  def at(self, step: int) -> Self:
    """Returns the method for update `step`; if networks alternate, `trained` then lists only those of this update.

    The choice is made on the host between separate programs, because a condition inside of a program would slow down XLA's CPU
    convolutions by a factor of 20.
    """
    ...

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """Returns every network that the loss receives, by name; each is called as `network(params, ...)`.

    Args:
      student: the denoiser in training.
      teacher: the denoiser of the teacher's stage; for a base, the student itself.
    """
    ...

  @property
  def from_teacher(self) -> tuple[str, ...]:
    """The networks in training that start from the teacher's parameters, besides the student; low-rank adapters may train them."""
    ...

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """Returns the initial parameters of all networks in training, given those of the student and the teacher."""
    ...

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """Draws the random numbers for a batch of examples (B, H, W, C), as arrays with leading axis B.

    They are drawn before the batch is split into micro-batches, and so do not depend on the number of micro-batches.
    """
    ...

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """Returns the loss, a scalar, and scalar metrics.

    Args:
      nets: the networks of `networks`, by name, bound to their parameters; denoisers are `BoundDenoiser`s. `average` is
        the student with the parameters of a moving average: the first, or the one for `Recipe.target_decay` if it is set.
      batch: `cond`, the results of `draw`, and if the method needs them, `x` (B, ...) and `pairs`, the teacher's stored
        `noise` and `image` (B, ...) with their `cond`.
      rng: random key for dropout.
      step: the number of the update.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Context:
  """What a method is built from, in addition to its own section of the config.

  Attributes:
    schedule: the teacher's schedule, which maps t to logsnr.
    weighting: weighting of the error in x in base training.
    law: distribution of t in base training.
    uniform: the uniform distribution of t, stratified if the config says so.
    clip: maps x to the nearest x in the range of images.
    teacher: the denoiser of the teacher's stage.
    shape: shape of x, (H, W, C).
    cond_dropout: probability with which conditions were dropped in the teacher's training.
  """

  schedule: Schedule
  weighting: Weighting
  law: Law
  uniform: Uniform
  clip: Clip
  teacher: Denoiser
  shape: tuple[int, ...]
  cond_dropout: float = 0.0


class Sampling(NamedTuple):
  """How a student is sampled: the number of steps, the sampler, and the step counts at which it is measured.

  0 stands for the number of steps of the base.
  """

  num_steps: int = 1
  sampler: str = 'ddim'
  measured_steps: tuple[int, ...] = (1,)


class Student:
  """Base class of methods that distill in a single stage, configured by one section; see `stages.plan`.

  Attributes:
    Section: the keys of this section.
    teaches: whether the methods that follow in the config are distilled from this student instead of the base.
  """

  Section: ClassVar[type[TrainingSection]]
  teaches: ClassVar[bool] = False

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> Self:
    """Builds the method from `section`, called `name` in the config; raises UserError, naming the key, if it is not valid."""
    raise NotImplementedError

  @staticmethod
  def network(name: str, section: Any, denoise: Denoiser) -> Denoiser:
    """Returns the student's network, given that of the students of a run; raises UserError if it does not fit the section."""
    del name, section
    return denoise

  @staticmethod
  def sampling(section: Any) -> Sampling:
    """Returns how the student is sampled: by default, in one step of DDIM."""
    del section
    return Sampling()

  @staticmethod
  def learning_rates(section: Any) -> dict[str, float]:
    """Returns the peak learning rate of each network in training."""
    return {'student': section.learning_rate}


class OneNetwork:
  """Base class of methods that train only the student, in every update."""

  trained = ('student',)
  from_teacher: tuple[str, ...] = ()
  period = 1

  def at(self, step: int) -> Self:
    """Returns the method itself, which is the same at every update."""
    del step
    return self

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """Returns the student's parameters."""
    del teacher, rng
    return {'student': student}
