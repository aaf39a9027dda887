"""Metrics that compare the features of samples with those of real images.

A metric is a function of two `Features`, of the samples and of the reference, which returns a number or an `Estimate`, or None
if there are too few features. METRICS lists all of them. Each is computed for every row of results.json, except where its
input is missing; the first one is the row's `value`, which the figures show.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from diffusion_distillation.evaluation import manifold
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance
from diffusion_distillation.evaluation.inception_score import RunningScore, inception_score
from diffusion_distillation.evaluation.kernel_distance import kernel_distance
from diffusion_distillation.evaluation.uncertainty import Estimate, error_and_bias
from diffusion_distillation.system import sharding

_KEPT = 10_000  # maximum number of individual features that are kept


@dataclasses.dataclass(frozen=True)
class Features:
  """The features of a set of images.

  Attributes:
    moments: moments of all features.
    some: (n, D) float32, individual features, those of `some_of`, at most _KEPT; None if only moments are known.
    count: number of images in the set; None if it is not known.
    posterior: sums over the class probabilities, see `RunningScore`; None if the extractor has no logits.
    spatial: the spatial features of the same images; None if the extractor has none.
    dinov2: the features that DINOv2 has of the same images, or None.
  """

  moments: Moments
  some: np.ndarray | None
  count: int | None
  posterior: np.ndarray | None = None
  spatial: 'Features | None' = None
  dinov2: 'Features | None' = None


def some_of(count: int, most: int) -> np.ndarray:
  """Returns at most `most` indices below `count`, ascending (n,): always the same, drawn at random.

  At even intervals, images whose labels are taken in turn would all be of a few classes.
  """
  rng = np.random.Generator(np.random.Philox(0))
  return np.sort(rng.choice(count, min(count, most), replace=False, shuffle=False))


class RunningFeatures:
  """Accumulates the features of at most `count` images from batches; `seen` is their number so far.

  The memory that this takes does not depend on `count`.
  """

  def __init__(self, count: int) -> None:
    self._moments, self._some, self.seen = RunningMoments(), list[np.ndarray](), 0
    self._count, self._kept = count, some_of(count, _KEPT)
    self._score: RunningScore | None = None
    self._others: dict[str, RunningFeatures] = {}  # spatial features, and those of DINOv2

  def add(
    self,
    features: np.ndarray,
    logits: np.ndarray | None = None,
    spatial: np.ndarray | None = None,
    dinov2: np.ndarray | None = None,
  ) -> None:
    """Adds a batch of features (n, D) and, where there are any, logits (n, K), spatial and DINOv2's features (n, S), (n, F)."""
    self._moments.add(features)
    first, end = np.searchsorted(self._kept, (self.seen, self.seen + len(features)))
    self._some.append(features[self._kept[first:end] - self.seen])  # not a view of all
    self.seen += len(features)
    if logits is not None:
      self._score = self._score or RunningScore()
      self._score.add(logits)
    for name, other in (('spatial', spatial), ('dinov2', dinov2)):
      if other is not None:
        self._others.setdefault(name, RunningFeatures(self._count)).add(other)

  def take(self, extracted: Extracted, chosen: np.ndarray | slice) -> None:
    """Adds the chosen images of a batch on the devices."""
    found: Extracted = sharding.to_host(extracted)
    features, *others = (None if x is None else np.asarray(x)[chosen] for x in found)
    assert features is not None
    self.add(features, *others)

  def result(self) -> Features:
    """Returns the features of all images; raises ValueError if there are fewer than two."""
    return Features(
      moments=self._moments.result(),
      some=np.concatenate(self._some),
      count=self.seen,
      posterior=None if self._score is None else self._score.result(),
      **{name: running.result() for name, running in self._others.items()},
    )


def frechet(samples: Features, reference: Features) -> float:
  """Returns the Frechet distance of two normal distributions with these moments; see `frechet.frechet_distance`.

  The distance is symmetric; the reference comes first because its root is the same for all samples.
  """
  return frechet_distance(reference.moments, samples.moments)


