"""The training loop of one stage."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.errors import DamagedError, NumericalError, Preempted
from diffusion_distillation.run import attempts, replay
from diffusion_distillation.run.inputs import Inputs, shapes
from diffusion_distillation.stages import extending, provenance, trained
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import announcing, interrupts, sharding
from diffusion_distillation.system.checkpoints import Checkpoints
from diffusion_distillation.system.logs import MetricsWriter
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training.state import TrainState

_log = logging.getLogger(__name__)


class _Diverged(Exception):
  """Too many updates in a row were skipped."""


def fit(
  step: Callable,
  stage: Stage,
  inputs: Inputs,
  workdir: pathlib.Path,
  config: Config,
  work_after: float = 0.0,
  meanwhile: Callable[[], None] = lambda: None,
) -> Model:
  """Trains a stage until it is finished, resuming from its last checkpoint if there is one.

  Args:
    step: the compiled step, `train_steps`.
    stage: the stage to train.
    inputs: the inputs that it is trained with.
    workdir: the directory that contains the stage's directory.
    config: the config of the whole run.
    work_after: the work after this stage, in multiples of the stage's own work; only for the displayed time.
    meanwhile: called while the stage's program is compiled.

  Returns:
    The finished model; immediately, if the stage was already finished.

  Raises:
    DamagedError: the stage was finished, but no complete checkpoint of it is left.
    NumericalError: too many updates in a row were skipped, and again after going back to the last checkpoint and drawing
      other batches and other noise.
    Preempted: a signal was received; the state is saved.
  """
  parents = inputs.parents(stage)
  provenance.begin_stage(workdir, stage, parents, config)
  model = provenance.finished_model(workdir, stage)
  if anew := model is None:
    with contextlib.closing(Checkpoints(workdir / stage.name)) as checkpoints:
      loop = functools.partial(_loop, step, inputs, config, work_after, checkpoints)
      with (
        announcing.compiling(f'stage {stage.name}'),
        _compiled_meanwhile(step, stage, inputs, workdir, config),
      ):
        meanwhile()
        state, seconds = _restore_or_start(checkpoints, stage, inputs)
      if not int(state.step) and provenance.was_finished(workdir, stage):
        raise DamagedError(
          f'{workdir / stage.name} was finished, but no complete checkpoint is left; restore one, or remove '
          'the directory to train the stage again'
        )
      state, ended = _resume_tracker(stage, inputs, checkpoints, state, seconds)
      if int(state.step) < stage.num_updates and not ended:
        state, seconds = _until_the_end(loop, stage, inputs, checkpoints, state, seconds)
    model = trained.to_model(stage, state, seconds, inputs.adapted(stage))
    provenance.check_digest(workdir, model)
  early = {} if inputs.tracker is None else inputs.tracker.outcome(model.step)
  provenance.finish_stage(workdir, parents, model, config, anew, early)
  return model


def _resume_tracker(
  stage: Stage, inputs: Inputs, checkpoints: Checkpoints, state: TrainState, seconds: float
) -> tuple[TrainState, bool]:
  """Makes up for a measurement that a signal prevented; returns the state, and whether the stage ends with it."""
  tracker, done = inputs.tracker, int(state.step)
  if tracker is None:  # nothing is measured, or the stage was finished before
    stopped = extending.stopped_at(checkpoints.stage_dir.parent, stage)
    if stopped not in (None, done):
      raise DamagedError(
        f'{checkpoints.stage_dir} was stopped early after {stopped} updates, but neither its model nor that checkpoint is '
        'complete; restore one, or remove the directory to train the stage again'
      )
    return state, stopped is not None
  tracker.resume(done, state.ema_params[0])
  if not tracker.ends(done):
    return state, False
  state, changed = tracker.with_best(state)
  if changed:  # the checkpoint holds the last average
    checkpoints.discard(done)
    checkpoints.save(done, state, seconds)
    checkpoints.wait()
  return state, True


def _until_the_end(
  loop: Callable,
  stage: Stage,
  inputs: Inputs,
  checkpoints: Checkpoints,
  state: TrainState,
  seconds: float,
) -> tuple[TrainState, float]:
  """Trains to the last state; on divergence, retries once from each checkpoint with other batches and other noise."""
  stage = attempts.of(stage, checkpoints.stage_dir)
  while True:
    try:
      return loop(stage, state, seconds)
    except _Diverged as error:
      checkpoints.wait()
      state, seconds = _restore_or_start(checkpoints, stage, inputs)
      back = int(state.step)
      if back in stage.attempts:
        raise NumericalError(
          f'stage {stage.name}: {error}, for the second time since step {back}; '
          'lower its learning rate and remove its directory, or check its data'
        ) from error
      if inputs.tracker is not None:
        inputs.tracker.forget(back)
      stage = dataclasses.replace(stage, attempts=(*stage.attempts, back))
      attempts.record(stage, checkpoints.stage_dir)
      _log.warning(
        'stage %s: %s; going back to step %d, and continuing with other batches and other noise (attempt %d)',
        *(stage.name, error, back, 1 + len(stage.attempts)),
      )


def _compiled_meanwhile(
  step: Callable, stage: Stage, inputs: Inputs, workdir: pathlib.Path, config: Config
) -> contextlib.AbstractContextManager:
  """Compiles the stage's program while its first state is created or restored, unless the stage is finished."""
  if provenance.is_finished(workdir, stage):
    return contextlib.nullcontext()
  teacher = None if inputs.teacher is None else inputs.teacher.params
  frozen = jax.eval_shape(stage.frozen, teacher, inputs.distance, inputs.adapted(stage))
  batch, recipe = shapes(stage, stage.batch_size), stage.recipe
  state, count = stage.abstract_state, config.compute.updates_per_dispatch
  if 1 < count <= stage.num_updates:
    recipes = tuple(map(recipe.at, range(count)))
    return sharding.compiled_meanwhile(step, recipes, state, frozen, (batch,) * count)
  return sharding.compiled_meanwhile(step, recipe.at(0), state, frozen, batch)


