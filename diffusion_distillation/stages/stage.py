"""What a stage is: the recipe of its training step, and its place in the run."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.diffusion.samplers import Sampler
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.state import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Stored (noise, image) pairs of a teacher's deterministic sampler.

  Attributes:
    count: how many.
    sampler: of the teacher; deterministic.
    clip_x: whether x is clipped while sampling.
    num_steps: sampling steps per image.
    grid: how they are spaced, a name in `times.GRIDS`.
    seed: of the noise.
    batch_size: images that are drawn at a time.
    labels: law of the labels that a conditional teacher is told, one of `conditioning.LABELS`.
    guidance: guidance towards these labels.
  """

  count: int
  sampler: Sampler
  clip_x: bool
  num_steps: int
  grid: str
  seed: int
  batch_size: int
  labels: str = 'data'
  guidance: Guidance = NONE


@dataclasses.dataclass(frozen=True)
class Stage:
  """One directory of the workdir: what is trained there, from whom, for how long.

  Attributes:
    name: of the stage and its directory.
    parent: the stage that teaches it, or None.
    parent_weights: which of the parent's weights: 'ema' or 'last'.
    recipe: what the compiled step needs.
    num_steps: sampling steps that its model is made for.
    num_updates: updates until it is finished.
    schedule: t to logsnr.
    image_shape: (H, W, C).
    teacher: the parent's denoiser, or None.
    start: the stage whose weights it starts from; None: its parent, or new parameters where its network is another.
    pairs: of its parent, that it learns from, or None.
    distance_weights: file of the weights of its method's distance; '' for none.
    sampler: that its model is made for.
    times: how the steps of an imported model are spaced, a name in `times.GRIDS`; None: as in the evaluation.
    clip_x: whether an imported model's x is clipped while sampling; None: as in the evaluation.
    measured_steps: step counts that its model is measured at.
    teacher_dtype: that the frozen teacher is kept in, 'float32' or 'bfloat16'.
    attempts: the updates that training went back to because those after it were not finite; from each of them on,
      batches and noise are drawn with another seed.
  """

  name: str
  parent: str | None
  parent_weights: str
  recipe: Recipe
  num_steps: int
  num_updates: int
  schedule: Schedule
  image_shape: tuple[int, ...]
  teacher: Denoiser | None = None
  start: str | None = None
  pairs: Pairs | None = None
  distance_weights: str = ''
  sampler: str = 'ddim'
  times: str | None = None
  clip_x: bool | None = None
  measured_steps: tuple[int, ...] = ()
  teacher_dtype: str = 'float32'
  attempts: tuple[int, ...] = ()

  @property
  def method(self) -> str:
    """The name of its method."""
    return self.recipe.method.name

  @property
  def batch_size(self) -> int:
    """Examples per update, over all devices."""
    return self.recipe.shape[0]

  @property
  def space(self) -> Space:
    """What x is."""
    return self.recipe.space

  @property
  def weights(self) -> tuple[str, ...]:
    """Names of the weights that can be sampled: 'ema', then 'ema_0.99' and so on for further averages, and 'last'."""
    return ('ema', *(f'ema_{decay}' for decay in self.recipe.ema_decay[1:]), 'last')

  @property
  def denoise(self) -> Denoiser:
    """The stage's model as it is sampled from: without dropout."""
    return self.recipe.student.without_dropout()

  @property
  def starts_anew(self) -> bool:
    """Whether its student starts from new parameters: nobody before it has the same network."""
    return self.start is None and (self.teacher is None or self.teacher != self.denoise)

  def seed_at(self, update: int) -> int:
    """The seed of the batch and the noise of an update: the recipe's, unless training went back to it or before it."""
    seed, attempt = int(self.recipe.seed), sum(first <= update for first in self.attempts)
    return (
      seed if not attempt else int(np.random.SeedSequence((seed, attempt)).generate_state(1)[0]) // 2
    )

  def recipe_at(self, update: int) -> Recipe:
    """The recipe of an update, with its seed; see `Recipe.at`."""
    recipe = self.recipe.at(update)
    if not any(first <= update for first in self.attempts):
      return recipe
    return dataclasses.replace(recipe, seed=self.seed_at(update))

  def streams(self, done: int) -> Iterator[tuple[int, int, int]]:
    """The updates from `done` to the end by their seeds: (seed, first, one after the last)."""
    between = {first for first in self.attempts if done < first < self.num_updates}
    for start, stop in itertools.pairwise(sorted({done, *between, self.num_updates})):
      yield self.seed_at(start), start, stop

  def without_parents(self) -> 'Stage':
    """The stage as it stands where its model came from elsewhere: nothing of the run has made it."""
    nobody: dict[str, Any] = {'parent': None, 'teacher': None, 'start': None, 'pairs': None}
    return dataclasses.replace(self, parent_weights='', distance_weights='', **nobody)

  def frozen(self, teacher: Params, distance: Params) -> dict[str, Params]:
    """The parameters that the step only reads, of those networks that its method calls; the teacher as it is kept."""
    if self.teacher_dtype != 'float32':
      teacher = jax.tree.map(lambda leaf: leaf.astype(self.teacher_dtype), teacher)
    found = {'teacher': teacher, 'distance': distance}
    return {name: params for name, params in found.items() if name in self.recipe.networks}

  def init_params(self, rng: jax.Array) -> Params:
    """New parameters of its network."""
    return self.denoise.init(rng, self.recipe.shape[1:])

  def init_teacher(self, rng: jax.Array) -> Params:
    """Parameters of its teacher's network, for their shapes; None without a teacher."""
    return None if self.teacher is None else self.teacher.init(rng, self.recipe.shape[1:])

  def abstract_params(self) -> Params:
    """Shapes and types of the stage's parameters; nothing is computed."""
    return jax.eval_shape(self.init_params, jax.random.key(0))

  def abstract_teacher(self) -> Params:
    """Shapes and types of the teacher's parameters; None without a teacher."""
    return jax.eval_shape(self.init_teacher, jax.random.key(0))

  def abstract_state(self) -> TrainState:
    """Shapes and types of the stage's training state; nothing is computed."""
    return jax.eval_shape(
      lambda rng: self.recipe.create_state(self.init_params(rng), self.init_teacher(rng)),
      jax.random.key(0),
    )
