"""What training asks of a method, and gives to it."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from diffusion_distillation.diffusion import Prediction

Params = Any
Batch = Mapping[str, Any]
Loss = tuple[jax.Array, dict[str, jax.Array]]


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


class Method(Protocol):
  """What `train_step` asks of a method; in practice a frozen `flax.struct.dataclass`.

  Its numbers that differ from round to round are pytree leaves, thus arguments of the compiled step: rounds
  share one program. All else is static.
  """

  @property
  def teacher_calls(self) -> int:
    """Network calls of the teacher for each example of an update; the student has one more."""
    ...

  def init(self, student_params: Params) -> dict[str, Params]:
    """The networks it trains, by name, from the student's initial parameters."""
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
    teacher: Params,
    batch: Batch,
    rng: jax.Array | None,
    step: jax.Array,
  ) -> Loss:
    """A scalar, and scalars to report.

    `batch` has `x` (B, H, W, C) in [-1, 1], `label` (B,) or None, and what `draw` drew; `rng` is dropout's.
    """
    ...
