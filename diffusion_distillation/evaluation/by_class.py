"""Quality by class: whether the classifier recognizes the class that a sample was drawn for, and the distance within a class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation.extracted import Extracted, Extractor
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance
from diffusion_distillation.evaluation.kept_features import Arrays, Summary
from diffusion_distillation.evaluation.reference import dimension as dimension_of
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond, Conditioning

_MOST = 100  # classes; with more of them, rows only have the accuracy over all classes

Predict = Callable[[np.ndarray], np.ndarray]  # features (n, D) -> classes (n,)


class Reference(NamedTuple):
  """The training images' features, class by class.

  Attributes:
    counts: (K,), number of images of each class.
    mean, cov, root: mean (K, D), covariance and its root (K, D, D), zero for a class of fewer than two images.
  """

  counts: np.ndarray
  mean: np.ndarray
  cov: np.ndarray
  root: np.ndarray

  def of(self, label: int) -> Moments:
    """Returns the moments of one class."""
    return Moments.with_root(self.mean[label], self.cov[label], self.root[label])


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


class ByClass(Summary):
  """The training images' features by class; `result` is set by `load`.

  Args:
    number: number of classes.
    dimension: number of features.
  """

  name = 'by_class'

  def __init__(self, number: int, dimension: int) -> None:
    self._number, self._dimension = number, dimension
    self.result: Reference

  def begin(self, count: int) -> np.ndarray | None:
    del count
    self._tally = _Moments(self._number)
    return None

  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    del places
    assert labels is not None  # the images have classes
    self._tally.add(np.asarray(found.features), labels)

  def arrays(self) -> Arrays:
    shape = self._number, self._dimension
    mean, cov = np.zeros(shape), np.zeros((*shape, self._dimension))
    root = np.zeros_like(cov)
    for label in range(self._number):
      if self._tally.counts[label] > 1:
        moments = self._tally.of(label)
        mean[label], cov[label], root[label] = moments.mean, moments.cov, moments.root
    return {'counts': self._tally.counts, 'mean': mean, 'cov': cov, 'root': root}

  def load(self, arrays: Arrays) -> None:
    self.result = Reference(arrays['counts'], arrays['mean'], arrays['cov'], arrays['root'])


def summary(extractor: Extractor, train: Loader, num_samples: int) -> ByClass | None:
  """Returns the summary of the training images by class.

  Args:
    extractor: the map to features.
    train: the training images.
    num_samples: number of samples per row of conditional models; 0 if the models are unconditional.

  Returns:
    The summary; None if the images have no classes, or too many for `num_samples` samples to suffice for each.
  """
  number = len(train.images.classes)
  dimension = dimension_of(extractor, train.images.image_shape) if number else 0
  if not number or number > _MOST or not suffices(num_samples / number, dimension):
    return None
  return ByClass(number, dimension)


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
    """Adds the features (n, D) of samples.

    Of the conditioning that they were drawn with, only `label` (n,) is used, which is -1 where it is unknown.
    """
    number, labels = len(self._counts), (cond or {}).get('label')
    predicted = None if self._predict is None else self._predict(features)
    if predicted is not None:
      self._seen += np.bincount(predicted, minlength=number)
    if labels is None:
      return
    self._counts += np.bincount(labels[labels >= 0], minlength=number)
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
    reference, dimension = self._reference, self._reference.mean.shape[1]
    if label >= len(reference.counts):
      return None
    fewest = min(int(self._counts[label]), int(reference.counts[label]))
    if not suffices(fewest, dimension):
      return None
    return frechet_distance(reference.of(label), self._moments.of(label))  # whose root is known


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

  def tally(self, conditions: Conditioning) -> Tally:
    """Returns an empty tally for samples of a model with this conditioning."""
    own = conditioning.classes(conditions)
    return Tally(self.predict, max(self.number, own.count if own else 0), self.reference)


NO_CLASSES = Classes(None, 0, None)


def classes(extractor: Extractor, train: Loader, found: ByClass | None) -> Classes:
  """Returns what is known about the training images' classes; `found` is their `summary`, which has its result."""
  reference = None if found is None else found.result
  return Classes(predictor(extractor), len(train.images.classes), reference)
