"""Evaluates every stage: students at their own step count, the undistilled base at each of the step counts."""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_distillation.config import AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, SHARE, Config, key
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.diffusion.samplers import SAMPLERS, Sampler
from diffusion_distillation.evaluation import features, report
from diffusion_distillation.evaluation.metrics import METRICS, Features, RunningFeatures, frechet
from diffusion_distillation.evaluation.reference import Real, load_or_compute
from diffusion_distillation.evaluation.results import header, key_of, known_rows, origins, record
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.parts import make_sampler
from diffusion_distillation.stages.provenance import Model, updates_done
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files, logs, sharding
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

_SHOWN = 16  # number of images per stage in the report


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
  """How stages are evaluated, and sampled from."""

  num_samples: int = key(50_000, 'Number of samples per row of `results.json`.', AT_LEAST_TWO)
  tolerance: float = key(
    0.0,
    'Relative error at which a row stops drawing samples early. The error after n samples is estimated as '
    '`floor * num_samples / n`; 0: every row draws `num_samples`.',
    SHARE,
  )
  batch_size: int = key(512, 'Number of images drawn at a time, over all devices.', POSITIVE)
  seed: int = key(1, 'Seed of the sampling noise, the same for every row.', NOT_NEGATIVE)
  samplers: tuple[str, ...] = key(
    ('ddim', 'ancestral'),
    'Samplers with which the base model is evaluated.',
    choices=SAMPLERS,
    distinct=True,
  )
  grid: str = key('uniform', "Spacing of the base model's sampling steps in t.", choices=times.GRIDS)
  max_steps: int = key(
    1024, 'Largest number of sampling steps; rows with more steps are left out.', POSITIVE
  )
  gamma: float = key(
    0.0,
    '`ancestral`: interpolates the variance of the noise from its lower bound (0) to its upper bound (1).',
    SHARE,
  )
  labels: str = key(
    'data',
    'Class labels of the samples of a conditional model: in the proportions of the training images, as the reference '
    'has them, or balanced.',
    choices=conditioning.LABELS,
  )
  clip_x: bool = key(True, 'Whether the predicted x is clipped to [-1, 1] at each sampling step.')
  guidance: tuple[float, ...] = key(
    (0.0,),
    'Weights W of classifier-free guidance with which the base model is evaluated; 0: none. Other software often states 1 + W. '
    'Weights above 0 need a base that was trained with `dataset.label_dropout`.',
    NOT_NEGATIVE,
    distinct=True,
  )
  guidance_interval: tuple[float, ...] = key(
    (),
    'Noise levels sigma / alpha, (low, high), between which the sampling steps of the base model are guided; empty: all.',
  )


@dataclasses.dataclass(frozen=True)
class Setting:
  """What one row measures: a model, sampler, number of steps and guidance. `updates` of the model is None if not known."""

  model: Model
  sampler: str
  num_steps: int
  updates: int | None = None
  guidance: Guidance = NONE


def rows(stages: list[Stage], config: Config) -> Iterator[tuple[int, str, str, int]]:
  """Yields what is measured: (index of the stage in the list, weights, sampler, number of steps).

  The first stage is measured with every sampler at the step counts of all stages, each student with its own sampler at its
  own step counts, and further moving averages of a stage likewise. Rows above `evaluation.max_steps` are left out.
  """
  counts = list(dict.fromkeys(steps for stage in stages for steps in stage.measured_steps))
  found = [(0, 'ema', sampler, steps) for steps in counts for sampler in config.evaluation.samplers]
  for place, stage in enumerate(stages):
    for weights in stage.weights[:-1]:
      if place or weights != 'ema':
        found += [(place, weights, stage.sampler, steps) for steps in stage.measured_steps]
  yield from (row for row in found if row[-1] <= config.evaluation.max_steps)


def guidances(config: Config, place: int) -> tuple[Guidance, ...]:
  """Returns the guidances to measure the stage at `place` with: the config's for the base, the first stage; else only NONE."""
  weights, interval = config.evaluation.guidance, config.evaluation.guidance_interval
  return (NONE,) if place else tuple(make_guidance(weight, interval) for weight in weights)


