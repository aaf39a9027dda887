"""Measuring every stage: students at their own step count, the undistilled base at each of them."""

import dataclasses
import importlib.metadata
import logging
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffusion_distillation.config import AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, SHARE, Config, key
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import SAMPLERS, Sampler
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation import features, report
from diffusion_distillation.evaluation.metrics import METRICS, Features, RunningFeatures, frechet
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.stages.model import add_metrics
from diffusion_distillation.stages.parts import make_sampler
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.workdir import open_images
from diffusion_distillation.system import cluster, files, logs
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scikit-learn')


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
  clip_x: bool = key(True, 'Whether the predicted x is clipped to [-1, 1] at each sampling step.')


@dataclasses.dataclass(frozen=True)
class Setting:
  """One row to be: a model, a sampler, a number of steps."""

  model: Model
  sampler: str
  num_steps: int


def rows(stages: list[Stage], config: Config) -> Iterator[tuple[int, str, str, int]]:
  """What is measured: (place of the stage in the list, weights, sampler, number of steps).

  The first stage under every sampler at every stage's step counts, each student under its own at its own, and all
  of them there with their further moving averages; not beyond `evaluation.max_steps`.
  """
  counts = list(dict.fromkeys(steps for stage in stages for steps in stage.measured_steps))
  found = [(0, 'ema', sampler, steps) for steps in counts for sampler in config.evaluation.samplers]
  for place, stage in enumerate(stages):
    for weights in stage.weights[:-1]:
      if place or weights != 'ema':
        found += [(place, weights, stage.sampler, steps) for steps in stage.measured_steps]
  yield from (row for row in found if row[-1] <= config.evaluation.max_steps)


def evaluate(
  config: Config, models: list[Model], train: Loader, workdir: pathlib.Path, again: bool
) -> dict[str, Any]:
  """Writes `results.json`, a row at a time, and `report/`.

  Args:
    config: of the run.
    models: the base and what was distilled from it, in order.
    train: the training split: the reference.
    workdir: where the stages are.
    again: whether rows that are there already are measured again.

  Returns:
    What `results.json` holds.
  """
  began = time.monotonic()
  held_out = open_images(config, 'eval')
  extractor = features.load_or_train(workdir / 'extractor.safetensors', train, held_out)
  reference = extractor.summary(train)
  results = _header(config, extractor, train, held_out, reference, models)
  results['stages'] = _origins([model.stage for model in models], results['seconds'], workdir)
  for loader in (train, held_out):
    loader.close()
    if loader.skipped:
      _log.warning(
        '%d of %d images of %s were skipped', len(loader.skipped), len(loader), loader.images.name
      )
  path, partial = workdir / 'results.json', workdir / 'results.partial.json'
  known = {} if again else _known_rows(path, extractor) | _known_rows(partial, extractor)
  cluster.barrier()  # before the first process writes these files anew
  todo = [
    Setting(models[place].use(weights), sampler, num_steps)
    for place, weights, sampler, num_steps in rows([model.stage for model in models], config)
  ]
  steps = sum(s.num_steps for s in todo)
  size, floor = config.evaluation.num_samples, results['floor']['value']
  with Progress('evaluation', steps, images_per_step=size, line_seconds=config.log.seconds) as bar:
    for setting in todo:
      key = _key(_describe(config, setting))
      row = known.get(key) or measure_setting(config, setting, extractor, reference, floor)
      results['rows'].append(row)
      write_json(partial, results)
      bar.note(f'{row["stage"]} {row["sampler"]} {row["num_steps"]}: {row["value"]:.3f}')
      bar.advance(setting.num_steps)
  _record(results['rows'], models, workdir)
  results['seconds']['evaluation'] = time.monotonic() - began
  watched = {model.stage.name: _watched(workdir / model.stage.name) for model in models}
  drawn = grid_rows(config, models)
  if files.writes():
    report.write(config, results, drawn, watched, workdir / 'report')
    write_json(partial, results)
    os.replace(partial, path)
  cluster.barrier()  # the others do not leave while the first one writes
  return results


