"""Features of the real images that samples are compared with, cached in the workdir between evaluations.

workdir/features/reference.safetensors  features of all training images
workdir/features/held_out.safetensors   features of the held-out images
workdir/features/floor.safetensors      features of training images drawn with replacement
workdir/features/given.safetensors      features of the images in a file of reference statistics
workdir/features/NAME/                  the same for an extractor NAME other than the classifier of the dataset
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import given, given_images, reference_files
from diffusion_distillation.evaluation.extracted import Extractor
from diffusion_distillation.evaluation.features import (
  DIMENSION,
  FeatureExtractor,
  batch_size,
  summary,
)
from diffusion_distillation.evaluation.frechet import Moments
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures
from diffusion_distillation.evaluation.reference_files import StoredStatistics
from diffusion_distillation.networks.inception import NUM_FEATURES
from diffusion_distillation.system import cluster, files
from diffusion_distillation.system.checkpoints import digest

_log = logging.getLogger(__name__)

FORMAT = 2  # version of the files; increase it when features are summarized in another way


def directory_of(workdir: pathlib.Path, extractor: Extractor) -> pathlib.Path:
  """Returns the directory of an extractor's features.

  The gate and measurements during training always use the classifier. If `evaluation.inception` shared its directory, each
  would replace the features of the other, and compute its own again.
  """
  directory = workdir / 'features'
  return directory if isinstance(extractor, FeatureExtractor) else directory / extractor.name


class Real(NamedTuple):
  """Features of real images.

  Attributes:
    reference: features of all training images, which samples are compared with.
    held_out: features of the held-out images, which are not used for training.
    floor: features of as many training images as there are samples, drawn with replacement, like the samples of a perfect
      model that repeats the training images.
  """

  reference: Features
  held_out: Features
  floor: Features

  def with_dinov2(self, found: 'Real') -> 'Real':
    """Returns these features with those that DINOv2 has of the same images beside them."""
    return Real(*(dataclasses.replace(a, dinov2=b) for a, b in zip(self, found, strict=True)))


def load_or_compute(
  directory: pathlib.Path,
  extractor: Extractor,
  train: Loader,
  held_out: Loader,
  size: int,
  seed: int,
  reference: Features | None = None,
  floor: str = 'floor',
) -> Real:
  """Returns the features of real images; reads files in `directory` that were made from the same images and extractor.

  Args:
    directory: directory of the files; created if necessary.
    extractor: the feature extractor.
    train: the training images.
    held_out: the held-out images.
    size: number of training images to draw for the floor.
    seed: seed of this draw.
    reference: the reference if it is not the training images.
    floor: name of the floor's file.
  """
  chosen = np.random.Generator(np.random.Philox(seed)).integers(len(train), size=size)

  def of(name: str, images: Loader, indices: np.ndarray | None = None, **drawn: int) -> Features:
    path, described = directory / f'{name}.safetensors', _describe(extractor, images) | drawn
    return _kept(path, described, lambda: summary(extractor, images, indices))

  return Real(
    reference=reference or of('reference', train),
    held_out=of('held_out', held_out),
    floor=of(floor, train, chosen, size=size, seed=seed),
  )


class Given(NamedTuple):
  """A reference from a file: its features, and what `results.json` says of it. Both are None without a file."""

  features: Features | None
  described: dict[str, Any] | None


def from_file(
  directory: pathlib.Path, extractor: Extractor, image_shape: tuple[int, ...], path: str
) -> Given:
  """Returns the features that a file of reference statistics describes; nothing for the path ''.

  Features of images in the file are cached in `directory`.

  Raises:
    UserError: see `reference_files.read`, or the statistics are of other features than the extractor's.
  """
  if not path:
    return Given(None, None)
  file = pathlib.Path(path)
  stored = reference_files.read(file)
  reference_files.check_dimension(file, stored, extractor.metric, dimension(extractor, image_shape))
  told: dict[str, Any] = {'file': file.name, 'digest': stored.digest, 'content': stored.content}
  if stored.features is not None:
    running = RunningFeatures(len(stored.features))
    running.add(stored.features.astype(np.float32))
    found = running.result()
  else:
    found = _of_statistics(directory, extractor, image_shape, path, stored)
  return Given(found, told | {'num_images': found.count})


def check(config: Config) -> None:
  """Raises UserError unless `evaluation.reference`, if it is set, is a file of statistics of the extractor's features."""
  if path := config.evaluation.reference:
    file, found = pathlib.Path(path), reference_files.read(pathlib.Path(path))
    by_inception = bool(config.evaluation.inception)
    metric = 'FID' if by_inception else f'FD-{config.dataset.name}'
    number = NUM_FEATURES if by_inception else DIMENSION
    reference_files.check_dimension(file, found, metric, number)