def evaluate(
  config: Config, models: list[Model], train: Loader, workdir: pathlib.Path, again: bool
) -> dict[str, Any]:
  """Measures all rows and writes `results.json` and `report/`. Finished rows survive an interruption.

  Args:
    config: the config of the run.
    models: the base and the models distilled from it, in order.
    train: the training split, which is the reference.
    workdir: the directory of the run.
    again: whether existing rows are measured again.

  Returns:
    The content of `results.json`.
  """
  began = time.monotonic()
  stages = [model.stage for model in models]
  labels = _labels(config, stages[0])
  extractor, real, results = _real(config, train, workdir, labels)
  results['seconds'] = {model.stage.name: model.seconds for model in models}
  results['stages'] = origins(stages, results['seconds'], workdir)
  counts = workdirs.count_labels(workdir, train.images) if labels == 'data' else ()
  path, partial = workdir / 'results.json', workdir / 'results.partial.json'
  known = {} if again else known_rows(path, extractor) | known_rows(partial, extractor)
  cluster.barrier()  # before the first process writes these files anew
  todo = [
    Setting(
      models[place].use(weights), sampler, num_steps, updates_done(workdir, models[place]), guidance
    )
    for place, weights, sampler, num_steps in rows(stages, config)
    for guidance in guidances(config, place)
  ]
  drawn: dict[tuple, np.ndarray] = {}
  steps = sum(s.num_steps for s in todo)
  size, floor = config.evaluation.num_samples, results['floor']['value']
  with Progress('evaluation', steps, images_per_step=size, line_seconds=config.log.seconds) as bar:
    for setting in todo:
      row = describe(config, setting)
      if (measured := known.get(key_of(row))) is not None:
        row |= measured
      else:
        row, images = measure_setting(config, setting, extractor, real.reference, floor, counts)
        drawn[_place(setting)] = images
      results['rows'].append(row)
      write_json(partial, results)
      guided = f' guidance {row["guidance"]:g}' if row['guidance'] else ''
      bar.note(f'{row["stage"]} {row["sampler"]} {row["num_steps"]}{guided}: {row["value"]:.3f}')
      bar.advance(setting.num_steps)
  record(results['rows'], models, workdir)
  results['seconds']['evaluation'] = time.monotonic() - began
  watched = {model.stage.name: _watched(workdir / model.stage.name) for model in models}
  shown = grid_rows(config, models, drawn, counts)
  if files.writes():
    report.write(config, results, shown, watched, workdir / 'report')
    write_json(partial, results)
    os.replace(partial, path)
  cluster.barrier()  # the others do not leave while the first process writes
  return results


def _real(
  config: Config, train: Loader, workdir: pathlib.Path, labels: str | None
) -> tuple[features.FeatureExtractor, Real, dict[str, Any]]:
  """Returns the extractor, the features of real images, and results without rows."""
  held_out, section = workdirs.open_images(config, 'eval'), config.evaluation
  extractor = features.load_or_train(workdir / 'extractor.safetensors', train, held_out)
  size, seed = section.num_samples, section.seed
  real = load_or_compute(workdir / 'features', extractor, train, held_out, size, seed)
  results = header(extractor, real, train, held_out, seed, labels)
  for loader, role in ((train, 'train'), (held_out, 'held_out')):
    loader.close()
    if broken := results['skipped'][role]:
      _log.warning('%d of %d images of %s were skipped', broken, len(loader), loader.images.name)
  return extractor, real, results


def describe(config: Config, setting: Setting) -> dict[str, Any]:
  """Returns a row without its measurements; rows with equal descriptions have equal measurements."""
  sampler, by, stage = make(config, setting.sampler), setting.guidance, setting.model.stage
  return {
    'stage': setting.model.stage.name,
    'weights': setting.model.weights,
    'method': setting.model.stage.method,
    'sampler': setting.sampler,
    'num_steps': setting.num_steps,
    'grid': 'uniform' if setting.model.stage.parent else config.evaluation.grid,
    'guidance': by.weight,
    'guidance_interval': by.interval,
    'nfe': by.calls(sampler, grid(config, stage, setting.num_steps), stage.schedule),
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
  }


def _labels(config: Config, stage: Stage) -> str | None:
  """Returns the distribution of the labels that a stage is sampled with; None for an unconditional stage."""
  return config.evaluation.labels if conditioning.classes(stage.denoise.conditioning) else None


def label_counts(config: Config, workdir: pathlib.Path) -> tuple[int, ...]:
  """Returns `label_counts` for `drawer`: images per class if samples should have the data's proportions of labels; else ()."""
  return workdirs.label_counts(workdir) if config.evaluation.labels == 'data' else ()


def _watched(stage_dir: pathlib.Path) -> report.Watched:
  """Returns what was logged about a stage during its training."""
  picture = stage_dir / 'denoisings.png'
  lines = logs.read(stage_dir / 'metrics.jsonl')
  return report.Watched(lines, picture.read_bytes() if picture.is_file() else None)


