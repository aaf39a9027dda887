"""Precision and recall of samples, from estimates of the supports of two distributions (Kynkäänniemi et al. 2019).

The support of a distribution is estimated by the union of balls about its features, each of which reaches to the k-th nearest
other feature (Eq. 1). Precision is the share of samples in the support of the real images, recall the share of real images
in the support of the samples (Eq. 2 and 3). Both sets have the same size, as in the paper: of the larger one, a random choice
is used.
"""

from collections.abc import Iterator

import numpy as np

NEAREST = 3  # k of the paper
_BLOCK = 1000  # number of features whose distances to all others are in memory at a time
_ROUNDING = 1e-6  # relative rounding error of a squared distance in float32, so that equal features are at distance 0


def precision(samples: np.ndarray, reference: np.ndarray) -> float | None:
  """Returns the share of the samples (n, D) in the support of the reference (m, D); None if there are too few of either."""
  x, y = _equally_many(samples, reference)
  return _share_inside(x, y) if len(y) > NEAREST else None


def recall(samples: np.ndarray, reference: np.ndarray) -> float | None:
  """Returns the share of the reference (m, D) in the support of the samples (n, D); None if there are too few of either."""
  x, y = _equally_many(samples, reference)
  return _share_inside(y, x) if len(x) > NEAREST else None


def _equally_many(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns as many of x as of y, chosen at random with a fixed seed, both about the mean of y to limit rounding errors."""
  rng, size, mean = np.random.Generator(np.random.Philox(0)), min(len(x), len(y)), y.mean(0)[None, :]
  x, y = (z if len(z) == size else z[rng.permutation(len(z))[:size]] for z in (x, y))
  return x - mean, y - mean


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
  """Yields blocks of rows of the squared distances (n, m): the rows, their distances, and the rounding errors of these."""
  of_x, of_y = (x**2).sum(1), (y**2).sum(1)
  for start in range(0, len(x), _BLOCK):
    rows = slice(start, start + _BLOCK)
    norms = of_x[rows, None] + of_y[None, :]
    yield rows, np.maximum(norms - 2.0 * (x[rows] @ y.T), 0.0), _ROUNDING * norms


def _squared_radii(centres: np.ndarray) -> np.ndarray:
  """Returns the squared distance (m,) of each of the centres (m, D) to its k-th nearest other one."""
  radii = np.empty(len(centres), centres.dtype)
  for rows, distances, _ in _squared_distances(centres, centres):
    here = np.arange(len(distances))
    distances[here, rows.start + here] = np.inf
    radii[rows] = np.partition(distances, NEAREST - 1, axis=1)[:, NEAREST - 1]
  return radii


def _share_inside(points: np.ndarray, centres: np.ndarray) -> float:
  """Returns the share of the points (n, D) that lie in any of the balls about the centres (m, D)."""
  radii, inside = _squared_radii(centres), 0
  for _, distances, rounding in _squared_distances(points, centres):
    inside += int((distances <= radii[None, :] + rounding).any(axis=1).sum())
  return inside / len(points)
