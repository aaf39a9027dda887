"""The Frechet distance between two sets of features, computed from their first two moments."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean (D,) and covariance (D, D) of a set of features, in float64."""

  mean: np.ndarray
  cov: np.ndarray

  @functools.cached_property
  def root(self) -> np.ndarray:
    """The symmetric root of the covariance, (D, D)."""
    values, vectors = np.linalg.eigh(self.cov)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))[None, :]) @ vectors.T
    return root

  @classmethod
  def with_root(cls, mean: np.ndarray, cov: np.ndarray, root: np.ndarray | None) -> 'Moments':
    """Returns moments whose root is known; None: it is computed when it is needed."""
    found = cls(mean, cov)
    if root is not None:
      found.__dict__['root'] = root  # where `cached_property` looks for it
    return found


class RunningMoments:
  """Accumulates the moments of batches of features, as float64 sums about the mean of the first batch."""

  def __init__(self) -> None:
    self._count = 0
    self._shift = np.zeros(())
    self._sum = np.zeros(())
    self._outer = np.zeros(())

  def add(self, features: np.ndarray) -> None:
    """Adds a batch (n, D)."""
    features = np.asarray(features, np.float64)
    if self._count == 0:
      self._shift = features.mean(axis=0)
    centred = features - self._shift[None, :]
    self._count += len(features)
    self._sum = self._sum + centred.sum(axis=0)
    self._outer = self._outer + centred.T @ centred

  def result(self) -> Moments:
    """Returns the moments of all examples; raises ValueError if there are fewer than two."""
    if self._count < 2:
      raise ValueError(f'a covariance needs at least 2 examples, got {self._count}')
    mean = self._sum / self._count
    cov = (self._outer - self._count * np.outer(mean, mean)) / (self._count - 1)
    return Moments(self._shift + mean, cov)


def frechet_distance(a: Moments, b: Moments) -> float:
  """Returns |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6).

  The trace of the root is computed as tr (C_a^(1/2) C_b C_a^(1/2))^(1/2), whose argument is symmetric and positive
  semidefinite: this takes two eigendecompositions, no complex numbers, and allows singular covariances. Other implementations
  take the root of the product C_a C_b itself, and add 1e-6 I to both where that fails, which changes the value; nothing is
  added here.
  """
  product = a.root @ b.cov @ a.root
  roots = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2.0), 0.0))
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * roots.sum()
  return float(max(distance, 0.0))
