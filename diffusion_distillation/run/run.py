"""A run: trains every stage of a plan, then evaluates all of them."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable

from diffusion_distillation import datasets
from diffusion_distillation.config import Config
from diffusion_distillation.datasets import ImageSet
from diffusion_distillation.datasets.encoded import Encoded
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import dinov2, inception, measure, reference
from diffusion_distillation.networks import conditioning
from diffusion_distillation.run import (
  companion_training,
  compared,
  encoding,
  forecast,
  gate,
  monitor,
  preflight,
  tracking,
)
from diffusion_distillation.run.compared import Compared
from diffusion_distillation.run.inputs import Inputs, examples_of, gather, load_distance, needed
from diffusion_distillation.run.loop import fit
from diffusion_distillation.stages import extending, own_companions, provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.plan import check_output
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import Params
from diffusion_distillation.training.step import train_steps

_log = logging.getLogger(__name__)


def check_batches(config: Config) -> None:
  """Raises UserError unless batches divide by micro-batches and devices, and intervals by updates per dispatch."""
  names = {'progressive': 'distill'}
  for section in ('train', *(names.get(name, name) for name in config.methods)):
    sharding.check_batch(section, config[section].batch_size, config[section].micro_batches)
  count = config.compute.updates_per_dispatch
  for key in ('log.every', 'log.health_every', 'log.frechet_every', 'checkpoint.every'):
    section, name = key.split('.')
    if config[section][name] % count:
      raise UserError(
        f'{key}={config[section][name]} must be a multiple of compute.updates_per_dispatch={count}'
      )


def _check_needs(
  config: Config, stages: list[Stage], done: set[str], images: Loader | None, captions: Captions | None
) -> None:
  """Raises UserError if an unfinished stage needs images or texts, and there are none."""
  name, has_images = config.dataset.name, images is not None or isinstance(captions, ImageSet)
  for stage in stages:
    if stage.name in done:
      continue
    if not has_images and 'images' in stage.recipe.method.needs:
      gan = getattr(stage.recipe.method, 'gan', None) is not None
      remedy = (
        f'; set {stage.name}.gan_generator=0 and {stage.name}.gan_fake=0 to train it without a GAN'
        if gan
        else ''
      )
      raise UserError(
        f'stage {stage.name} is trained on images; dataset.name={name} only works for stages that need no images, such as '
        f'knowledge or one-step dmd without a GAN{remedy}'
      )
    if captions is None and conditioning.takes_text(stage.denoise.conditioning):
      raise UserError(
        f'stage {stage.name} is trained on texts, and dataset.name={name} has none; set dataset.name=prompts and '
        'dataset.path to a file of prompts'
      )


def _check(
  config: Config, workdir: pathlib.Path, stages: list[Stage]
) -> tuple[set[str], dict[str, Params]]:
  """Checks a plan against its config; returns the names of finished stages and the distances' weights by stage."""
  check_batches(config)
  gate.check(config)
  tracking.check(config)
  if config.log.frechet_every and config.dataset.name == datasets.PROMPTS:
    raise UserError(
      f'log.frechet_every={config.log.frechet_every}: dataset.name=prompts has no images to compare samples with; set it to 0'
    )
  reference.check(config)
  if config.evaluation.inception:  # raises its errors now, not after training
    inception.load(config.evaluation.inception)
  if config.evaluation.dinov2:
    dinov2.load(config.evaluation.dinov2)
  distances_of = {stage.name: load_distance(stage) for stage in stages}
  done = {stage.name for stage in stages if provenance.is_finished(workdir, stage)}
  for stage in stages:
    if stage.name not in done:
      check_output(stage)
  return done, distances_of


def _show(config: Config, workdir: pathlib.Path, stages: list[Stage], done: set[str]) -> None:
  """Checks a plan against the workdir and shows it."""
  workdirs.check_made_with(workdir, config)
  extending.check_configs(workdir, stages, config)
  forecast.show(stages, done, config, workdir)