def make(config: Config, sampler: str) -> Sampler:
  """Returns a sampler with the settings of the section `evaluation`."""
  return make_sampler(sampler, config.evaluation.gamma)


def drawer(
  config: Config,
  stage: Stage,
  sampler: str,
  label_counts: tuple[int, ...] = (),
  guidance: Guidance = NONE,
) -> Drawer:
  """Returns a `Drawer` for a stage with the settings of `evaluation`; without `label_counts`, classes are drawn in turn."""
  return Drawer(
    denoise=stage.denoise,
    sampler=make(config, sampler),
    schedule=stage.schedule,
    space=stage.space,
    image_shape=stage.image_shape,
    batch_size=config.evaluation.batch_size,
    clip_x=config.evaluation.clip_x,
    label_counts=label_counts,
    guidance=guidance,
  )


def grid(config: Config, stage: Stage, num_steps: int) -> np.ndarray:
  """Returns the times of a row: the grid that a student was trained for, or the config's choice for the base."""
  name = 'uniform' if stage.parent else config.evaluation.grid
  return times.make_grid(name, num_steps, stage.schedule)


def measure_setting(
  config: Config,
  setting: Setting,
  extractor: features.FeatureExtractor,
  reference: Features,
  floor: float,
  label_counts: tuple[int, ...] = (),
) -> tuple[dict[str, Any], np.ndarray]:
  """Draws images and compares their features with the reference's; returns the row and its first images.

  The Frechet distance of n samples is too large by about the distance of n real images, which decreases as 1/n. The error is
  therefore estimated from `floor`, the distance of `evaluation.num_samples` real images, at every doubling of n.
  """
  size, tolerance = config.evaluation.num_samples, config.evaluation.tolerance
  running, due, first = RunningFeatures(size), 2, list[np.ndarray]()

  def then(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return extractor.of(images), images

  def is_enough(made: tuple[jax.Array, jax.Array], count: int) -> bool:
    nonlocal due
    found, images = made
    if running.seen < _SHOWN:
      first.append(sharding.to_host(images)[:count][: _SHOWN - running.seen])
    running.add(sharding.to_host(found)[:count])
    if not tolerance or running.seen < due:
      return False
    due = 2 * running.seen
    enough = floor * size / running.seen < tolerance * frechet(running.result(), reference)
    return bool(cluster.from_first(bool(enough)))  # processes may differ in the last bits

  model = setting.model
  by = grid(config, model.stage, setting.num_steps)
  draw = drawer(config, model.stage, setting.sampler, label_counts, setting.guidance)
  seconds = draw.seconds_per_image(model.params, by, size, config.evaluation.seed, then, is_enough)
  samples = running.result()
  values = {name: metric(samples, reference) for name, metric in METRICS.items()}
  row = describe(config, setting) | {
    'metric': f'FD-{extractor.name}',
    'value': values['frechet'],
    'metrics': values,
    'num_drawn': running.seen,
    'seconds_per_image': seconds,
  }
  return row, np.concatenate(first)


def _place(setting: Setting) -> tuple:
  """Returns a key that identifies the samples of a row within one evaluation."""
  model = setting.model
  return model.stage.name, model.weights, setting.sampler, setting.num_steps, setting.guidance


def grid_rows(
  config: Config,
  models: list[Model],
  drawn: Mapping[tuple, np.ndarray],
  label_counts: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
  """Returns images (_SHOWN, H, W, C) uint8 of each measured stage by caption, all from the same noise.

  The base is shown with the first of its guidance weights.

  Args:
    config: the config of the run.
    models: the models of the stages.
    drawn: the first images of newly measured rows; images of other rows are drawn.
    label_counts: see `drawer`.
  """
  shown = {}
  for place, model in enumerate(models):
    if (steps := model.stage.num_steps) > config.evaluation.max_steps:
      continue
    caption = f'{model.stage.name}\n{steps} step{"s" * (steps > 1)}'
    by = guidances(config, place)[0]
    setting = Setting(model, model.stage.sampler, steps, guidance=by)
    images = drawn.get(_place(setting))
    if images is None or len(images) < _SHOWN:
      draw = drawer(config, model.stage, setting.sampler, label_counts, by).draw
      images = draw(model.params, grid(config, model.stage, steps), _SHOWN, config.evaluation.seed)
    shown[caption] = images
  return shown
