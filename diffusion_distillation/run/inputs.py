"""The inputs of a stage: its parents and its batches."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distillation.datasets.encoded import Encoded
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.methods import distances
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.guidance import with_new_params
from diffusion_distillation.run.monitor import Monitor
from diffusion_distillation.run.pairs import StoredPairs, ensure
from diffusion_distillation.run.tracking import Tracker
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import compilation, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs that a stage is trained with.

  Attributes:
    images: the training images, encoded ones if the model draws what a text says, or None if the run has none.
    teacher: the parent stage's model, or None.
    start: the model that the student starts from; None for the teacher or new parameters.
    pairs: stored pairs of the teacher, or None if the stage needs none.
    distance: weights of the method's distance, or None if it has none.
    monitor: checks the student's samples during training, or None.
    tracker: measures the stage's samples during training, or None.
    label_counts: number of images of each class; a stage without images draws its labels in these proportions, or takes
      all classes in turn if this is ().
    texts: the encoded texts of a model that takes them, or None.
  """

  images: Loader | None
  teacher: Model | None = None
  start: Model | None = None
  pairs: StoredPairs | None = None
  distance: Params = None
  monitor: Monitor | None = None
  tracker: Tracker | None = None
  label_counts: tuple[int, ...] = ()
  texts: Encoded | None = None

  def parents(self, stage: Stage) -> provenance.Parents:
    """Returns the parents for the stage's provenance."""
    start = self.start or (None if stage.starts_anew else self.teacher)
    return provenance.Parents(
      self.teacher,
      start,
      None if self.pairs is None else self.pairs.digest,
      None if self.distance is None else digest(self.distance),
    )

  def watchers(self, done: int) -> list[Monitor | Tracker]:
    """Returns those of monitor and tracker that look at the samples after update `done`."""
    return [found for found in (self.monitor, self.tracker) if found is not None and found.due(done)]

  def held(self) -> 'Inputs':
    """Returns the inputs with the weights of their models in memory."""
    teacher, start = (model and model.hold() for model in (self.teacher, self.start))
    return dataclasses.replace(self, teacher=teacher, start=start)

  def frozen(self, stage: Stage) -> dict[str, Params]:
    """Returns the parameters that the step only reads, on the devices."""
    teacher = None if self.teacher is None else self.teacher.params
    return sharding.place(stage.frozen(teacher, self.distance, self.adapted(stage)))

  def adapted(self, stage: Stage) -> Params:
    """Returns the weights that the student's adapters change, on the host; None without LoRA."""
    return None if stage.recipe.lora is None else self.started_from(stage)

  def started_from(self, stage: Stage) -> Params:
    """Returns the weights that the student starts from, on the host; None for new parameters."""
    before = self.start or (None if stage.starts_anew else self.teacher)
    return None if before is None else before.params

  def first_state(self, stage: Stage) -> TrainState:
    """Returns the state before the first update, on the devices."""
    student = self.started_from(stage)
    if student is None or stage.adds_input:
      key = jax.random.key(stage.recipe.seed)
      new = sharding.to_host(compilation.run_once(stage.init_params, key))
      student = new if student is None else with_new_params(student, new)
    teacher = student if self.teacher is None else self.teacher.params
    state: TrainState = sharding.create(stage.recipe.create_state, student, teacher)
    return state

  def batches(self, stage: Stage, done: int) -> Generator[dict[str, Any]]:
    """Yields this process's part of each batch, from update `done` to the end of the stage."""
    for seed, start, stop in stage.streams(done):
      yield from self._batches(stage, seed, start, stop)

  def _batches(self, stage: Stage, seed: int, start: int, stop: int) -> Generator[dict[str, Any]]:
    args = (seed, stage.batch_size, start, stop)
    needs, conditions = stage.recipe.method.needs, conditioning.of_data(stage.recipe.conditioning)
    with contextlib.ExitStack() as stack:
      images: Iterator[Any] | None = None
      pairs: Iterator[Any] | None = None
      if 'images' in needs and self.images is not None:
        images = stack.enter_context(contextlib.closing(self.images.shuffled(*args)))
      if 'pairs' in needs and self.pairs is not None:
        pairs = stack.enter_context(contextlib.closing(self.pairs.shuffled(*args)))
      for i in range(start, stop):
        if images is not None:
          found = next(images)
          key = 'x' if 'x' in found else 'image'
          batch = {key: found[key], 'cond': conditioning.select(conditions, found['cond'])}
        else:
          index = _part(i, stage.batch_size)
          batch = {'cond': conditioning.draw(conditions, index, seed, self.label_counts, self.texts)}
        yield batch if pairs is None else batch | {'pairs': next(pairs)}


