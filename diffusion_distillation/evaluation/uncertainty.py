"""The error and the bias of a Frechet distance that is estimated from n samples.

With reference moments (m_r, C_r), which count as exact, the distance is a function of the samples' mean m and covariance C:

  d(m, C) = |m - m_r|^2 + tr(C) + tr(C_r) - 2 tr S^(1/2),  S = C_r^(1/2) C C_r^(1/2).

Both results come from the expansion of d about the moments of the samples; no part of the samples is measured again.

The error is that of the infinitesimal jackknife (Efron 1982, chapter 6). The influence of a sample x on d is

  i(x) = 2 (m - m_r)'(x - m) + (x - m)'(I - T)(x - m) - tr((I - T) C),  T = C_r^(1/2) S^(-1/2) C_r^(1/2),

where T is the linear optimal transport from the samples to the reference; the standard error is sqrt(Var i(x) / n). The bias
is the expectation of the terms of second order. With S = U diag(r^2) U' and w = diag(1/r) U' C_r^(1/2) (x - m), which has
unit covariance,

  bias = (tr(C) + 1/2 sum_ij r_i r_j / (r_i + r_j) Var(w_i w_j)) / n.

It is positive: finite sets look further apart than their distributions are (Chong & Forsyth 2020 extrapolate it in 1/n).
"""

from typing import NamedTuple

import numpy as np

from diffusion_distillation.evaluation.frechet import Moments

_NEGLIGIBLE = 1e-7  # roots of eigenvalues below this share of the largest one count as zero


class Estimate(NamedTuple):
  """A measured value.

  Attributes:
    value: the value.
    error: standard error of the value, or another measure of its spread that the metric documents; None if unknown.
    bias: by how much the value is expected to exceed that of infinitely many samples; None if unknown.
  """

  value: float
  error: float | None = None
  bias: float | None = None


class _Expansion(NamedTuple):
  """The expansion of the distance about the moments of the samples.

  Attributes:
    influence: (N,), the influence of individual samples.
    whitened: (N, K), w of individual samples, for the K eigenvalues of S that are not negligible.
    roots: (K,), the roots r of these.
  """

  influence: np.ndarray
  whitened: np.ndarray
  roots: np.ndarray


def _expand(samples: Moments, some: np.ndarray, reference: Moments) -> _Expansion:
  root = reference.root
  product = root @ samples.cov @ root
  values, vectors = np.linalg.eigh((product + product.T) / 2.0)
  r = np.sqrt(np.maximum(values, 0.0))
  kept = r > _NEGLIGIBLE * r.max(initial=0.0)
  r, whiten = r[kept], (root @ vectors)[:, kept] / r[kept][None, :]
  centred = np.asarray(some, np.float64) - samples.mean[None, :]
  w = centred @ whiten
  influence = 2.0 * centred @ (samples.mean - reference.mean) + (centred**2).sum(1) - w**2 @ r
  return _Expansion(influence, w, r)


def influences(samples: Moments, some: np.ndarray, reference: Moments) -> np.ndarray:
  """Returns the influence i(x) of individual samples (N, D) on the Frechet distance to the reference, (N,), up to a constant."""
  return _expand(samples, some, reference).influence


def error_and_bias(
  samples: Moments, some: np.ndarray, count: int, reference: Moments
) -> tuple[float, float | None]:
  """Returns the standard error and the bias of the Frechet distance of `count` samples to a reference.

  For normal features, value - bias +- 1.96 error covers the distance of the distributions in 95 % of all draws where `count`
  is several times the dimension D, and more often where the distance is small against its own bias.

  Args:
    samples: moments of all samples.
    some: (N, D), features of individual samples, all of them or a random choice; the expectations are taken over these.
    count: number of samples.
    reference: moments of the reference, which count as exact.

  Returns:
    The standard error, and the bias, which is None for at most D samples: the expansion does not hold there.
  """
  influence, w, r = _expand(samples, some, reference)
  error = float(influence.std() / np.sqrt(count))
  if count <= len(samples.mean):
    return error, None
  variances = (w**2).T @ w**2 / len(w) - (w.T @ w / len(w)) ** 2
  harmonic = r[:, None] * r[None, :] / (r[:, None] + r[None, :])
  return error, float((np.trace(samples.cov) + 0.5 * np.sum(harmonic * variances)) / count)