def _record(rows: list[dict[str, Any]], models: list[Model], workdir: pathlib.Path) -> None:
  """Writes the rows of each model into its folder."""
  for m in models:
    own = [row for row in rows if row['stage'] == m.stage.name and row['digest'] == m.digest]
    add_metrics(workdir / m.stage.name / 'model', own)


def _header(
  config: Config,
  extractor: features.FeatureExtractor,
  train: Loader,
  held_out: Loader,
  reference: Features,
  models: list[Model],
) -> dict[str, Any]:
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    'rows': [],
    'metric': f'FD-{extractor.name}',
    'floor': _floor(config, extractor, train, reference),
    'held_out': {
      'value': frechet(extractor.summary(held_out), reference),
      'num_samples': len(held_out) - len(held_out.skipped),
    },
    'extractor': {
      'name': extractor.name,
      'digest': extractor.digest,
      'task': extractor.task,
      'held_out_accuracy': extractor.accuracy,
    },
    'reference': {'split': 'train', 'num_images': len(train) - len(train.skipped)},
    'skipped': {'train': len(train.skipped), 'held_out': len(held_out.skipped)},
    'versions': {'python': platform.python_version(), **versions},
    'seconds': {model.stage.name: model.seconds for model in models},
  }


def _origins(
  stages: list[Stage], seconds: dict[str, float], workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """What each stage comes from, and the seconds of training from the first one's model to its own.

  Those are its own, those of its teacher and of the stage that it starts from, and of drawing the pairs that it
  learns from; each counted once, the first stage not at all.
  """
  path = workdir / 'pairs' / 'pairs.json'
  drawing = read_json(path)['seconds'] if path.is_file() else 0.0
  found: dict[str, dict[str, Any]] = {}
  needs: dict[str, set[str]] = {}
  for stage in stages:
    own = {stage.name} if stage.parent else set()
    from_pairs = {'pairs'} if stage.pairs else set()
    before = [needs.get(name or '', set()) for name in (stage.parent, stage.start)]
    needs[stage.name] = own | from_pairs | set().union(*before)
    cost = sum(drawing if name == 'pairs' else seconds[name] for name in needs[stage.name])
    start = None if stage.starts_anew else stage.start or stage.parent
    origin = {'method': stage.method, 'parent': stage.parent, 'start': start}
    found[stage.name] = origin | {'cost': cost}
  return found


def _watched(stage_dir: pathlib.Path) -> report.Watched:
  """What was seen of a stage's health while it was trained."""
  picture = stage_dir / 'denoisings.png'
  lines = logs.read(stage_dir / 'metrics.jsonl')
  return report.Watched(lines, picture.read_bytes() if picture.is_file() else None)


def _floor(
  config: Config, extractor: features.FeatureExtractor, train: Loader, reference: Features
) -> dict[str, Any]:
  """Real against real at the same size: training images drawn with replacement, against all of them.

  What a sampler that repeats the training images would reach; unseen real images are `held_out`.
  """
  size = config.evaluation.num_samples
  chosen = np.random.Generator(np.random.Philox(config.evaluation.seed)).integers(len(train), size=size)
  value = frechet(extractor.summary(train, chosen), reference)
  broken = int(np.isin(chosen, list(train.skipped)).sum())
  return {'value': value, 'num_samples': size - broken, 'seed': config.evaluation.seed}


def _describe(config: Config, setting: Setting) -> dict[str, Any]:
  """A row, but for what is measured: equal descriptions are equal measurements."""
  sampler = make(config, setting.sampler)
  return {
    'stage': setting.model.stage.name,
    'weights': setting.model.weights,
    'method': setting.model.stage.method,
    'sampler': setting.sampler,
    'num_steps': setting.num_steps,
    'grid': 'uniform' if setting.model.stage.parent else config.evaluation.grid,
    'nfe': sampler.calls(setting.num_steps),
    'num_samples': config.evaluation.num_samples,
    'tolerance': config.evaluation.tolerance,
    'seed': config.evaluation.seed,
    'clip_x': config.evaluation.clip_x,
    **dataclasses.asdict(sampler),
    'batch_size': config.evaluation.batch_size,
    'updates': setting.model.step,
    'digest': setting.model.digest,
  }


_MEASURED = ('metric', 'value', 'metrics', 'num_drawn', 'seconds_per_image')


def _key(row: dict[str, Any]) -> tuple:
  return tuple(sorted((k, v) for k, v in row.items() if k not in _MEASURED))


def _known_rows(path: pathlib.Path, extractor: features.FeatureExtractor) -> dict[tuple, dict[str, Any]]:
  """Rows measured before with the same extractor, by key; none, with a warning, from a damaged file."""
  if not path.exists():
    return {}
  try:
    old = read_json(path)
    same = old['extractor']['digest'] == extractor.digest
    return {_key(row): row for row in old['rows'] if _is_whole(row)} if same else {}
  except (DamagedError, KeyError, TypeError, AttributeError) as error:
    _log.warning('%s is damaged (%r): its rows are measured again', path, error)
    return {}


def _is_whole(row: dict[str, Any]) -> bool:
  """Whether a row has a value of every metric; before there were several it had the Frechet distance alone."""
  known = row.get('metrics', {'frechet': row['value']})
  return bool(row['value'] >= 0.0) and METRICS.keys() <= known.keys()


def make(config: Config, sampler: str) -> Sampler:
  """A sampler as the config's evaluation has it."""
  return make_sampler(sampler, config.evaluation.gamma)


def drawer(config: Config, stage: Stage, sampler: str) -> Drawer:
  """Draws from a stage as the config's evaluation says."""
  return Drawer(
    denoise=stage.denoise,
    sampler=make(config, sampler),
    schedule=stage.schedule,
    space=stage.space,
    image_shape=stage.image_shape,
    batch_size=config.evaluation.batch_size,
    clip_x=config.evaluation.clip_x,
  )


def grid(config: Config, setting: Setting) -> np.ndarray:
  """The times of a row: those that a student was made for; the config's choice for the base."""
  stage = setting.model.stage
  name = 'uniform' if stage.parent else config.evaluation.grid
  return times.make_grid(name, setting.num_steps, stage.schedule)


def measure_setting(
  config: Config,
  setting: Setting,
  extractor: features.FeatureExtractor,
  reference: Features,
  floor: float,
) -> dict[str, Any]:
  """One row: draws images and compares their features with the reference's.

  The Frechet distance of n samples is too large by about as much as that of n real images, which falls as 1/n: from
  `floor`, that of `evaluation.num_samples` real images, the error of fewer is known, and compared at every doubling of n.
  """
  size, tolerance = config.evaluation.num_samples, config.evaluation.tolerance
  running, due = RunningFeatures(size), 1

  def is_enough(images: np.ndarray) -> bool:
    nonlocal due
    running.add(extractor(images))
    if not tolerance or running.seen < due:
      return False
    due = 2 * running.seen
    return floor * size / running.seen < tolerance * frechet(running.result(), reference)

  model, by = setting.model, grid(config, setting)
  draw = drawer(config, model.stage, setting.sampler)
  seconds = draw.seconds_per_image(model.params, by, size, config.evaluation.seed, is_enough)
  samples = running.result()
  values = {name: metric(samples, reference) for name, metric in METRICS.items()}
  return _describe(config, setting) | {
    'metric': f'FD-{extractor.name}',
    'value': values['frechet'],
    'metrics': values,
    'num_drawn': running.seen,
    'seconds_per_image': seconds,
  }


def grid_rows(config: Config, models: list[Model], columns: int = 16) -> dict[str, np.ndarray]:
  """(columns, H, W, C) uint8 images a stage that is measured, all from the same noise, by caption."""
  drawn = {}
  for model in models:
    if (steps := model.stage.num_steps) > config.evaluation.max_steps:
      continue
    caption = f'{model.stage.name}\n{steps} step{"s" * (steps > 1)}'
    draw = drawer(config, model.stage, model.stage.sampler).draw
    by = grid(config, Setting(model, model.stage.sampler, steps))
    drawn[caption] = draw(model.params, by, columns, config.evaluation.seed)
  return drawn