def show_plan(config: Config, workdir: pathlib.Path) -> None:
  """Shows what `run` would do, the memory and disk space it needs, and how long it would take; writes nothing.

  Known datasets need not be present. With `log.measured_updates` = 0, or for other devices than this machine's
  (`compute.device_gb`), nothing is compiled and no time is estimated.

  Raises:
    UserError: the config is not valid, or does not match the workdir.
  """
  stages = workdirs.described_plan(workdir, config)
  done, distances_of = _check(config, workdir, stages)
  compared.check(config, stages[0].text)
  _show(config, workdir, stages, done)
  captions, device_gb = workdirs.open_captions(workdir, config), config.compute.device_gb
  to_encode = encoding.missing_bytes(config, workdir, stages[0], captions)
  needs = (stages, done, workdir, distances_of, to_encode)
  forecast.show_lines(preflight.needs(*needs, device_gb))
  if device_gb:
    return
  preflight.check(*needs)
  forecast.show_times(stages, done, sharding.compile_step(train_steps), config, distances_of)


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains every unfinished stage, measures all stages, and writes the report.

  Args:
    config: the config of the run.
    workdir: the directory of the run.

  Raises:
    UserError: the config is not valid, or does not match the workdir; raised before anything is compiled or changed.
    Preempted, NumericalError: see `fit`.
    QualityError: a student falls short of its teacher; see `gate`.
  """
  stages, images = workdirs.plan_for(workdir, config)
  captions = workdirs.open_captions(workdir, config)
  done, distances_of = _check(config, workdir, stages)
  _check_needs(config, stages, done, images, captions)
  if isinstance(captions, ImageSet):
    companion_training.check_processes(config, workdir)
  against = compared.of_run(config, stages, images, captions)
  with (
    contextlib.ExitStack() as reading
  ):  # the processes that read images always end before this one does
    if against.images is not None:
      reading.enter_context(contextlib.closing(against.images))
    reading.enter_context(workdirs.lock_workdir(workdir))
    _show(config, workdir, stages, done)
    to_encode = encoding.missing_bytes(config, workdir, stages[0], captions)
    needs = (stages, done, workdir, distances_of, to_encode)
    preflight.check(*needs)
    # These lines are shown once, by the first of its callers. Since all losses are traced for them, that is done while the first
    # program is compiled, unless long work comes before.
    show_needs = functools.partial(forecast.show_lines, preflight.needs(*needs))
    if captions is not None or stages[0].name in done:
      show_needs()
    workdirs.claim(workdir, config)
    if images is not None:
      workdirs.claim_images(workdir, images.images)
      if any(conditioning.classes(stage.denoise.conditioning) for stage in stages):
        workdirs.count_labels(workdir, images.images)
    if isinstance(captions, ImageSet) and not done and own_companions.are_wanted(config):
      workdirs.claim_images(workdir, captions)
      companion_training.ensure(config, workdir, captions)
      stages, _ = workdirs.plan_for(workdir, config)  # with the networks that are finished now
      distances_of = {stage.name: load_distance(stage) for stage in stages}
      against = against.drawing_for(stages[0].text)
    encoded = _encode(config, workdir, stages, done, captions)
    examples = examples_of(images, encoded)
    if examples is not None and examples is not images:
      reading.enter_context(contextlib.closing(examples))
    models = _train(
      config, workdir, stages, done, images, examples, distances_of, encoded, against, show_needs
    )
    if not against.is_measured:
      _log.warning(
        'dataset.name=%s: skipping the evaluation, as there are no images to compare with, and no CLIP model',
        config.dataset.name,
      )
    else:
      measure.evaluate(against.config, models, against.images, workdir, again=False, texts=against.texts)


def _encode(
  config: Config,
  workdir: pathlib.Path,
  stages: list[Stage],
  done: set[str],
  captions: Captions | None,
) -> Encoded | None:
  """Returns the encoded texts, if a stage is still to be trained with them."""
  if captions is None or all(stage.name in done for stage in stages):
    return None
  workdirs.claim_images(workdir, captions)
  return encoding.of_run(config, workdir, stages[0], captions)


def _monitor(
  config: Config, stage: Stage, workdir: pathlib.Path, images: Loader | None, inputs: Inputs
) -> monitor.Monitor | None:
  """Returns the monitor of a stage; None if it has neither images to be compared with nor texts to be drawn."""
  if images is not None:
    return monitor.begin(config, stage, workdir, images)
  if inputs.texts is None:
    return None
  return monitor.begin_with_texts(stage, workdir, config, inputs.texts, inputs.pairs)


def _train(
  config: Config,
  workdir: pathlib.Path,
  stages: list[Stage],
  done: set[str],
  images: Loader | None,
  examples: Loader | None,
  distances_of: dict[str, Params],
  texts: Encoded | None,
  against: Compared,
  meanwhile: Callable[[], None],
) -> list[Model]:
  """Trains the unfinished stages; keeps only those weights in memory that later stages need. See `fit` for `meanwhile`."""
  step, after = sharding.compile_step(train_steps), forecast.work_after(stages, done, config)
  models: dict[str, Model] = {}
  judge = gate.make_gate(against.config, workdir, against.images, against.texts)
  for k, stage in enumerate(stages):
    inputs = gather(stage, models, examples, workdir, distances_of[stage.name], texts)

    def train(stage: Stage, inputs: Inputs = inputs) -> Model:
      if not provenance.is_finished(workdir, stage):
        inputs = inputs.held()
        if monitor.watches(config, stage) and inputs.teacher is not None:
          inputs = dataclasses.replace(inputs, monitor=_monitor(config, stage, workdir, images, inputs))
        if config.log.frechet_every and against.images is not None:
          parents = inputs.parents(stage)
          tracker = tracking.begin(
            against.config, stage, workdir, against.images, parents, against.texts
          )
          inputs = dataclasses.replace(inputs, tracker=tracker)
      return fit(step, stage, inputs, workdir, config, after.get(stage.name, 0.0), meanwhile)

    models[stage.name] = gate.until_it_passes(judge, train, stage, inputs.teacher)
    del inputs, train
    left = [later for later in stages[k + 1 :] if later.name not in done]
    models = {
      name: provenance.release(workdir, model, needed(left, name)) for name, model in models.items()
    }
  return list(models.values())