def _of_statistics(
  directory: pathlib.Path,
  extractor: Extractor,
  image_shape: tuple[int, ...],
  path: str,
  stored: StoredStatistics,
) -> Features:
  """Returns the features of a file with moments, with images, or both."""
  some = None
  if stored.has_images:
    described = {'format': FORMAT, 'extractor': extractor.digest, 'images': stored.digest}

    def compute() -> Features:
      images = given_images.open_images(path, reference_files.KEY)
      return given.features_of(extractor, images, image_shape)[0]

    of_images = _kept(directory / 'given.safetensors', described, compute)
    if stored.moments is None:
      return of_images
    some = of_images.some
  assert stored.moments is not None  # `read` has found moments or images
  spatial = None if stored.spatial is None else Features(stored.spatial, None, None)
  return Features(stored.moments, some, None, spatial=spatial)


def dimension(extractor: Extractor, image_shape: tuple[int, ...]) -> int:
  """Returns the number of features that an extractor computes of an image (H, W, C)."""
  if (known := getattr(extractor, 'dimension', None)) is not None:
    return int(known)
  images = jax.ShapeDtypeStruct((batch_size(), *image_shape), jnp.uint8)
  return int(jax.eval_shape(extractor.of, images).features.shape[1])


def describe_images(train: Loader, real: Real) -> dict[str, Any]:
  """Returns what `results.json` says of a reference that is the training images."""
  images = train.images
  return {
    'split': 'train',
    'name': images.name,
    'digest': images.identity,
    'num_images': real.reference.count,
  }


def _describe(extractor: Extractor, images: Loader) -> dict[str, Any]:
  """Returns the cache key: everything that the features depend on."""
  return {
    'format': FORMAT,
    'extractor': extractor.digest,
    'images': images.images.identity,
    'image_shape': list(images.images.image_shape),
  }


def _kept(path: pathlib.Path, described: dict[str, Any], compute: Callable[[], Features]) -> Features:
  """Returns the features in a file if they match the description; otherwise computes them and writes the file."""
  found = _read(path, described)
  everywhere = cluster.agree(found is not None)
  if found is not None and everywhere:
    return found
  made = compute()
  if files.writes():
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = _arrays(made)
    meta = {'of': json.dumps(described), 'count': str(made.count), 'digest': digest(arrays)}
    temporary = path.with_suffix('.tmp')
    safetensors.numpy.save_file(arrays, temporary, meta)
    os.replace(temporary, path)
  return made


def _read(path: pathlib.Path, described: dict[str, Any]) -> Features | None:
  """Reads the features in a file; returns None if it is missing, does not match, or is damaged, which is logged."""
  if not path.is_file():
    return None
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      meta = file.metadata()
      arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if json.loads(meta['of']) != described:
      return None
    if digest(arrays) != meta['digest']:
      raise ValueError('its digest differs')
    return _features(arrays, int(meta['count']))
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
    _log.warning('%s is damaged (%s); computing its features again', path, error)
    return None


def _arrays(features: Features, prefix: str = '') -> dict[str, np.ndarray]:
  """Returns the arrays of features by name; those of the spatial features begin with 'spatial_'."""
  found = {'mean': features.moments.mean, 'cov': features.moments.cov}
  found |= {} if features.some is None else {'some': features.some}
  found |= {} if features.posterior is None else {'posterior': features.posterior}
  found = {prefix + key: array for key, array in found.items()}
  return found | ({} if features.spatial is None else _arrays(features.spatial, 'spatial_'))


def _features(arrays: dict[str, np.ndarray], count: int, prefix: str = '') -> Features:
  """The inverse of `_arrays`; raises KeyError if there are no moments."""
  spatial = None if prefix or 'spatial_mean' not in arrays else _features(arrays, count, 'spatial_')
  return Features(
    Moments(arrays[prefix + 'mean'], arrays[prefix + 'cov']),
    arrays.get(prefix + 'some'),
    count,
    arrays.get(prefix + 'posterior'),
    spatial,
  )
