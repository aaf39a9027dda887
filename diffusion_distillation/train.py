"""Training: the loop over the step, and the run over all stages."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from diffusion_distillation import distances, forecast, interrupts, lineage, sharding
from diffusion_distillation import health as watching
from diffusion_distillation import workdir as workdirs
from diffusion_distillation.checkpoints import Checkpoints, digest
from diffusion_distillation.configuration import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, NumericalError, Preempted
from diffusion_distillation.evaluation import measure
from diffusion_distillation.lineage import Model
from diffusion_distillation.metrics import MetricsWriter
from diffusion_distillation.pairs import StoredPairs, ensure
from diffusion_distillation.progress import Progress
from diffusion_distillation.recipe import Stage
from diffusion_distillation.train_state import Params, TrainState
from diffusion_distillation.update import train_step

_log = logging.getLogger(__name__)


class _Diverged(Exception):
  """Too many updates in a row were skipped."""


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
  def parents(self) -> lineage.Parents:
    """As the stage's lineage names them."""
    return lineage.Parents(
      self.teacher,
      self.start,
      None if self.pairs is None else self.pairs.digest,
      None if self.distance is None else digest(self.distance),
    )

  @property
  def frozen(self) -> dict[str, Params]:
    """Parameters that the step only reads, on every device."""
    teacher = {} if self.teacher is None else {'teacher': self.teacher.params}
    distance = {} if self.distance is None else {'distance': self.distance}
    return sharding.replicate(teacher | distance)

  def batches(self, stage: Stage, done: int) -> Generator[dict[str, Any]]:
    """What the step is given, from update `done` to the stage's end."""
    args = (int(stage.recipe.seed), stage.batch_size, done, stage.num_updates)
    pairs = itertools.repeat(None) if self.pairs is None else self.pairs.shuffled(*args)
    with contextlib.closing(self.images.shuffled(*args)) as images:
      for batch, of_teacher in zip(images, pairs, strict=False):
        yield stage.inputs(batch, of_teacher)


def fit(step: Callable, stage: Stage, sources: Sources, workdir: pathlib.Path, config: Config) -> Model:
  """Trains a stage to its end, from wherever its directory says that it stands.

  Args:
    step: the compiled `train_step`.
    stage: what to train.
    sources: what it is trained with.
    workdir: has the stage's directory in it.
    config: of the whole run.

  Returns:
    The finished model; at once, if it was finished before.

  Raises:
    DamagedError: the stage was finished, and no whole checkpoint of it is left.
    NumericalError: after going back to the last checkpoint, too many updates in a row were skipped again.
    Preempted: a signal came; the state is saved.
  """
  lineage.begin_stage(workdir, stage, sources.parents, config)
  with contextlib.closing(Checkpoints(workdir / stage.name)) as checkpoints:
    loop = functools.partial(_loop, step, stage, sources, config, checkpoints)
    state, seconds = _restore_or_start(checkpoints, stage, sources)
    if int(state.step) == stage.num_updates:
      lineage.check_digest(workdir, lineage.to_model(stage, state, seconds))
    elif not int(state.step) and lineage.is_finished(workdir, stage):
      raise DamagedError(
        f'{workdir / stage.name} was finished, but no whole checkpoint is left; restore one, or remove '
        'the directory to train the stage again'
      )
    else:
      try:
        state, seconds = loop(state, seconds)
      except _Diverged as first:
        checkpoints.wait()
        state, seconds = _restore_or_start(checkpoints, stage, sources)
        _log.warning('stage %s: %s; back to step %d', stage.name, first, state.step)
        try:
          state, seconds = loop(state, seconds)
        except _Diverged as again:
          raise NumericalError(
            f'stage {stage.name}: {again}, and not for the first time; '
            'lower its learning rate (in a new workdir), or look at its data'
          ) from again
  model = lineage.to_model(stage, state, seconds)
  lineage.finish_stage(workdir, sources.parents, model, config)
  return model


def _restore_or_start(
  checkpoints: Checkpoints, stage: Stage, sources: Sources
) -> tuple[TrainState, float]:
  restored = checkpoints.restore(lineage.abstract_state(stage), set_aside=True)
  if restored is not None:
    return restored
  if sources.teacher is None:
    teacher = stage.denoise.init(jax.random.key(stage.recipe.seed), stage.image_shape)
  else:
    teacher = sources.teacher.params
  student = teacher if sources.start is None else sources.start.params
  return sharding.replicate(stage.recipe.create_state(student, teacher)), 0.0


