"""Features of the real images that samples are compared with, cached in the workdir between evaluations.

workdir/features/reference.safetensors  of all training images
workdir/features/held_out.safetensors   of those that are held out
workdir/features/floor.safetensors      of training images drawn with replacement
"""

import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import Moments
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.system import cluster, files
from diffusion_distillation.system.checkpoints import digest

_log = logging.getLogger(__name__)

FORMAT = 1  # of the files; to be raised where features are summed up in another way


class Real(NamedTuple):
  """Features of real images.

  Attributes:
    reference: of all training images, what samples are compared with.
    held_out: of images that nothing was trained on.
    floor: of as many training images as there are samples, drawn with replacement: what a sampler that repeats the training
      images would reach.
  """

  reference: Features
  held_out: Features
  floor: Features


def load_or_compute(
  directory: pathlib.Path,
  extractor: FeatureExtractor,
  train: Loader,
  held_out: Loader,
  size: int,
  seed: int,
) -> Real:
  """Features of the images, from the files in `directory` where these are of the same images and extractor.

  Args:
    directory: made if need be.
    extractor: of the features.
    train: the training images.
    held_out: those that are held out.
    size: number of images that the floor is drawn from the training images.
    seed: of that draw.
  """
  if files.writes():
    directory.mkdir(exist_ok=True)
  chosen = np.random.Generator(np.random.Philox(seed)).integers(len(train), size=size)

  def of(name: str, images: Loader, indices: np.ndarray | None = None, **drawn: int) -> Features:
    path, described = directory / f'{name}.safetensors', _describe(extractor, images) | drawn
    return _kept(path, described, lambda: extractor.summary(images, indices))

  return Real(
    reference=of('reference', train),
    held_out=of('held_out', held_out),
    floor=of('floor', train, chosen, size=size, seed=seed),
  )


def _describe(extractor: FeatureExtractor, images: Loader) -> dict[str, Any]:
  """Everything that the features depend on; the cache key."""
  return {
    'format': FORMAT,
    'extractor': extractor.digest,
    'images': images.images.identity,
    'image_shape': list(images.images.image_shape),
  }


def _kept(path: pathlib.Path, described: dict[str, Any], compute: Callable[[], Features]) -> Features:
  """The features in a file, if they are those described; else those that `compute` returns, which are written there."""
  found = _read(path, described)
  everywhere = cluster.agree(found is not None)
  if found is not None and everywhere:
    return found
  made = compute()
  if files.writes():
    arrays = {'mean': made.moments.mean, 'cov': made.moments.cov, 'some': made.some}
    meta = {'of': json.dumps(described), 'count': str(made.count), 'digest': digest(arrays)}
    temporary = path.with_suffix('.tmp')
    safetensors.numpy.save_file(arrays, temporary, meta)
    os.replace(temporary, path)
  return made


def _read(path: pathlib.Path, described: dict[str, Any]) -> Features | None:
  """The features in a file; None without one, or where it is of something else, or, with a warning, damaged."""
  if not path.is_file():
    return None
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      meta = file.metadata()
      arrays = {key: file.get_tensor(key) for key in ('mean', 'cov', 'some')}
    if json.loads(meta['of']) != described:
      return None
    if digest(arrays) != meta['digest']:
      raise ValueError('its digest differs')
    return Features(Moments(arrays['mean'], arrays['cov']), arrays['some'], int(meta['count']))
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
    _log.warning('%s is damaged (%s): its features are computed again', path, error)
    return None
