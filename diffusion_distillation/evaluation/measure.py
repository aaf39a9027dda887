"""Evaluates every stage: students at their own step count, the undistilled base at each of the step counts."""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.diffusion.samplers import Sampler
from diffusion_distillation.evaluation import report, report_contents, row_batches, yardstick
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import frechet
from diffusion_distillation.evaluation.results import (
  key_of,
  known_rows,
  measured,
  note_missing,
  origins,
  record,
)
from diffusion_distillation.evaluation.row_batches import RowBatches, RunningRow
from diffusion_distillation.evaluation.rows import Setting, guidances, rows
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.evaluation.sampling import Chosen, Drawer, at_a_time
from diffusion_distillation.evaluation.yardstick import Yardstick
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.guidance import GuidingModel, calls_per_image
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.parts import guiding_of, make_sampler
from diffusion_distillation.stages.provenance import Model, updates_done
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)


def evaluate(
  config: Config,
  models: list[Model],
  train: Loader | None,
  workdir: pathlib.Path,
  again: bool,
  texts: SampledTexts | None = None,
) -> dict[str, Any]:
  """Measures all rows and writes `results.json` and `report/`. Finished rows survive an interruption.

  Args:
    config: the config of the run.
    models: the base and the models distilled from it, in order.
    train: the training split, which is the reference; None for a dataset without images.
    workdir: the directory of the run.
    again: whether existing rows are measured again.
    texts: what models of texts draw; None for other models.

  Returns:
    The content of `results.json`.
  """
  began = time.monotonic()
  stages = [model.stage for model in models]
  by, results = yardstick.make(config, train, workdir, _labels(config, stages[0]), texts)
  results['seconds'] = {model.stage.name: model.seconds for model in models}
  results['stages'] = origins(stages, results['seconds'], workdir)
  path, partial = workdir / 'results.json', workdir / 'results.partial.json'
  known = {} if again else known_rows(path, results) | known_rows(partial, results)
  if again:
    row_batches.clear(workdir)
  cluster.barrier()  # before the first process writes these files anew
  todo = _settings(config, models, workdir, texts)
  drawn: dict[tuple, np.ndarray] = {}
  kept: set[int] = set()
  steps, size = sum(s.num_steps for s in todo), config.evaluation.num_samples
  with Progress('evaluation', steps, images_per_step=size, line_seconds=config.log.seconds) as bar:
    for setting in todo:
      row = describe(config, setting)
      if (earlier := known.get(key_of(row))) is not None:
        row |= earlier
        kept.add(len(results['rows']))
      else:
        row, images = measure_setting(config, setting, by, workdir)
        drawn[_place(setting)] = images
      if 'file' in (reference := results.get('reference', {})):
        row['reference'] = reference['file']
      results['rows'].append(row)
      write_json(partial, results)
      guided = f' guidance {row["guidance"]:g}' if row['guidance'] else ''
      bar.note(f'{row["stage"]} {row["sampler"]} {row["num_steps"]}{guided}: {row["value"]:.3f}')
      bar.advance(setting.num_steps)
  row_batches.clear(workdir)
  note_missing(results, kept)
  record(results['rows'], models, workdir)
  results['seconds']['evaluation'] = time.monotonic() - began
  draw = _drawing(config, by.label_counts, drawn)
  contents = report_contents.gather(config, todo, draw, by, train, workdir, texts)
  if files.writes():
    report.write(config, results, contents, workdir / 'report')
    write_json(partial, results)
    os.replace(partial, path)
  cluster.barrier()  # the others do not leave while the first process writes
  return results


def _settings(
  config: Config, models: list[Model], workdir: pathlib.Path, texts: SampledTexts | None
) -> list[Setting]:
  """Returns what the rows of an evaluation measure, in their order; a guiding model only guides the base, the first model."""
  section, stages = config.evaluation, [model.stage for model in models]
  guiding = guiding_of('evaluation', section.guiding_model, section.guidance, stages[0])
  return [
    Setting(
      models[place].use(weights),
      sampler,
      num_steps,
      updates_done(workdir, models[place]),
      guidance,
      guiding if guidance and not place else None,
      texts,
    )
    for place, weights, sampler, num_steps in rows(stages, config)
    for guidance in guidances(config, place, stages[place])
  ]


def describe(config: Config, setting: Setting) -> dict[str, Any]:
  """Returns a row without its measurements; rows with equal descriptions have equal measurements."""
  sampler, by, stage = make(config, setting.sampler), setting.guidance, setting.model.stage
  conditions = stage.denoise.conditioning
  return {
    'stage': setting.model.stage.name,
    'weights': setting.model.weights,
    'method': setting.model.stage.method,
    'sampler': setting.sampler,
    'num_steps': setting.num_steps,
    'grid': grid_name(config, stage),
    'guidance': by.weight,
    'guidance_interval': by.interval,
    'guiding_model': setting.guiding and setting.guiding.digest,
    'nfe': calls_per_image(
      conditions, by, sampler, grid(config, stage, setting.num_steps), stage.schedule
    ),
    'num_samples': config.evaluation.num_samples,
    'tolerance': config.evaluation.tolerance,
    'seed': config.evaluation.seed,
    'labels': _labels(config, setting.model.stage),
    'clip_x': config.evaluation.clip_x,
    'dtype': getattr(stage.denoise.network, 'dtype', 'float32'),
    **dataclasses.asdict(sampler),
    'batch_size': config.evaluation.batch_size,
    'updates': setting.updates,
    'digest': setting.model.digest,
    **({} if setting.texts is None else setting.texts.of_row()),
  }