def _part(i: int, batch_size: int) -> np.ndarray:
  """Returns the indices of this process's examples of batch i in an endless stream of examples."""
  index, count = sharding.part()
  size = batch_size // count
  return i * batch_size + index * size + np.arange(size)


def shapes(stage: Stage, batch_size: int) -> dict[str, Any]:
  """Returns the shapes and types of a batch of `batch_size` examples for the stage's step."""
  needs, conditions = stage.recipe.method.needs, stage.recipe.conditioning
  x = jax.ShapeDtypeStruct((batch_size, *stage.recipe.shape[1:]), np.float32)

  def conds(conditions: conditioning.Conditioning) -> dict[str, Any] | None:
    one = conditioning.examples(conditions, 1) or {}
    found = {key: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for key, v in one.items()}
    return found or None

  batch: dict[str, Any] = {'cond': conds(conditioning.of_data(conditions))}
  if 'images' in needs and stage.space.own_programs:
    batch['x'] = x
  elif 'images' in needs:
    batch['image'] = jax.ShapeDtypeStruct((batch_size, *stage.image_shape), np.uint8)
  if 'pairs' in needs:
    batch['pairs'] = {'noise': x, 'image': x, 'cond': conds(conditions)}
  return batch


def stand_in(stage: Stage) -> dict[str, Any]:
  """Returns a batch of noise, with labels of the first class, to time the stage's step with."""
  rng = np.random.default_rng(0)

  def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if leaf.dtype == np.uint8:
      return rng.integers(0, 256, leaf.shape, np.uint8)
    noisy = np.issubdtype(leaf.dtype, np.floating)
    return (rng.normal(size=leaf.shape) if noisy else np.zeros(leaf.shape)).astype(leaf.dtype)

  return jax.tree.map(fill, shapes(stage, stage.batch_size))


def examples_of(images: Loader | None, texts: Encoded | None) -> Loader | None:
  """Returns what stages that need images read: encoded images if there are any, else the images."""
  if texts is None or not texts.x_shape:
    return images
  return Loader(texts, part=sharding.part())  # type: ignore[arg-type]


def gather(
  stage: Stage,
  models: Mapping[str, Model],
  images: Loader | None,
  workdir: pathlib.Path,
  distance: Params = None,
  texts: Encoded | None = None,
) -> Inputs:
  """Gathers the inputs of a stage whose parents are among `models`; draws its pairs if they do not exist yet."""
  teacher = models[stage.parent].use(stage.parent_weights) if stage.parent else None
  start = models[stage.start] if stage.start else None
  pairs = ensure(workdir, stage.pairs, teacher, texts) if teacher and stage.pairs else None
  counts = workdirs.label_counts(workdir)
  return Inputs(images, teacher, start, pairs, distance, label_counts=counts, texts=texts)


def needed(stages: Iterable[Stage], name: str) -> set[str]:
  """Returns the names of the weights of stage `name` that `stages` are trained from."""
  found = {stage.parent_weights for stage in stages if stage.parent == name}
  return found | {'ema' for stage in stages if stage.start == name}


def load_distance(stage: Stage) -> Params:
  """Loads the weights of a stage's distance, or returns None if it has none; raises UserError as `distances.load` does."""
  weighted = stage.recipe.networks.get('distance')
  if weighted is None:
    return None
  key = f'{stage.name}.distance_weights'
  found = distances.load(weighted.distance, stage.distance_weights, stage.image_shape, key)
  if not isinstance(weighted.distance, distances.Decoded):
    return found
  return {'distance': found, 'decoder': stage.space.weights()}  # type: ignore[attr-defined]
