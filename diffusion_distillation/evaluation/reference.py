"""Features of the real images that samples are compared with, cached in the workdir between evaluations.

workdir/features/reference.safetensors  features of all training images
workdir/features/held_out.safetensors   features of the held-out images
workdir/features/floor.safetensors      features of training images drawn with replacement
workdir/features/by_class.safetensors   moments of the training images' features, class by class
workdir/features/searched.safetensors   features of the individual training images that the report searches
workdir/features/given.safetensors      features of the images in a file of reference statistics
workdir/features/NAME/                  the same for an extractor NAME other than the classifier of the dataset
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import given, given_images, kept_features, reference_files
from diffusion_distillation.evaluation.extracted import Extractor
from diffusion_distillation.evaluation.features import (
  DIMENSION,
  FeatureExtractor,
  batch_size,
)
from diffusion_distillation.evaluation.kept_features import OfAll, OfDraw, Summary
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures
from diffusion_distillation.evaluation.reference_files import StoredStatistics
from diffusion_distillation.networks.inception import NUM_FEATURES
from diffusion_distillation.system import cluster


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
  more: Sequence[Summary] = (),
) -> Real:
  """Returns the features of real images; reads files in `directory` that were made from the same images and extractor.

  Args:
    directory: directory of the files; created if necessary.
    extractor: the map to features.
    train: the training images.
    held_out: the held-out images.
    size: number of training images to draw for the floor.
    seed: seed of this draw.
    reference: the reference if it is not the training images.
    floor: name of the floor's file.
    more: further summaries of the training images, which are computed in the same pass.
  """
  of_train, unseen = OfAll('reference'), OfAll('held_out')
  drawn = OfDraw(floor, size, seed)
  summaries = [drawn, *more] if reference else [of_train, drawn, *more]
  kept_features.load_or_compute(directory, extractor, train, summaries)
  kept_features.load_or_compute(directory, extractor, held_out, [unseen])
  return Real(reference or of_train.result, unseen.result, drawn.result)


def of_training_images(directory: pathlib.Path, extractor: Extractor, train: Loader) -> Features:
  """Returns the features of all training images; see `load_or_compute`."""
  found = OfAll('reference')
  kept_features.load_or_compute(directory, extractor, train, [found])
  return found.result


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
  described: dict[str, Any] = {'file': file.name, 'digest': stored.digest, 'content': stored.content}
  if stored.features is not None:
    running = RunningFeatures(len(stored.features))
    running.add(stored.features.astype(np.float32))
    found = running.result()
  else:
    found = _of_statistics(directory, extractor, image_shape, path, stored)
  return Given(found, described | {'num_images': found.count})


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
    described = {
      'format': kept_features.FORMAT,
      'extractor': extractor.digest,
      'images': stored.digest,
    }
    arrays = kept_features.read(directory, 'given', described)
    if not cluster.agree(arrays is not None) or arrays is None:
      images = given_images.open_images(path, reference_files.KEY)
      found = given.features_of(extractor, images, image_shape)[0]
      arrays = kept_features.to_arrays(found, with_root=stored.moments is None)
      kept_features.write(directory, 'given', described, arrays)
    of_images = kept_features.from_arrays(arrays)
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