def frechet_estimate(samples: Features, reference: Features) -> Estimate:
  """Returns `frechet` with its standard error and bias as an estimate of the distance of the distributions."""
  value = frechet(samples, reference)
  if samples.some is None or len(samples.some) < 2 or samples.count is None:
    return Estimate(value)
  moments = samples.moments, samples.some, samples.count, reference.moments
  return Estimate(value, *error_and_bias(*moments))


def _of_individuals(
  metric: Callable[[np.ndarray, np.ndarray], 'float | Estimate | None'],
) -> 'Measure':
  """Returns a metric of `Features` that only needs the individual features (n, D) of both sets."""

  def measure(samples: Features, reference: Features) -> float | Estimate | None:
    assert (
      samples.some is not None and reference.some is not None
    )  # because the metric needs 'individual'
    return metric(samples.some, reference.some)

  return measure


def _inception_score(samples: Features, reference: Features) -> Estimate:
  del reference
  assert samples.posterior is not None  # because the metric needs 'classes'
  return inception_score(samples.posterior)


def _sfid(samples: Features, reference: Features) -> Estimate:
  assert (
    samples.spatial is not None and reference.spatial is not None
  )  # because the metric needs 'spatial'
  return frechet_estimate(samples.spatial, reference.spatial)


def _fd_dinov2(samples: Features, reference: Features) -> Estimate:
  assert samples.dinov2 is not None and reference.dinov2 is not None  # because the metric needs 'dinov2'
  return frechet_estimate(samples.dinov2, reference.dinov2)


Measure = Callable[[Features, Features], float | Estimate | None]

# What a metric can need beyond the moments of both sets.
_INPUTS: dict[str, Callable[[Features, Features], bool]] = {
  'individual': lambda samples, reference: samples.some is not None and reference.some is not None,
  'classes': lambda samples, reference: samples.posterior is not None,
  'spatial': lambda samples, reference: samples.spatial is not None and reference.spatial is not None,
  'dinov2': lambda samples, reference: samples.dinov2 is not None and reference.dinov2 is not None,
}


@dataclasses.dataclass(frozen=True)
class Metric:
  """An entry of METRICS.

  Attributes:
    measure: the function.
    better: 'lower' or 'higher', the direction of better samples.
    needs: inputs without which the metric is left out: 'individual' features of both sets, 'classes' (logits of the samples),
      or 'spatial' or 'dinov2' features of both sets.
  """

  measure: Measure
  better: str = 'lower'
  needs: tuple[str, ...] = ()

  def __call__(self, samples: Features, reference: Features) -> Estimate | None:
    """Returns the estimate; None if there are too few features."""
    found = self.measure(samples, reference)
    return found if found is None or isinstance(found, Estimate) else Estimate(float(found))

  def applies(self, samples: Features, reference: Features) -> bool:
    """Whether these features have all inputs of the metric."""
    return all(_INPUTS[name](samples, reference) for name in self.needs)


METRICS: dict[str, Metric | Measure] = {
  'frechet': Metric(frechet_estimate),
  'kid': Metric(_of_individuals(kernel_distance), needs=('individual',)),
  'precision': Metric(_of_individuals(manifold.precision), 'higher', ('individual',)),
  'recall': Metric(_of_individuals(manifold.recall), 'higher', ('individual',)),
  'inception_score': Metric(_inception_score, 'higher', ('classes',)),
  'sfid': Metric(_sfid, needs=('spatial',)),
  'fd_dinov2': Metric(_fd_dinov2, needs=('dinov2',)),
}


def entry(name: str) -> Metric:
  """Returns an entry of METRICS; a function that somebody entered by itself needs individual features, and lower is better."""
  found = METRICS[name]
  return found if isinstance(found, Metric) else Metric(found, needs=('individual',))


def measure_all(samples: Features, reference: Features) -> dict[str, Estimate]:
  """Returns the estimate of every metric in METRICS by name, without those whose inputs are missing."""
  found = {}
  for name in METRICS:
    metric = entry(name)
    estimate = metric(samples, reference) if metric.applies(samples, reference) else None
    if estimate is not None:
      found[name] = estimate
  return found