def _labels(config: Config, stage: Stage) -> str | None:
  """Returns the distribution of the labels that a stage is sampled with; None for an unconditional stage."""
  return config.evaluation.labels if conditioning.classes(stage.denoise.conditioning) else None


def label_counts(config: Config, workdir: pathlib.Path) -> tuple[int, ...]:
  """Returns `label_counts` for `drawer`: images per class if samples should have the data's proportions of labels; else ()."""
  return workdirs.label_counts(workdir) if config.evaluation.labels == 'data' else ()


def make(config: Config, sampler: str) -> Sampler:
  """Returns a sampler with the settings of the section `evaluation`."""
  return make_sampler(sampler, config.evaluation.gamma)


def drawer(
  config: Config,
  stage: Stage,
  sampler: str,
  label_counts: tuple[int, ...] = (),
  guidance: Guidance = NONE,
  guiding: GuidingModel | None = None,
  texts: conditioning.Texts | None = None,
) -> Drawer:
  """Returns a `Drawer` for a stage with the settings of `evaluation`; without `label_counts`, classes are drawn in turn."""
  section = config.evaluation
  return Drawer(
    denoise=stage.denoise,
    sampler=make(config, sampler),
    schedule=stage.schedule,
    space=stage.space,
    image_shape=stage.image_shape,
    batch_size=at_a_time(stage.space, stage.image_shape, section.batch_size, section.num_samples),
    clip_x=section.clip_x,
    label_counts=label_counts,
    guidance=guidance,
    guiding=guiding,
    texts=texts,
  )


def grid_name(config: Config, stage: Stage) -> str:
  """Returns the name of the grid that a student was trained for, or of the config's choice for the base."""
  return 'uniform' if stage.parent else config.evaluation.grid


def grid(config: Config, stage: Stage, num_steps: int) -> np.ndarray:
  """Returns the times of a row, on the grid of `grid_name`."""
  return times.make_grid(grid_name(config, stage), num_steps, stage.schedule)


def measure_setting(
  config: Config,
  setting: Setting,
  by: Yardstick,
  workdir: pathlib.Path | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
  """Draws images and measures them; returns the row and its first images.

  With a `workdir`, the features of each batch are kept there until the row is finished, and an interrupted evaluation goes on
  within the row.

  The Frechet distance of n samples is too large by about the distance of n real images, which decreases as 1/n. The error is
  therefore estimated from `by.floor`, that of `evaluation.num_samples` real images (see `sampling_floor`), at every doubling of n.
  """
  section, texts, model = config.evaluation, setting.texts, setting.model
  size, tolerance, seed, due = section.num_samples, section.tolerance, section.seed, 2
  at, draw = grid(config, model.stage, setting.num_steps), _drawer_of(config, setting, by.label_counts)

  def cond(index: np.ndarray) -> Cond:
    return draw.cond(index, seed) if texts is None else {'label': texts.labels(index, seed)}

  tally = by.classes.tally(model.stage.denoise.conditioning)
  score = None if texts is None else texts.running(size, seed)
  running = RunningRow(size, report_contents.SHOWN, tally, cond, score)
  described = describe(config, setting)
  batches = RowBatches(workdir, described | {'extractors': by.extractors.digest, 'floor': by.floor})

  def then(images: jax.Array) -> tuple[Extracted, jax.Array]:
    return by.extractors.of(images), images

  def is_enough() -> bool:
    nonlocal due
    if not tolerance or by.reference is None or running.seen < due:
      return False
    due = 2 * running.seen
    error = by.floor * size / running.seen
    enough = error < tolerance * frechet(running.features.result(), by.reference)
    return bool(cluster.from_first(bool(enough)))  # processes may differ in the last bits

  def use(made: tuple[Extracted, jax.Array], count: int) -> bool:
    batch = running.fetch(*made, count)
    running.add(batch)
    enough = is_enough()
    if not enough and running.seen < size:
      batches.write(batch)
    return enough

  for batch in batches.read():
    running.add(batch)
    is_enough()
  seconds = draw.seconds_per_image(model.params, at, size, seed, then, use, running.seen)
  batches.remove()
  row = described | {
    'metric': by.extractors.metric,
    **measured(running.features.result(), by.reference, score),
    'num_drawn': running.seen,
    'seconds_per_image': seconds,
    **tally.result(),
  }
  return row, np.concatenate(running.first)


def _drawer_of(config: Config, setting: Setting, label_counts: tuple[int, ...]) -> Drawer:
  """Returns the `Drawer` of a row."""
  s = setting
  return drawer(config, s.model.stage, s.sampler, label_counts, s.guidance, s.guiding, s.texts)


def _place(setting: Setting) -> tuple:
  """Returns a key that identifies the samples of a row within one evaluation."""
  model = setting.model
  return model.stage.name, model.weights, setting.sampler, setting.num_steps, setting.guidance


def _drawing(
  config: Config, label_counts: tuple[int, ...], drawn: Mapping[tuple, np.ndarray]
) -> report_contents.Draw:
  """Returns a function that draws the images of a setting; `drawn` are the first ones of new rows, by `_place`."""

  def draw(setting: Setting, count: int, chosen: Chosen) -> np.ndarray:
    known, stage = drawn.get(_place(setting)), setting.model.stage
    if chosen is None and known is not None and len(known) >= count:
      return known[:count]
    by = _drawer_of(config, setting, label_counts)
    at = grid(config, stage, setting.num_steps)
    return by.draw(setting.model.params, at, count, config.evaluation.seed, chosen)

  return draw
