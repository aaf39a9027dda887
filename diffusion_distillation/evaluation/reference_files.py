"""Reference statistics from files: `.npz` files of EDM, pytorch-fid, ADM's evaluator, and `--mode=features`.

  mu (D,), sigma (D, D)        moments, as EDM and pytorch-fid write them
  mu_s (S,), sigma_s (S, S)    moments of spatial features, which ADM adds
  arr_0 (N, H, W, 3) uint8     images; ADM adds some to the moments, of which individual features are computed
  pool3 (N, D)                 features of individual images, as `--mode=features` writes them

The covariances divide by N - 1. Nothing in a file is executed: arrays of Python objects are refused.
"""

import hashlib
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.npyio import NpzFile

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.frechet import Moments
from diffusion_distillation.evaluation.given_images import ARRAYS

KEY = 'evaluation.reference'
_FEATURES = 'pool3'
_UNREADABLE = (
  *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
  *(ValueError, RuntimeError, MemoryError, OverflowError),
)
_ASYMMETRY = 1e-4  # relative to the largest entry of a covariance


class StoredStatistics(NamedTuple):
  """The contents of a file.

  Attributes:
    moments: moments of the features; None if they are to be computed from `features` or the images.
    spatial: moments of the spatial features, or None.
    features: (N, D) float32, features of individual images, or None.
    has_images: whether the file has images, see `given_images.open_images`.
    digest: sha256 of the file.
  """

  moments: Moments | None
  spatial: Moments | None
  features: np.ndarray | None
  has_images: bool
  digest: str

  @property
  def content(self) -> str:
    """The arrays that are used, as text."""
    if self.features is not None:
      return _FEATURES
    found = ['mu, sigma'] if self.moments else []
    found += ['mu_s, sigma_s'] if self.spatial else []
    return ', '.join([*found, *(['images'] if self.has_images else [])])


def read(path: pathlib.Path) -> StoredStatistics:
  """Reads and checks a file.

  Raises:
    UserError: the file is missing or damaged, has none of the known arrays, or their shapes do not agree.
  """
  if not path.is_file():
    raise UserError(f'{KEY}={path}: there is no such file')
  try:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, NpzFile):
      raise UserError(f'{KEY}={path} is a single array; it must be an .npz with mu and sigma')
    with file:
      return _read(path, file)
  except _UNREADABLE as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'{KEY}={path} is not a readable .npz ({reason}); fetch it again') from error


def _read(path: pathlib.Path, file: Any) -> StoredStatistics:
  names, features, moments = set(file.files), None, None
  if {'mu', 'sigma'} <= names:
    moments = _moments(path, file, 'mu', 'sigma')
  elif _FEATURES in names:
    features = file[_FEATURES]
    if features.ndim != 2 or len(features) < 2 or features.dtype.kind != 'f':
      raise UserError(
        f'{KEY}={path}: {_FEATURES} is {features.dtype} {features.shape}; it must be float (N, D) with N > 1'
      )
    _check_finite(path, _FEATURES, features)
  elif not names & set(ARRAYS):
    held = ', '.join(sorted(names)[:5]) or 'none'
    raise UserError(
      f'{KEY}={path} has neither mu and sigma, nor {_FEATURES}, nor arr_0; its arrays: {held}'
    )
  spatial = _moments(path, file, 'mu_s', 'sigma_s') if {'mu_s', 'sigma_s'} <= names else None
  with path.open('rb') as content:
    digest = hashlib.file_digest(content, 'sha256').hexdigest()
  has_images = features is None and bool(names & set(ARRAYS))
  return StoredStatistics(moments, spatial, features, has_images, digest)


def _moments(path: pathlib.Path, file: Any, mean_name: str, cov_name: str) -> Moments:
  mean, cov = file[mean_name], file[cov_name]
  real = mean.dtype.kind == cov.dtype.kind == 'f'
  if not real or mean.ndim != 1 or not mean.size or cov.shape != (mean.size, mean.size):
    raise UserError(
      f'{KEY}={path}: {mean_name} is {mean.dtype} {mean.shape} and {cov_name} is {cov.dtype} {cov.shape}; they must be '
      'float (D,) and (D, D)'
    )
  _check_finite(path, mean_name, mean)
  _check_finite(path, cov_name, cov)
  cov = cov.astype(np.float64)
  if np.abs(cov - cov.T).max() > _ASYMMETRY * np.abs(cov).max() or np.diag(cov).min() < 0.0:
    raise UserError(f'{KEY}={path}: {cov_name} is not a covariance; it must be symmetric')
  return Moments(mean.astype(np.float64), (cov + cov.T) / 2.0)


def _check_finite(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  if not np.isfinite(array).all():
    raise UserError(f'{KEY}={path}: {name} has entries that are not finite; fetch or compute it again')


def check_dimension(path: pathlib.Path, found: StoredStatistics, metric: str, dimension: int) -> None:
  """Raises UserError unless the statistics are of as many features as the extractor has."""
  size = found.moments.mean.size if found.moments else None
  size = found.features.shape[1] if found.features is not None else size
  if size not in (None, dimension):
    remedy = (
      '' if metric == 'FID' else '; for statistics of Inception features, name evaluation.inception=FILE'
    )
    raise UserError(f'{KEY}={path} describes {size} features, but {metric} compares {dimension}{remedy}')