def _restore_or_start(
  checkpoints: Checkpoints, stage: Stage, inputs: Inputs
) -> tuple[TrainState, float]:
  restored = checkpoints.restore(stage.abstract_state, set_aside=True)
  return (inputs.first_state(stage), 0.0) if restored is None else restored


def _loop(
  step: Callable,
  inputs: Inputs,
  config: Config,
  work_after: float,
  checkpoints: Checkpoints,
  stage: Stage,
  state: TrainState,
  seconds: float,
) -> tuple[TrainState, float]:
  """Runs updates until the stage is finished; returns the last state and the stage's total seconds."""
  done, monitor = int(state.step), inputs.monitor
  host_batches = inputs.batches(stage, done)
  began = time.monotonic() - seconds
  frozen, pending = inputs.frozen(stage), []
  progress = Progress(
    stage.name, stage.num_updates, done, stage.batch_size, config.log.seconds, work_after
  )

  def check(skipped: int) -> None:
    if skipped >= config.max_skipped:
      replay.keep(stage, inputs, checkpoints.stage_dir, state)
      raise _Diverged(f'loss or gradient not finite for {skipped} updates in a row up to step {done}')

  with (
    interrupts.unsaved(),
    contextlib.closing(host_batches),
    progress,
    contextlib.closing(MetricsWriter(checkpoints.stage_dir, done)) as writer,
  ):
    if monitor is not None:
      monitor.resume(done)
    for batches in _dispatches(sharding.ahead(host_batches), stage, done, config):
      recipes = tuple(stage.recipe_at(done + k) for k in range(len(batches)))
      if len(batches) == 1:
        state, metrics = step(recipes[0], state, frozen, batches[0])
        pending.append(metrics)
      else:
        state, several = step(recipes, state, frozen, batches)
        pending += several
      sharding.wait_on_cpu(state)
      done += len(batches)
      last = done == stage.num_updates
      watchers = inputs.watchers(done)
      if last or watchers or done % config.log.every == 0:
        fetched = jax.device_get(pending)
        _tell_skipped(fetched, done, stage, checkpoints.stage_dir)
        check(max(int(metrics['skipped_in_a_row']) for metrics in fetched))
        values = _summary(fetched)
        if monitor is not None:
          values |= monitor.lag(values)
        with contextlib.suppress(Preempted):  # a signal while drawing; the state is saved below
          for watcher in watchers:
            values |= watcher.look(state, frozen)
        if inputs.tracker in watchers and inputs.tracker.ends(done):
          (state, _), last = inputs.tracker.with_best(state), True
        writer.write(done, values)
        progress.note(_note(values))
        pending = []
      progress.advance(len(batches))
      stop = interrupts.pending()
      if last or stop or done % config.checkpoint.every == 0:
        check(int(state.skipped_in_a_row))
        seconds = time.monotonic() - began
        checkpoints.save(done, state, seconds)
      if stop or last:
        break
  checkpoints.wait()
  interrupts.check()
  return state, seconds


def _note(values: Mapping[str, float]) -> str:
  """Returns what the progress line says of the latest values."""
  loss = f'loss {values["loss"]:.3g}' if 'loss' in values else 'loss not finite'
  return loss + (f', FD {values["frechet"]:.3g}' if 'frechet' in values else '')


def _dispatches(
  batches: Iterator[Any], stage: Stage, done: int, config: Config
) -> Iterator[tuple[Any, ...]]:
  """Yields groups of `compute.updates_per_dispatch` batches, aligned to multiples of it, and other batches one by one."""
  count = config.compute.updates_per_dispatch
  while True:
    together = done % count == 0 and done + count <= stage.end_after(done)
    group = tuple(itertools.islice(batches, count if together else 1))
    if not group:
      return
    yield group
    done += len(group)


def _tell_skipped(
  pending: list[dict[str, Any]], done: int, stage: Stage, stage_dir: pathlib.Path
) -> None:
  """Logs which of the last updates were skipped, and how to examine the first of them."""
  steps = [done - len(pending) + k for k, metrics in enumerate(pending) if metrics['skipped_in_a_row']]
  if steps:
    _log.warning(
      'stage %s: skipped update(s) %s, whose loss or gradient was not finite; to examine the first, run: %s',
      *(stage.name, ', '.join(map(str, steps[:10])), replay.command(stage, stage_dir, steps[0])),
    )


def _summary(pending: list[dict[str, Any]]) -> dict[str, float]:
  """Averages the finite values of each metric over some updates."""
  values = {}
  for name in {name: None for metrics in pending for name in metrics}:  # some updates lack some metrics
    column = np.array([metrics[name] for metrics in pending if name in metrics], np.float64)
    if np.isfinite(column).any():
      values[name] = float(column[np.isfinite(column)].mean())
  values['skipped'] = float(pending[-1]['skipped'])
  del values['skipped_in_a_row']
  return values
