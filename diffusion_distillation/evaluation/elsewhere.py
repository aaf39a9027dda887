"""Measures images, or a model, that come from elsewhere against a dataset, with the metrics of a run.

The results stand in a file of their own; `results.json` of a workdir is neither read nor written.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from diffusion_distillation import datasets, paths
from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import Guidance, make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import given, prompted, real_captions, real_images, reference
from diffusion_distillation.evaluation.clip_score import BETTER, NAME, RunningScore
from diffusion_distillation.evaluation.extracted import Extractors
from diffusion_distillation.evaluation.given_images import GivenImages
from diffusion_distillation.evaluation.loading import LoadedModel, batch_size
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures
from diffusion_distillation.evaluation.prompted import Prompted
from diffusion_distillation.evaluation.reference import Real
from diffusion_distillation.evaluation.results import measured
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.guidance import check as check_guidance
from diffusion_distillation.networks.guidance import default_weight
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.stages.parts import make_sampler
from diffusion_distillation.system import sharding
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress


def check_out(given: str | os.PathLike[str] | None) -> pathlib.Path | None:
  """Checks `--out` before anything is computed; raises UserError unless it is a file that ends in .json."""
  if given is None:
    return None
  path = paths.on_disk('--out', given)
  if path.suffix.lower() != '.json' or path.is_dir():
    raise UserError(f'--out={os.fspath(given)}: name a file that ends in .json')
  if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(
      f'--out={os.fspath(given)}: {path.parent} is not a writable directory; make it first'
    )
  return path


def measure_images(
  config: Config,
  images: GivenImages,
  workdir: pathlib.Path | None,
  out: pathlib.Path | None,
  asked: Prompted | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
  """Measures given images and writes the results to a JSON file.

  Args:
    config: the config, which names the dataset and the reference.
    images: the images.
    workdir: the run whose extractor and cached features are used; None: these are computed and not kept.
    out: the file; None: `images_<digest of the images>.json` in the workdir.
    asked: the prompts of the images with a CLIP model; None: there is no CLIP score.

  Returns:
    The results, as `results.json` has them without rows, with the measurements at the top level; and the file.

  Raises:
    UserError: the images do not fit the extractor or the prompts, or there is neither workdir nor out.
  """
  if asked is not None:
    asked.check(len(images), images.source)
    prompted.check_texts(asked)
  score = None if asked is None else asked.running()
  if out is None and workdir is None:
    raise UserError(
      '--images needs --workdir, whose classifier and images it uses, or --config and --out=FILE.json'
    )
  with _place(config, workdir) as (config, train, directory):
    own_shape = None if config.evaluation.inception else train.images.image_shape
    given.check(images, own_shape, f'FD-{train.images.name}')
    extractors = real_images.open_extractors(config, train, directory)
    real, header = real_images.summarize(config, extractors, train, directory, None, len(images))
    also = None if score is None else score.add
    found, digest = given.features_of(extractors.main, images, train.images.image_shape, also)
    if extractors.dinov2 is not None:
      beside, _ = given.features_of(extractors.dinov2, images, train.images.image_shape)
      found = dataclasses.replace(found, dinov2=beside)
    of_texts = _of_texts(config, asked, train, directory, len(images))
  described = {'images': images.source.partition('=')[2], 'digest': digest, 'num_images': len(images)}
  if out is None:
    assert workdir is not None  # one of them is given
    out = workdir / f'images_{digest[:12]}.json'
  return _write(header, described | of_texts, found, real, out, score), out


def measure_model(
  config: Config,
  model: LoadedModel,
  folder: pathlib.Path,
  out: pathlib.Path | None,
  asked: Prompted | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
  """Measures the model in a folder with its own sampler and steps, and writes the results to a JSON file.

  Labels are drawn as `evaluation.labels` says, in the proportions that are stored with the model. A model of texts draws one
  image for each prompt; see `prompted.draw`. For guidance, see `guidance_of`.

  Args:
    config: the config, whose dataset the samples are compared with.
    model: the model.
    folder: where the model was read, for the results.
    out: the file.
    asked: what a model of texts draws.

  Raises:
    UserError: the model's images have another shape than the dataset's, or there is no out, or a model of texts has no prompts, or
      another model has; or see `guidance_of`.
  """
  if out is None:
    raise UserError(
      f'--workdir={folder} is the folder of a model, which stays as it is; name --out=FILE.json'
    )
  stored, section = model.stored, config.evaluation
  of_texts = conditioning.takes_text(stored.denoise.conditioning)
  if of_texts != (asked is not None):
    raise UserError(
      f'--workdir={folder}: '
      + (
        'this model draws what a text says; name evaluation.prompts=FILE'
        if of_texts
        else 'this model draws no texts; leave out evaluation.prompts and evaluation.clip'
      )
    )
  draw = drawer(config, model)
  if asked is not None:
    asked = asked.first(section.num_samples)
    prompted.check_texts(asked, stored, folder)
  with _place(config, None) as (config, train, directory):
    if asked is not None:
      prompted.check_shape(stored, train.images.image_shape, folder, config.dataset.name)
    elif stored.image_shape != train.images.image_shape:
      raise UserError(
        f'--workdir={folder} draws images of shape {stored.image_shape}, but dataset {config.dataset.name!r} has '
        f'{train.images.image_shape}; name the config of its dataset'
      )
    classes = conditioning.classes(stored.denoise.conditioning)
    labels = section.labels if classes else None
    if labels == 'data' and not sum(stored.label_counts):
      labels = 'balanced'
    extractors = real_images.open_extractors(config, train, directory)
    real, header = real_images.summarize(config, extractors, train, directory, labels)
    if asked is not None:
      shape = train.images.image_shape
      found, score = prompted.draw(draw, stored, section.seed, extractors, asked, shape)
    else:
      counts = stored.label_counts if labels == 'data' else ()
      draw = dataclasses.replace(draw, label_counts=counts)
      found, score = _draw(config, model, extractors, draw), None
    described = _of_texts(config, asked, train, directory, section.num_samples)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  described |= {
    'model': str(folder),
    'digest': stored.digest,
    'sampler': stored.sampler,
    'num_steps': stored.num_steps,
    'grid': stored.times,
    'guidance': draw.guidance.weight,
    'guidance_interval': draw.guidance.interval,
    'nfe': draw.calls(grid),
    'clip_x': stored.clip_x,
    'num_samples': section.num_samples,
    'seed': section.seed,
  }
  return _write(header, described, found, real, out, score), out


def _of_texts(
  config: Config, asked: Prompted | None, train: Loader, directory: pathlib.Path, count: int
) -> dict[str, Any]:
  """Returns what results say of the prompts of `count` images and of the CLIP model, with the score of real images."""
  if asked is None:
    return {}
  found = asked.describe()
  real_captions.add(found, asked.clip, train, directory, count, config.evaluation.seed)
  return found


def guidance_of(config: Config, stored: StoredModel) -> Guidance:
  """Returns the guidance of `evaluation.guidance` and its interval; the smallest weight for 0 if the model takes it as an input.

  Raises:
    UserError: there is not one weight, the model cannot be guided, the interval is not valid, or there is a guiding model.
  """
  section, conditions = config.evaluation, stored.denoise.conditioning
  if len(section.guidance) != 1:
    raise UserError(
      f'evaluation.guidance={tuple(section.guidance)}: the folder of a model is measured with one weight; name one, such as '
      '(6.5,), or (0.0,) for none'
    )
  if section.guiding_model:
    raise UserError(
      f'evaluation.guiding_model={section.guiding_model} does not apply to the folder of a model; leave it out'
    )
  try:
    found = make_guidance(section.guidance[0] or default_weight(conditions), section.guidance_interval)
  except ValueError as error:
    interval = tuple(section.guidance_interval)
    raise UserError(f'evaluation.guidance_interval={interval}: {error}') from error
  check_guidance('evaluation.guidance', found, conditions, stored.cond_dropout)
  return found


def drawer(config: Config, model: LoadedModel) -> Drawer:
  """Returns what draws a model's images with its own sampler; raises UserError, see `guidance_of`."""
  stored, section = model.stored, config.evaluation
  at_once = batch_size(stored, section.batch_size, section.num_samples)
  sampler = make_sampler(stored.sampler, section.gamma)
  return model.drawer(sampler, stored.clip_x, at_once, guidance_of(config, stored))


