"""What a stage is trained with: its parents, and the batches that it sees."""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Generator, Mapping
from typing import Any

import jax

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.methods import distances
from diffusion_distillation.run import monitor as watching
from diffusion_distillation.run.pairs import StoredPairs, ensure
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.recipe import Stage
from diffusion_distillation.training.state import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Sources:
  """What a stage is trained with.

  Attributes:
    images: training images.
    teacher: the parent stage's model, or None.
    start: the model that the student starts from; None: the teacher.
    pairs: of the teacher, where the stage learns from some.
    distance: weights of the method's distance, where it has some.
    health: looks at the student's samples meanwhile, or None.
  """

  images: Loader
  teacher: Model | None = None
  start: Model | None = None
  pairs: StoredPairs | None = None
  distance: Params = None
  health: watching.Health | None = None

  @property
  def parents(self) -> provenance.Parents:
    """As the stage's lineage names them."""
    return provenance.Parents(
      self.teacher,
      self.start,
      None if self.pairs is None else self.pairs.digest,
      None if self.distance is None else digest(self.distance),
    )

  def frozen(self, stage: Stage) -> dict[str, Params]:
    """Parameters that the step only reads, on the devices."""
    teacher = None if self.teacher is None else self.teacher.params
    return sharding.place(stage.frozen({'teacher': teacher, 'distance': self.distance}))

  def first_state(self, stage: Stage) -> TrainState:
    """The state before the first update, on the devices."""
    if self.teacher is None:
      teacher = sharding.to_host(
        stage.denoise.init(jax.random.key(stage.recipe.seed), stage.image_shape)
      )
    else:
      teacher = self.teacher.params
    student = teacher if self.start is None else self.start.params
    state: TrainState = sharding.create(stage.recipe.create_state, student, teacher)
    return state

  def batches(self, stage: Stage, done: int) -> Generator[dict[str, Any]]:
    """What the step is given, from update `done` to the stage's end: this process's part."""
    args = (int(stage.recipe.seed), stage.batch_size, done, stage.num_updates)
    pairs = itertools.repeat(None) if self.pairs is None else self.pairs.shuffled(*args)
    with contextlib.closing(self.images.shuffled(*args)) as images:
      for batch, of_teacher in zip(images, pairs, strict=False):
        yield stage.inputs(batch, of_teacher)


def gather(
  stage: Stage,
  models: Mapping[str, Model],
  images: Loader,
  workdir: pathlib.Path,
  distance: Params = None,
) -> Sources:
  """The sources of a stage whose parents are among `models`; its pairs are drawn, if they are not there yet."""
  teacher = models[stage.parent].use(stage.parent_weights) if stage.parent else None
  start = models[stage.start] if stage.start else None
  pairs = ensure(workdir, stage.pairs, teacher) if teacher and stage.pairs else None
  return Sources(images, teacher, start, pairs, distance)


def load_distance(stage: Stage) -> Params:
  """The weights of the distance that a stage is trained with, or None; raises UserError as `distances.load` does."""
  distance = getattr(stage.recipe.method, 'distance', None)
  key = f'{stage.name}.distance_weights'
  if distance is None or stage.parent is None:
    return None
  return distances.load(distance, stage.distance_weights, stage.image_shape, key)
