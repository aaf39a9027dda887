"""A stage of a run: the recipe of its training step, and how it depends on other stages."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.diffusion.samplers import Sampler
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import GuidingModel, adds_input
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.state import Params, TrainState

START = 'start'  # the name of frozen weights that a student starts from, if they are not its teacher's


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Stored (noise, image) pairs of a teacher's deterministic sampler.

  Attributes:
    count: number of pairs.
    sampler: the teacher's sampler; deterministic.
    clip_x: whether x is clipped while sampling.
    num_steps: sampling steps per image.
    grid: spacing of the steps, a name in `times.GRIDS`.
    seed: seed of the noise.
    batch_size: number of images drawn at a time.
    labels: distribution of a conditional teacher's labels, one of `conditioning.LABELS`.
    guidance: the guidance of the teacher.
    guiding: the model that guides it in place of its unconditional predictions, if there is one.
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
  guiding: GuidingModel | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage, which has a directory of its own in the workdir: what is trained, from which teacher, and for how long.

  Attributes:
    name: name of the stage and of its directory.
    parent: the stage that is its teacher, or None.
    parent_weights: which of the parent's weights to use: 'ema' or 'last'.
    recipe: the static description of the compiled step.
    num_steps: number of sampling steps that its model is trained for.
    num_updates: number of updates until the stage is finished.
    schedule: t to logsnr.
    image_shape: (H, W, C).
    teacher: the parent's denoiser, or None.
    start: the stage whose weights it starts from; None: its parent, or new parameters if its network differs.
    pairs: its parent's stored pairs, if it is trained on them; else None.
    distance_weights: file with the weights of its method's distance; '' for none.
    sampler: name of the sampler that its model is trained for.
    times: spacing of an imported model's steps, a name in `times.GRIDS`; None: as in the evaluation.
    clip_x: whether an imported model's x is clipped while sampling; None: as in the evaluation.
    text: its model's text encoder, if it is conditioned on text.
    measured_steps: step counts at which its model is evaluated.
    teacher_dtype: dtype in which the frozen teacher is stored, 'float32' or 'bfloat16'; see `frozen`.
    attempts: the updates that training went back to because later ones were not finite; from each of them on, batches
      and noise are drawn with another seed.
    earlier_ends: the numbers of updates, ascending, at which the stage was finished before it was trained for longer.
    planned_updates: the number of updates in the config, if `num_updates` is larger because the quality gate raised it.
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
  text: TextEncoder | None = None
  measured_steps: tuple[int, ...] = ()
  teacher_dtype: str = 'float32'
  attempts: tuple[int, ...] = ()
  earlier_ends: tuple[int, ...] = ()
  planned_updates: int | None = None

  @property
  def method(self) -> str:
    """The name of the stage's method."""
    return self.recipe.method.name

  @property
  def batch_size(self) -> int:
    """Examples per update, over all devices."""
    return self.recipe.shape[0]

  @property
  def space(self) -> Space:
    """The space of x."""
    return self.recipe.space

  @property
  def weights(self) -> tuple[str, ...]:
    """Names of the weights that can be sampled from: 'ema', then 'ema_0.99' and so on for further averages, and 'last'."""
    return ('ema', *(f'ema_{decay}' for decay in self.recipe.ema_decay[1:]), 'last')

  @property
  def denoise(self) -> Denoiser:
    """The stage's model for sampling, without dropout."""
    return self.recipe.student.without_dropout()

  @property
  def starts_anew(self) -> bool:
    """Whether the student starts from new parameters, because no earlier stage has the same network."""
    same = self.teacher is not None and (self.teacher == self.denoise or self.adds_input)
    return self.start is None and not same

  @property
  def adds_input(self) -> bool:
    """Whether the network is the teacher's with the weight of guidance as an additional input, whose parameters are new."""
    return self.teacher is not None and adds_input(self.denoise, self.teacher)

  def seed_at(self, update: int) -> int:
    """Returns the seed of an update's batch and noise: the recipe's, unless training went back to it or to an earlier update."""
    seed, attempt = int(self.recipe.seed), sum(first <= update for first in self.attempts)
    return (
      seed if not attempt else int(np.random.SeedSequence((seed, attempt)).generate_state(1)[0]) // 2
    )

  def recipe_at(self, update: int) -> Recipe:
    """Returns the recipe of an update, with its seed; see `Recipe.at`.

    The updates before each of `earlier_ends` keep the learning rates of the shorter stage, so that they can be repeated.
    """
    recipe = self.recipe.at(update)
    if self.earlier_ends:
      recipe = recipe.ending_at(self.end_after(update))
    if not any(first <= update for first in self.attempts):
      return recipe
    return dataclasses.replace(recipe, seed=self.seed_at(update))

  def end_after(self, update: int) -> int:
    """Returns the number of updates at which the stage, as it was when `update` was trained, was to end."""
    return next((end for end in self.earlier_ends if update < end), self.num_updates)

  def lengthened(self, num_updates: int) -> 'Stage':
    """Returns the stage with more updates, the first of which are trained as they are now."""
    return dataclasses.replace(
      self,
      num_updates=num_updates,
      earlier_ends=(*self.earlier_ends, self.num_updates),
      planned_updates=self.planned_updates or self.num_updates,
    )

  def streams(self, done: int) -> Iterator[tuple[int, int, int]]:
    """Yields the updates from `done` to the end as ranges with the same seed: (seed, start, stop)."""
    between = {first for first in self.attempts if done < first < self.num_updates}
    for start, stop in itertools.pairwise(sorted({done, *between, self.num_updates})):
      yield self.seed_at(start), start, stop

  def without_parents(self) -> 'Stage':
    """Returns the stage for a model that was not trained in this run: it has no parent, teacher, start, pairs or adapters."""
    nobody: dict[str, Any] = {'parent': None, 'teacher': None, 'start': None, 'pairs': None}
    nobody['recipe'] = dataclasses.replace(self.recipe, lora=None)
    return dataclasses.replace(self, parent_weights='', distance_weights='', **nobody)

  def frozen(self, teacher: Params, distance: Params, start: Params = None) -> dict[str, Params]:
    """Returns the frozen parameters that an update reads: those of networks that the method calls, and those that are adapted.

    Args:
      teacher: the weights of the teacher; kept in `teacher_dtype`, unless the student's adapters change them.
      distance: the weights of the method's distance.
      start: the weights that the student starts from. If they are the teacher's, they are kept only once.

    Weights that the student's adapters change are kept as they are, because they are part of the student.
    """

    def of_teacher() -> Params:
      if self.teacher_dtype == 'float32' or self.adapts_teacher:
        return teacher
      return jax.tree.map(lambda leaf: leaf.astype(self.teacher_dtype), teacher)

    read = {*self.recipe.networks, *self.bases}
    made = {'teacher': of_teacher, 'distance': lambda: distance, START: lambda: start}
    return {name: make() for name, make in made.items() if name in read}

  @property
  def adapts_teacher(self) -> bool:
    """Whether the student consists of adapters of its teacher's weights."""
    return self.recipe.lora is not None and self.recipe.lora.base_of('student') == 'teacher'

  @property
  def bases(self) -> frozenset[str]:
    """The names of the frozen weights that are adapted: `teacher`, `start`, both or none."""
    lora = self.recipe.lora
    return frozenset() if lora is None else frozenset(base for _, base in lora.bases)

  @property
  def starts_from(self) -> str | None:
    """The name of the stage whose weights the student starts from; None for new parameters."""
    return None if self.starts_anew else self.start or self.parent

  def init_params(self, rng: jax.Array) -> Params:
    """Returns new parameters of the stage's network."""
    return self.denoise.init(rng, self.recipe.shape[1:])

  def init_teacher(self, rng: jax.Array) -> Params:
    """Returns parameters of the teacher's network, for their shapes; None if the stage has no teacher."""
    return None if self.teacher is None else self.teacher.init(rng, self.recipe.shape[1:])

  @functools.cached_property
  def abstract_params(self) -> Params:
    """Shapes and dtypes of the stage's parameters, without computing them."""
    return jax.eval_shape(self.init_params, jax.random.key(0))

  @functools.cached_property
  def abstract_teacher(self) -> Params:
    """Shapes and dtypes of the teacher's parameters; None if the stage has no teacher."""
    return jax.eval_shape(self.init_teacher, jax.random.key(0))

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the stage's training state, without computing it."""
    return jax.eval_shape(
      lambda rng: self.recipe.create_state(self.init_params(rng), self.init_teacher(rng)),
      jax.random.key(0),
    )
