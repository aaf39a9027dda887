"""What training asks of a method, and gives to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self

import jax

from diffusion_distillation.config import FRACTION, NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.methods.distances import DISTANCES

Params = Any
Batch = Mapping[str, Any]
Loss = tuple[jax.Array, dict[str, jax.Array]]


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
  )


class DenoiseFn(Protocol):
  """A denoiser whose parameters are an argument; `rng` switches dropout on."""

  def __call__(
    self,
    params: Params,
    z: jax.Array,
    logsnr: jax.Array,
    label: jax.Array | None,
    rng: jax.Array | None = None,
  ) -> Prediction: ...

  def bottleneck(
    self, params: Params, z: jax.Array, logsnr: jax.Array, label: jax.Array | None
  ) -> jax.Array:
    """The network's innermost activations, (B, h, w, c); asked for by GAN heads only."""
    ...


class Method(Protocol):
  """What `train_step` asks of a method; in practice a frozen `flax.struct.dataclass`.

  Its numbers that differ from round to round are pytree leaves, thus arguments of the compiled step: rounds
  share one program. All else is static.
  """

  @property
  def networks(self) -> tuple[str, ...]:
    """Those whose parameters this update changes, the student's among them or not."""
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
    """The method as update `step` carries it out: where networks take turns, some are not in `networks`.

    Chosen on the host, a program each: a condition inside one would slow XLA's CPU convolutions down 20 times.
    """
    ...

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """All networks it trains, by name, from the student's initial parameters and the teacher's."""
    ...

  def draw(self, rng: jax.Array, shape: tuple[int, ...]) -> Batch:
    """The randomness of a whole batch of examples (B, H, W, C): arrays with B in front.

    Drawn before the batch is cut into micro-batches, so that these see what the whole would have seen.
    """
    ...

  def loss(
    self,
    denoise: DenoiseFn,
    params: Mapping[str, Params],
    frozen: Mapping[str, Params],
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array,
  ) -> Loss:
    """A scalar, and scalars to report.

    Args:
      denoise: the network.
      params: those in training, by name.
      frozen: `teacher`, unless that is the data; `average`, the student's first moving average; `distance`, the
        weights of a distance that has some.
      batch: `x` (B, H, W, C) in [-1, 1], `label` (B,) or None, what `draw` drew, and, where the stage learns
        from stored pairs, `pairs`: their `noise` and `image` (B, H, W, C) and `label`.
      rng: dropout's.
      step: the number of the update.
    """
    ...


class OneNetwork:
  """What methods share that train the student alone, at every update."""

  networks = ('student',)
  period = 1

  def at(self, step: int) -> Self:
    """Itself."""
    del step
    return self

  def init(self, student: Params, teacher: Params, rng: jax.Array) -> dict[str, Params]:
    """The student."""
    del teacher, rng
    return {'student': student}
