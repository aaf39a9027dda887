"""What training asks of a method, and gives to it."""

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
    "Upper limit of the averages' half-life, as a share of the student's updates so far (EDM: 0.05), so that the averages of "
    'a short run forget the weights that it began with; 0 sets no limit.',
    NOT_NEGATIVE,
  )


@dataclasses.dataclass(frozen=True)
class StudentSection(TrainingSection):
  """The keys of every method that distills the base model to few steps in a single stage."""

  start: str = key(
    'base',
    'Stage whose weights initialize the student: `base`, or an earlier stage, such as `progressive_0004`.',
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
  """What a method sees of a student, a teacher or a fake score: a denoiser that holds its parameters.

  It is a pytree of these, so that `jax.lax.stop_gradient(net)` is the same denoiser, held fixed.
  """

  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond, rng: jax.Array | None = None
  ) -> Prediction:
    """z: (B, ...); logsnr: (B,); `rng` switches dropout on."""
    ...

  def bottleneck(self, z: jax.Array, logsnr: jax.Array, cond: Cond, place: str = INNERMOST) -> jax.Array:
    """The network's activations at `place`, (B, h, w, c), see `Denoiser.bottleneck`; only GAN heads ask for them."""
    ...


class Method(Protocol):
  """What `train_step` asks of a method; in practice a frozen `flax.struct.dataclass`.

  Its numbers that differ from round to round are pytree leaves, thus arguments of the compiled step: rounds
  share one program. All else is static.
  """

  @property
  def name(self) -> str:
    """What a stage is called that is trained by it, in reports and in its provenance."""
    ...

  @property
  def needs(self) -> frozenset[str]:
    """What its batches hold, of `images`, `labels` (any conditioning) and `pairs`."""
    ...

  @property
  def trained(self) -> tuple[str, ...]:
    """The networks whose parameters this update changes, the student among them or not."""
    ...

  @property
  def calls(self) -> float:
    """Network calls for each example of an update, of all networks together, in the mean over a period."""
    ...

  @property
  def period(self) -> int:
    """Updates until `at` repeats."""
    ...

  def at(self, step: int) -> Self:
    """The method as update `step` carries it out: where networks take turns, some are not in `trained`.

    Chosen on the host, a program each: a condition inside one would slow XLA's CPU convolutions down 20 times.
    """
    ...

  def networks(self, student: Any, teacher: Any) -> dict[str, Any]:
    """Every network that the loss is given, by name, each called as `network(params, ...)`.

    Args:
      student: the denoiser in training.
      teacher: the denoiser of the stage that teaches; the student's own for a base.
    """
    ...

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """The parameters of all networks it trains, by name, from the student's initial ones and the teacher's."""
    ...

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """The randomness of a whole batch of examples (B, H, W, C): arrays with B in front.

    Drawn before the batch is cut into micro-batches, so that these see what the whole would have seen.
    """
    ...

  def loss(self, nets: Nets, batch: Batch, rng: jax.Array | None, step: jax.Array) -> Loss:
    """A scalar, and scalars to report.

    Args:
      nets: the networks of `networks`, by name, each holding its parameters: denoisers as `BoundDenoiser`;
        `average` is the student with a moving average for parameters, the first unless `Recipe.target_decay` says otherwise.
      batch: `cond`, what `draw` drew, and of what the method needs: `x` (B, ...), and `pairs`, the teacher's
        stored `noise` and `image` (B, ...) with their `cond`.
      rng: dropout's.
      step: the number of the update.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Context:
  """What a method is built from, beside its own section of the config.

  Attributes:
    schedule: t to logsnr, the teacher's.
    weighting: of the error in x in base training.
    law: of t in base training.
    uniform: the uniform law of t, stratified if the config says so.
    clip: x to the nearest x that an image can have.
    teacher: the denoiser of the stage that teaches.
    shape: of x, (H, W, C).
  """

  schedule: Schedule
  weighting: Weighting
  law: Law
  uniform: Uniform
  clip: Clip
  teacher: Denoiser
  shape: tuple[int, ...]


class Sampling(NamedTuple):
  """How a student is sampled: in how many steps of which sampler; and the step counts that it is measured at."""

  num_steps: int = 1
  sampler: str = 'ddim'
  measured_steps: tuple[int, ...] = (1,)


class Student:
  """What students share that are one stage, as one section of the config says; see `stages.plan`.

  Attributes:
    Section: the keys of that section.
  """

  Section: ClassVar[type[StudentSection]]

  @classmethod
  def from_config(cls, name: str, section: Any, context: Context) -> Self:
    """The method as `section`, called `name` in the config, says; UserError, naming the key, if it is wrong."""
    raise NotImplementedError

  @staticmethod
  def sampling(section: Any) -> Sampling:
    """How the student is sampled: in one step of DDIM."""
    del section
    return Sampling()

  @staticmethod
  def learning_rates(section: Any) -> dict[str, float]:
    """The highest learning rate, by network in training."""
    return {'student': section.learning_rate}


class OneNetwork:
  """What methods share that train the student alone, at every update."""

  trained = ('student',)
  period = 1

  def at(self, step: int) -> Self:
    """Itself."""
    del step
    return self

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """The student."""
    del teacher, rng
    return {'student': student}
