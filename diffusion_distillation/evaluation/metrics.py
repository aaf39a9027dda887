"""Metrics: how far samples are from real images, by the features of both.

A metric is `metric(samples, reference) -> float` on two `Features`; smaller is better. Every metric in METRICS is
computed for every row of results.json; the first one is the row's `value`, and what the figures show.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance

_KEPT = 10_000  # features that are kept one by one, of sets that have more


@dataclasses.dataclass(frozen=True)
class Features:
  """The features of a set of images.

  Attributes:
    moments: of all of them.
    some: (n, D) float32, spread evenly over the set: all of them, or about _KEPT.
    count: images in the set.
  """

  moments: Moments
  some: np.ndarray
  count: int


class RunningFeatures:
  """Features of a set of at most `count` images that arrive in batches; `seen` of them so far."""

  def __init__(self, count: int) -> None:
    self._moments, self._some, self.seen = RunningMoments(), list[np.ndarray](), 0
    self._stride = math.ceil(count / _KEPT)

  def add(self, features: np.ndarray) -> None:
    """Takes a batch (n, D)."""
    self._moments.add(features)
    self._some.append(features[-self.seen % self._stride :: self._stride])
    self.seen += len(features)

  def result(self) -> Features:
    """Of all that was added; raises ValueError with fewer than two examples."""
    moments = self._moments.result()
    return Features(moments, np.concatenate(self._some), self.seen)


def frechet(samples: Features, reference: Features) -> float:
  """The Frechet distance of two normal distributions with these moments; see `frechet.frechet_distance`."""
  return frechet_distance(samples.moments, reference.moments)


METRICS: dict[str, Callable[[Features, Features], float]] = {'frechet': frechet}
