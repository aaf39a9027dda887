"""The kernel Inception distance: an unbiased squared maximum mean discrepancy (Binkowski et al. 2018)."""

import numpy as np

from diffusion_distillation.evaluation.uncertainty import Estimate

_SUBSET = 1000  # features per subset, as in the paper
_FEWEST = 4  # number of subsets from which an error is estimated


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns k(x, y) = (x'y / D + 1)^3 of all pairs, (n, m), for features x (n, D) and y (m, D)."""
  base: np.ndarray = x @ y.T / x.shape[1] + 1.0
  return base * base * base  # much faster than a power


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Returns the unbiased estimate of MMD^2 from features x (n, D) and y (m, D) (Gretton et al. 2012, Eq. 3).

  MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), with the means over pairs of different features; it can be negative.
  """

  def within(z: np.ndarray) -> float:
    gram = kernel(z, z)
    return float((gram.sum() - np.trace(gram)) / (len(z) * (len(z) - 1)))

  return within(x) + within(y) - 2.0 * float(kernel(x, y).mean())


def kernel_distance(samples: np.ndarray, reference: np.ndarray, seed: int = 0) -> Estimate | None:
  """Returns the mean of `squared_mmd` over subsets of 1000 features, or of as many as there are.

  Every sample is in at most one subset. Each subset of samples is compared with a random subset of the reference; these are
  disjoint if the reference is large enough.

  Args:
    samples: (n, D) float32, in any order.
    reference: (m, D) float32, in any order.
    seed: seed of the choice of the subsets.

  Returns:
    The mean over the subsets, and the standard error of the mean; None for fewer than 4 subsets. None instead of an estimate
    for fewer than two features in either set.
  """
  size = min(_SUBSET, len(samples), len(reference))
  if size < 2:
    return None
  count = len(samples) // size
  rng = np.random.Generator(np.random.Philox(seed))
  pairs = zip(*(_subsets(rng, len(z), size, count) for z in (samples, reference)), strict=True)
  values = [
    squared_mmd(samples[ours].astype(np.float64), reference[theirs].astype(np.float64))
    for ours, theirs in pairs
  ]
  error = float(np.std(values, ddof=1) / np.sqrt(count)) if count >= _FEWEST else None
  return Estimate(float(np.mean(values)), error)


def _subsets(rng: np.random.Generator, number: int, size: int, count: int) -> np.ndarray:
  """Returns the indices of random subsets of `number` features, (count, size), disjoint if there are enough features."""
  if count * size <= number:
    return rng.permutation(number)[: count * size].reshape(count, size)
  return np.stack([rng.permutation(number)[:size] for _ in range(count)])
