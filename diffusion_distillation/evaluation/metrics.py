"""Metrics that compare the features of samples with those of real images.

A metric is a function `metric(samples, reference) -> float` of two `Features`; smaller is better. Every metric in METRICS is
computed for every row of results.json; the first one is the row's `value`, which the figures show.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance

_KEPT = 10_000  # maximum number of individual features that are kept


@dataclasses.dataclass(frozen=True)
class Features:
  """The features of a set of images.

  Attributes:
    moments: moments of all features.
    some: (n, D) float32, individual features at even intervals over the set, at most _KEPT.
    count: number of images in the set.
  """

  moments: Moments
  some: np.ndarray
  count: int


class RunningFeatures:
  """Accumulates the features of at most `count` images from batches; `seen` is their number so far."""

  def __init__(self, count: int) -> None:
    self._moments, self._some, self.seen = RunningMoments(), list[np.ndarray](), 0
    self._stride = math.ceil(count / _KEPT)

  def add(self, features: np.ndarray) -> None:
    """Adds a batch (n, D)."""
    self._moments.add(features)
    self._some.append(features[-self.seen % self._stride :: self._stride])
    self.seen += len(features)

  def result(self) -> Features:
    """Returns the features of all images; raises ValueError if there are fewer than two."""
    moments = self._moments.result()
    return Features(moments, np.concatenate(self._some), self.seen)


def frechet(samples: Features, reference: Features) -> float:
  """Returns the Frechet distance of two normal distributions with these moments; see `frechet.frechet_distance`."""
  return frechet_distance(samples.moments, reference.moments)


METRICS: dict[str, Callable[[Features, Features], float]] = {'frechet': frechet}
