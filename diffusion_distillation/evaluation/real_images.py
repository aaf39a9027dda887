"""The extractors of an evaluation, and the features of the real images that samples are compared with."""

import contextlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import dinov2, features, inception
from diffusion_distillation.evaluation.extracted import Extractors
from diffusion_distillation.evaluation.kept_features import Summary
from diffusion_distillation.evaluation.reference import (
  Real,
  describe_images,
  directory_of,
  from_file,
  load_or_compute,
)
from diffusion_distillation.evaluation.results import header
from diffusion_distillation.stages import workdir as workdirs

_log = logging.getLogger(__name__)


def open_extractors(config: Config, train: Loader, workdir: pathlib.Path) -> Extractors:
  """Returns the extractors of an evaluation; reads their weights, or trains the classifier of the dataset.

  Args:
    config: the config of the run.
    train: the training images.
    workdir: the directory of the run, for the classifier.
  """
  section = config.evaluation
  found = dinov2.load(section.dinov2) if section.dinov2 else None
  if section.inception:
    return Extractors(inception.load(section.inception), found)
  with contextlib.closing(workdirs.open_images(config, 'eval')) as held_out:
    classifier = features.load_or_train(workdir / 'extractor.safetensors', train, held_out)
  return Extractors(classifier, found)


def summarize(
  config: Config,
  extractors: Extractors,
  train: Loader,
  workdir: pathlib.Path,
  labels: str | None,
  num_samples: int | None = None,
  more: Sequence[Summary] = (),
) -> tuple[Real, dict[str, Any]]:
  """Returns the features of real images, and results without rows.

  Args:
    config: the config of the run.
    extractors: the feature extractors.
    train: the training images.
    workdir: the directory of the run, for the features.
    labels: see `header`.
    num_samples: number of images of the floor; None: `evaluation.num_samples`.
    more: further summaries of the features of the training images.
  """
  held_out, section = workdirs.open_images(config, 'eval'), config.evaluation
  extractor = extractors.main
  directory, seed = directory_of(workdir, extractor), section.seed
  size = num_samples or section.num_samples
  given = from_file(directory, extractor, train.images.image_shape, section.reference)
  floor = 'floor' if size == section.num_samples else f'floor_{size}'
  real = load_or_compute(directory, extractor, train, held_out, size, seed, given.features, floor, more)
  described = given.described or describe_images(train, real)
  if extractors.dinov2 is not None:
    directory = directory_of(workdir, extractors.dinov2)
    beside = load_or_compute(directory, extractors.dinov2, train, held_out, size, seed, None, floor)
    real = real.with_dinov2(beside)
  results = header(extractors, real, described, train, held_out, seed, labels)
  for loader, role in ((train, 'train'), (held_out, 'held_out')):
    loader.close()
    if broken := results['skipped'][role]:
      _log.warning('%d of %d images of %s were skipped', broken, len(loader), loader.images.name)
  for sentence in results['warnings'] if extractor.metric == 'FID' else ():
    _log.warning('%s', sentence)
  return real, results
