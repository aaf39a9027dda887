"""Training: the one step, the loop over it, and the run over all stages."""

import contextlib
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distillation import forecast, interrupts, pixels, sharding
from diffusion_distillation import workdir as workdirs
from diffusion_distillation.checkpoints import Checkpoints
from diffusion_distillation.configuration import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, NumericalError
from diffusion_distillation.evaluation import measure
from diffusion_distillation.metrics import MetricsWriter
from diffusion_distillation.progress import Progress
from diffusion_distillation.stages import Recipe, Stage
from diffusion_distillation.train_state import Params, TrainState
from diffusion_distillation.workdir import Model

_log = logging.getLogger(__name__)


def train_step(
  recipe: Recipe, state: TrainState, teacher: Params, batch: Mapping[str, Any]
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update, or none where loss or gradient is not finite.

  Args:
    recipe: the stage's constants.
    state: donated by the compiled step.
    teacher: EMA parameters of the stage before, or None.
    batch: `image` (B, H, W, C) uint8 and `label` (B,) or None; global arrays, the mean over which is the
      loss, on however many devices.

  Returns:
    The next state, and scalar metrics.
  """
  rng = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
  rng_flip, rng_draw, rng_dropout = jax.random.split(rng, 3)
  x, label = pixels.to_x(batch['image']), batch['label']
  if recipe.random_flip:
    x = pixels.flip(rng_flip, x)
  if recipe.dequantize:
    x = pixels.dequantize(jax.random.fold_in(rng_flip, 1), x)
  if recipe.label_dropout:
    label = pixels.drop_labels(jax.random.fold_in(rng_flip, 2), label, recipe.label_dropout)
  examples = {'x': x, 'label': label, **recipe.method.draw(rng_draw, x.shape)}
  loss, metrics, grads = gradients(recipe, state.params, teacher, examples, rng_dropout, state.step)

  grad_norm = optax.tree.norm(grads)
  learning_rate = recipe.learning_rate(state.step)
  updates, opt_state = recipe.optimizer.transform().update(grads, state.opt_state, state.params)
  params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
  ema_params = tuple(
    optax.incremental_update(params['student'], average, 1.0 - decay)
    for average, decay in zip(state.ema_params, recipe.ema_decay, strict=True)
  )

  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
  tried = (params, ema_params, opt_state)
  kept = (state.params, state.ema_params, state.opt_state)
  params, ema_params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), tried, kept)
  state = TrainState(
    step=state.step + 1,
    params=params,
    ema_params=ema_params,
    opt_state=opt_state,
    skipped=state.skipped + jnp.where(finite, 0, 1),
    skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
  )
  metrics = metrics | {
    'loss': loss,
    'grad_norm': grad_norm,
    'learning_rate': learning_rate,
    'skipped': state.skipped,
    'skipped_in_a_row': state.skipped_in_a_row,
  }
  return state, metrics


def gradients(
  recipe: Recipe,
  params: Params,
  teacher: Params,
  batch: Mapping[str, Any],
  rng: jax.Array,
  step: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
  """Loss, metrics and gradient of a batch, as the mean over its micro-batches.

  Micro-batch m holds the examples m, m + M, m + 2M, ...: of a batch that is split over devices in blocks, every
  device has its share of each. Only dropout depends on M.
  """
  count = recipe.micro_batches

  def part(m: jax.Array) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    examples = jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:])[:, m], dict(batch))
    rng_part = jax.random.fold_in(rng, m)

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
      return recipe.method.loss(recipe.denoise, params, teacher, examples, rng_part, step)

    return jax.value_and_grad(loss, has_aux=True)(params)

  def add(total: Any, m: jax.Array) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, part(m)), None

  first = jnp.array(0)
  if count == 1:
    total = part(first)
  else:
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, first))
    # XLA's CPU backend runs convolutions slowly inside loops (jax issue 12868).
    total, _ = jax.lax.scan(add, zeros, jnp.arange(count), unroll=jax.default_backend() == 'cpu')
  (loss, metrics), grads = jax.tree.map(lambda value: value / count, total)
  return loss, metrics, grads


class _Diverged(Exception):
  """Too many updates in a row were skipped."""


def fit(
  step: Callable,
  stage: Stage,
  teacher: Model | None,
  images: Loader,
  workdir: pathlib.Path,
  config: Config,
) -> Model:
  """Trains a stage to its end, from wherever its directory says that it stands.

  Args:
    step: the compiled `train_step`.
    stage: what to train.
    teacher: the parent stage's model; the student starts from it.
    images: training images.
    workdir: has the stage's directory in it.
    config: of the whole run.

  Returns:
    The finished model; at once, if it was finished before.

  Raises:
    DamagedError: the stage was finished, and no whole checkpoint of it is left.
    NumericalError: after going back to the last checkpoint, too many updates in a row were skipped again.
    Preempted: a signal came; the state is saved.
  """
  workdirs.begin_stage(workdir, stage, teacher, config)
  with contextlib.closing(Checkpoints(workdir / stage.name)) as checkpoints:
    loop = functools.partial(_loop, step, stage, teacher, images, config, checkpoints)
    state, seconds = _restore_or_start(checkpoints, stage, teacher)
    if int(state.step) == stage.num_updates:
      workdirs.check_digest(workdir, workdirs.to_model(stage, state, seconds))
    elif not int(state.step) and workdirs.is_finished(workdir, stage):
      raise DamagedError(
        f'{workdir / stage.name} was finished, but no whole checkpoint is left; restore one, or remove '
        'the directory to train the stage again'
      )
    else:
      try:
        state, seconds = loop(state, seconds)
      except _Diverged as first:
        checkpoints.wait()
        state, seconds = _restore_or_start(checkpoints, stage, teacher)
        _log.warning('stage %s: %s; back to step %d', stage.name, first, state.step)
        try:
          state, seconds = loop(state, seconds)
        except _Diverged as again:
          raise NumericalError(
            f'stage {stage.name}: {again}, and not for the first time; '
            'lower its learning rate (in a new workdir), or look at its data'
          ) from again
  model = workdirs.to_model(stage, state, seconds)
  workdirs.finish_stage(workdir, teacher, model, config)
  return model


def _restore_or_start(
  checkpoints: Checkpoints, stage: Stage, teacher: Model | None
) -> tuple[TrainState, float]:
  restored = checkpoints.restore(workdirs.abstract_state(stage), set_aside=True)
  if restored is not None:
    return restored
  if teacher is not None:
    start = teacher.params
  else:
    start = stage.denoise.init(jax.random.key(stage.recipe.seed), stage.image_shape)
  return sharding.replicate(stage.recipe.create_state(start)), 0.0


def _loop(
  step: Callable,
  stage: Stage,
  teacher: Model | None,
  images: Loader,
  config: Config,
  checkpoints: Checkpoints,
  state: TrainState,
  seconds: float,
) -> tuple[TrainState, float]:
  """Updates until the stage is finished; returns the last state and the seconds it took in all."""
  done = int(state.step)
  host_batches = images.shuffled(int(stage.recipe.seed), stage.batch_size, done, stage.num_updates)
  began = time.monotonic() - seconds
  teacher_params = None if teacher is None else sharding.replicate(teacher.params)
  pending: list[dict[str, jax.Array]] = []
  progress = Progress(stage.name, stage.num_updates, done, stage.batch_size, config.log.seconds)
  with (
    contextlib.closing(host_batches),
    progress,
    contextlib.closing(MetricsWriter(checkpoints.stage_dir, done)) as writer,
  ):
    for batch in sharding.ahead(map(stage.inputs, host_batches)):
      state, metrics = step(stage.recipe, state, teacher_params, batch)
      done += 1
      pending.append(metrics)
      last = done == stage.num_updates
      if last or done % config.log.every == 0:
        values = _summary(jax.device_get(pending), config.max_skipped, done)
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
  for name in pending[0]:
    column = np.array([metrics[name] for metrics in pending], np.float64)
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
  for section in ('train', 'distill'):
    sharding.check_batch(section, config[section].batch_size, config[section].micro_batches)


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains every stage that is not finished, measures all, and writes the report.

  Raises:
    UserError: config or workdir do not fit; before anything is compiled or changed.
    Preempted, NumericalError: see `fit`.
  """
  stages, images = workdirs.plan_for(workdir, config)
  check_batches(config)
  with workdirs.lock_workdir(workdir):
    workdirs.claim(workdir, config)
    workdirs.claim_images(workdir, images.images)
    step = sharding.compile_step(train_step)
    done = {stage.name for stage in stages if workdirs.is_finished(workdir, stage)}
    forecast.show(stages, done, step, config)
    models: dict[str, Model] = {}
    for stage in stages:
      teacher = models[stage.parent].use(stage.parent_weights) if stage.parent else None
      models[stage.name] = fit(step, stage, teacher, images, workdir, config)
    measure.evaluate(config, list(models.values()), images, workdir, again=False)
