"""Quality by class: whether the classifier recognizes the class that a sample was drawn for, and the distance within a class.

workdir/features/by_class.safetensors  moments of the training images' features, class by class
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation.extracted import Extractor
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance
from diffusion_distillation.evaluation.reference import dimension as dimension_of
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond, Conditioning
from diffusion_distillation.system import cluster, files, interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.progress import Progress

_BATCH = 500
_FORMAT = 1  # version of the file
_MOST = 100  # classes; with more of them, rows only have the accuracy over all classes


Predict = Callable[[np.ndarray], np.ndarray]  # features (n, D) -> classes (n,)


class Reference(NamedTuple):
  """The training images' features, class by class.

  Attributes:
    counts: (K,), number of images of each class.
    moments: mean (K, D) and covariance (K, D, D), zero for a class of fewer than two images.
  """

  counts: np.ndarray
  moments: Moments

  def of(self, label: int) -> Moments:
    """Returns the moments of one class."""
    return Moments(self.moments.mean[label], self.moments.cov[label])


def suffices(count: float, dimension: int) -> bool:
  """Whether a Frechet distance of `count` images is worth showing: their covariance has at least full rank, twice over."""
  return count >= 2 * dimension


def predictor(extractor: Extractor) -> Predict | None:
  """Returns the map from features (n, D) to the classes (n,) that the classifier sees; None if it tells no classes apart.

  The features are the inputs of the classifier's last layer, so the images are not needed.
  """
  if not isinstance(extractor, FeatureExtractor) or extractor.task != 'classes':
    return None
  kernel, bias = (np.asarray(extractor.params['logits'][name]) for name in ('kernel', 'bias'))
  return lambda features: np.argmax(features @ kernel + bias[None, :], axis=1)


def load_or_compute(
  directory: pathlib.Path, extractor: Extractor, train: Loader, num_samples: int
) -> Reference | None:
  """Returns the training images' features by class, from the file in `directory` or computed and written there.

  Args:
    directory: an existing directory.
    extractor: the map to features.
    train: the training images.
    num_samples: number of samples per row.

  Returns:
    The features; None if the images have no classes, or too many for `num_samples` samples to suffice for each.
  """
  number = len(train.images.classes)
  dimension = dimension_of(extractor, train.images.image_shape) if number else 0
  if not number or number > _MOST or not suffices(num_samples / number, dimension):
    return None
  path = directory / 'by_class.safetensors'
  described = {
    'format': _FORMAT,
    'extractor': extractor.digest,
    'images': train.images.identity,
    'image_shape': list(train.images.image_shape),
  }
  found = _read(path, described)
  if cluster.agree(found is not None):
    return found
  made = _compute(extractor, train, number, dimension)
  if files.writes():
    arrays = {'counts': made.counts, 'mean': made.moments.mean, 'cov': made.moments.cov}
    meta = {'of': json.dumps(described), 'digest': digest(arrays)}
    temporary = path.with_suffix('.tmp')
    safetensors.numpy.save_file(arrays, temporary, meta)
    os.replace(temporary, path)
  return made


def _compute(extractor: Extractor, train: Loader, number: int, dimension: int) -> Reference:
  tally = _Moments(number)
  size = sharding.round_up(_BATCH)
  batches, count = train.in_order(size), math.ceil(len(train) / size)
  with (
    contextlib.closing(batches),
    Progress('features by class', count, images_per_step=size) as progress,
  ):
    for batch in batches:
      interrupts.check()
      mask, labels = sharding.gather_batch((batch['mask'], batch['cond']['label']))
      if mask.any():
        features = sharding.to_host(extractor.of(sharding.put(batch['image'])).features)
        tally.add(features[mask], labels[mask])
      progress.advance()
  mean, cov = np.zeros((number, dimension)), np.zeros((number, dimension, dimension))
  for label in range(number):
    if tally.counts[label] > 1:
      moments = tally.of(label)
      mean[label], cov[label] = moments.mean, moments.cov
  return Reference(tally.counts, Moments(mean, cov))


def _read(path: pathlib.Path, described: dict[str, Any]) -> Reference | None:
  """Reads the file; returns None if it is missing, was made from something else, or is damaged, so that it is made again."""
  if not path.is_file():
    return None
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      meta = file.metadata()
      arrays = {key: file.get_tensor(key) for key in ('counts', 'mean', 'cov')}
    if json.loads(meta['of']) != described or digest(arrays) != meta['digest']:
      return None
    return Reference(arrays['counts'], Moments(arrays['mean'], arrays['cov']))
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError):
    return None


class _Moments:
  """Moments of features by class; `counts` (K,) is the number of examples of each class so far."""

  def __init__(self, number: int) -> None:
    self.counts = np.zeros(number, np.int64)
    self._of = [RunningMoments() for _ in range(number)]

  def add(self, features: np.ndarray, labels: np.ndarray) -> None:
    """Adds features (n, D) with labels (n,); those whose label is unknown (-1) are left out."""
    for label in np.unique(labels[labels >= 0]):
      here = labels == label
      self.counts[label] += int(here.sum())
      self._of[label].add(features[here])

  def of(self, label: int) -> Moments:
    """Returns the moments of a class; raises ValueError if there are fewer than two examples."""
    return self._of[label].result()


class Tally:
  """Accumulates what one row says about classes.

  Args:
    predict: see `predictor`.
    number: number of classes.
    reference: the training images by class, or None.
  """

  def __init__(self, predict: Predict | None, number: int, reference: Reference | None) -> None:
    self._predict, self._reference = predict, reference
    self._right = np.zeros(number)
    self._counts = np.zeros(number, np.int64)
    self._seen = np.zeros(number)
    self._moments = None if reference is None else _Moments(number)

  def add(self, features: np.ndarray, cond: Cond) -> None:
    """Adds the features (n, D) of samples, and the conditioning that they were drawn with, of which `label` (n,) is used."""
    number, labels = len(self._counts), (cond or {}).get('label')
    predicted = None if self._predict is None else self._predict(features)
    if predicted is not None:
      self._seen += np.bincount(predicted, minlength=number)
    if labels is None:
      return
    self._counts += np.bincount(labels, minlength=number)
    if predicted is not None:
      self._right += np.bincount(labels[predicted == labels], minlength=number)
    if self._moments is not None:
      self._moments.add(features, labels)

  def result(self) -> dict[str, Any]:
    """Returns the entries of a row: `class_accuracy`, and `by_class` with a list of one entry per class for each measure.

    `accuracy` is the share of the samples drawn for a class that the classifier assigns to it, `frechet` the Frechet distance
    to the training images of the class, where both are enough, and `count` the number of samples. An unconditional model has
    the `share` of all samples that the classifier assigns to a class. Entries that are not known are None, or left out.
    """
    found: dict[str, Any] = {}
    total, shown = int(self._counts.sum()), len(self._counts) <= _MOST
    if total:
      by_class: dict[str, Any] = {'count': self._counts.tolist()}
      if self._predict is not None:
        found['class_accuracy'] = float(self._right.sum() / total)
        pairs = zip(self._right, self._counts, strict=True)
        by_class['accuracy'] = [float(right / n) if n else None for right, n in pairs]
      distances = [self._distance(label) for label in range(len(self._counts))]
      if any(distance is not None for distance in distances):
        by_class['frechet'] = distances
      return found | ({'by_class': by_class} if shown and len(by_class) > 1 else {})
    if self._seen.sum() and shown:
      found['by_class'] = {'share': (self._seen / self._seen.sum()).tolist()}
    return found

  def _distance(self, label: int) -> float | None:
    if self._moments is None or self._reference is None:
      return None
    reference, dimension = self._reference, self._reference.moments.mean.shape[1]
    if label >= len(reference.counts):
      return None
    fewest = min(int(self._counts[label]), int(reference.counts[label]))
    if not suffices(fewest, dimension):
      return None
    return frechet_distance(self._moments.of(label), reference.of(label))


class Classes(NamedTuple):
  """What is known about the classes of the training images; see `Tally` for the attributes."""

  predict: Predict | None
  number: int
  reference: Reference | None

  def shares(self, features: np.ndarray | None) -> list[float] | None:
    """Returns the share of features (n, D) that the classifier assigns to each class; None if it tells none apart."""
    if features is None or self.predict is None or self.number > _MOST:
      return None
    counts = np.bincount(self.predict(features), minlength=self.number)
    return [float(n) for n in counts / len(features)]

  def tally(self, told: Conditioning) -> Tally:
    """Returns an empty tally for samples of a model with this conditioning."""
    own = conditioning.classes(told)
    return Tally(self.predict, max(self.number, own.count if own else 0), self.reference)


NO_CLASSES = Classes(None, 0, None)


def classes(directory: pathlib.Path, extractor: Extractor, train: Loader, num_samples: int) -> Classes:
  """Returns what is known about the training images' classes.

  Args:
    directory: directory of the features of real images; it exists.
    extractor: the map to features.
    train: the training images; closed afterwards.
    num_samples: number of samples per row of conditional models; 0 if the models are unconditional.
  """
  with contextlib.closing(train):
    reference = load_or_compute(directory, extractor, train, num_samples)
  return Classes(predictor(extractor), len(train.images.classes), reference)