@contextlib.contextmanager
def _place(config: Config, workdir: pathlib.Path | None) -> Any:
  """Yields the config with which images are opened, the training images, and the directory for extractor and features.

  The directory is a locked workdir, or a temporary one.
  """
  reference.check(config)
  if config.dataset.name == datasets.NONE:
    raise UserError('--mode=evaluate needs images to compare with: dataset.name=none has none')
  if workdir is not None:
    config, train = workdirs.compared_images(config, workdirs.plan_for(workdir, config)[1])
    if train is None:
      raise UserError(
        f'--workdir={workdir}: dataset.name={config.dataset.name} has no images to compare with; leave out --workdir, and name '
        'a --config with images'
      )
    with workdirs.lock_workdir(workdir):
      yield config, train, workdir
    return
  if sharding.part()[1] > 1:
    raise UserError(
      '--mode=evaluate with several processes needs --workdir, a directory that they share'
    )
  with tempfile.TemporaryDirectory() as directory:
    yield config, workdirs.open_images(config, 'train'), pathlib.Path(directory)


def _draw(config: Config, model: LoadedModel, extractors: Extractors, draw: Drawer) -> Features:
  """Returns the features of samples of a model."""
  stored, section = model.stored, config.evaluation
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  running, size = RunningFeatures(section.num_samples), sharding.round_up(draw.batch_size)
  with Progress('evaluation', -(-section.num_samples // size), images_per_step=size) as progress:
    for images, count in draw.batches(stored.params, grid, section.num_samples, section.seed):
      running.take(extractors.of(images), slice(count))
      progress.advance()
  return running.result()


def _write(
  header: dict[str, Any],
  described: dict[str, Any],
  found: Features,
  real: Real,
  out: pathlib.Path,
  score: RunningScore | None,
) -> dict[str, Any]:
  """Returns and writes the results: what was measured and with which result, and what it was compared with."""
  rest = {key: value for key, value in header.items() if key != 'rows'}
  results = described | {'metric': rest.pop('metric')} | measured(found, real.reference, score)
  names = rest.pop('metrics') | ({} if score is None else {NAME: {'better': BETTER}})
  results |= {'better': {name: names[name]['better'] for name in results['metrics'] if name in names}}
  write_json(out, results | rest)
  return results | rest


def table(results: dict[str, Any]) -> str:
  """Returns the measurements beside those of the floor and of the held-out images, as lines of text."""
  held_out, floor = results['held_out'], results['floor']
  lines = [('metric', 'value', 'error', 'floor', f'{held_out["num_samples"]} held out', 'better')]
  for name, value in results['metrics'].items():
    error = results['errors'].get(name)
    beside = (found['metrics'].get(name) for found in (floor, held_out))
    lines.append(
      (
        results['metric'] if name == 'frechet' else name,
        f'{value:.4f}',
        '' if error is None else f'{error:.4f}',
        *('' if number is None else f'{number:.4f}' for number in beside),
        results['better'].get(name, ''),
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  told = [
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  ]
  if real := results.get('clip', {}).get('real_images'):
    told.append(
      f'clip_score of {real["num_images"]} training images with their own captions: {real["value"]:.4f}'
    )
  return '\n'.join(told)