def _loop(
  step: Callable,
  stage: Stage,
  sources: Sources,
  config: Config,
  checkpoints: Checkpoints,
  state: TrainState,
  seconds: float,
) -> tuple[TrainState, float]:
  """Updates until the stage is finished; returns the last state and the seconds it took in all."""
  done, health = int(state.step), sources.health
  host_batches = sources.batches(stage, done)
  began = time.monotonic() - seconds
  frozen, pending = sources.frozen, []
  progress = Progress(stage.name, stage.num_updates, done, stage.batch_size, config.log.seconds)
  with (
    contextlib.closing(host_batches),
    progress,
    contextlib.closing(MetricsWriter(checkpoints.stage_dir, done)) as writer,
  ):
    if health is not None:
      health.resume(done)
    for batch in sharding.ahead(host_batches):
      state, metrics = step(stage.recipe.at(done), state, frozen, batch)
      done += 1
      pending.append(metrics)
      last = done == stage.num_updates
      look = health is not None and health.due(done)
      if last or look or done % config.log.every == 0:
        values = _summary(jax.device_get(pending), config.max_skipped, done)
        if health is not None:
          values |= health.lag(values)
          if look:
            with contextlib.suppress(Preempted):  # a signal while it draws; the state is saved below
              values |= health.look(state)
        writer.write(done, values)
        progress.note(f'loss {values["loss"]:.3g}' if 'loss' in values else 'loss not finite')
        pending = []
      progress.advance()
      stop = interrupts.pending()
      if last or stop or done % config.checkpoint.every == 0:
        _check_streak(int(state.skipped_in_a_row), config.max_skipped, done)
        seconds = time.monotonic() - began
        checkpoints.save(done, state, seconds)
      if stop:
        break
  checkpoints.wait()
  interrupts.check()
  return state, seconds


def _summary(pending: list[dict[str, Any]], max_skipped: int, done: int) -> dict[str, float]:
  """Means over the finite values of some updates; raises _Diverged if too many were skipped."""
  _check_streak(max(int(metrics['skipped_in_a_row']) for metrics in pending), max_skipped, done)
  values = {}
  for name in {name: None for metrics in pending for name in metrics}:  # not all are of every update
    column = np.array([metrics[name] for metrics in pending if name in metrics], np.float64)
    if np.isfinite(column).any():
      values[name] = float(column[np.isfinite(column)].mean())
  values['skipped'] = float(pending[-1]['skipped'])
  del values['skipped_in_a_row']
  return values


def _check_streak(skipped: int, max_skipped: int, done: int) -> None:
  if skipped >= max_skipped:
    raise _Diverged(f'loss or gradient not finite for {skipped} updates in a row up to step {done}')


def check_batches(config: Config) -> None:
  """Raises UserError unless the batches of all stages divide by micro-batches and devices."""
  names = {'progressive': 'distill'}
  for section in ('train', *(names.get(name, name) for name in config.methods)):
    sharding.check_batch(section, config[section].batch_size, config[section].micro_batches)


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains every stage that is not finished, measures all, and writes the report.

  Raises:
    UserError: config or workdir do not fit; before anything is compiled or changed.
    Preempted, NumericalError: see `fit`.
  """
  stages, images = workdirs.plan_for(workdir, config)
  check_batches(config)
  distances_of = {stage.name: load_distance(stage) for stage in stages}
  with workdirs.lock_workdir(workdir):
    lineage.check_configs(workdir, stages, config)
    workdirs.claim(workdir, config)
    workdirs.claim_images(workdir, images.images)
    step = sharding.compile_step(train_step)
    done = {stage.name for stage in stages if lineage.is_finished(workdir, stage)}
    forecast.show(stages, done, step, config, distances_of)
    models: dict[str, Model] = {}
    for stage in stages:
      teacher = models[stage.parent].use(stage.parent_weights) if stage.parent else None
      start = models[stage.start] if stage.start else None
      sources = Sources(images, teacher, start, distance=distances_of[stage.name])
      if teacher is not None and stage.pairs is not None:
        sources = dataclasses.replace(sources, pairs=ensure(workdir, stage.pairs, teacher))
      if teacher is not None and watching.watches(config, stage) and stage.name not in done:
        health = watching.begin(config, stage, workdir, teacher, images)
        sources = dataclasses.replace(sources, health=health)
      models[stage.name] = fit(step, stage, sources, workdir, config)
    measure.evaluate(config, list(models.values()), images, workdir, again=False)


def load_distance(stage: Stage) -> Params:
  """The weights of the distance that a stage is trained with, or None; raises UserError as `distances.load` does."""
  distance = getattr(stage.recipe.method, 'distance', None)
  key = f'{stage.name}.distance_weights'
  if distance is None or stage.parent is None:
    return None
  return distances.load(distance, stage.distance_weights, stage.image_shape, key)
