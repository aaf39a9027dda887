"""The Frechet distance against closed forms, and its moments against numpy."""

import numpy as np
import pytest
import scipy.linalg

from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance
from tests import peers


def random_moments(seed, dim=6, rank=None):
  rng = np.random.default_rng(seed)
  factor = rng.normal(size=(dim, rank or 2 * dim))
  return Moments(rng.normal(size=dim), factor @ factor.T)


def gather(*batches):
  moments = RunningMoments()
  for batch in batches:
    moments.add(batch)
  return moments.result()


def test_diagonal_gaussians_differ_by_their_means_and_their_standard_deviations():
  rng = np.random.default_rng(0)
  (mean_a, mean_b), (std_a, std_b) = rng.normal(size=(2, 5)), rng.uniform(0.1, 3.0, (2, 5))
  got = frechet_distance(Moments(mean_a, np.diag(std_a**2)), Moments(mean_b, np.diag(std_b**2)))
  expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
  assert got == pytest.approx(expected, rel=1e-12)


def test_one_dimension_by_hand():
  got = frechet_distance(
    Moments(np.array([1.0]), np.array([[4.0]])), Moments(np.array([-2.0]), np.array([[9.0]]))
  )
  assert got == pytest.approx(3.0**2 + (3.0 - 2.0) ** 2, rel=1e-12)


@pytest.mark.parametrize('seed', range(4))
def test_full_covariances_agree_with_the_matrix_square_root(seed):
  a, b = random_moments(2 * seed), random_moments(2 * seed + 1)
  root = scipy.linalg.sqrtm(a.cov @ b.cov)
  expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * root.real)
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_of_one_range_have_a_distance():
  """Both live in one plane: the distance is that of the two Gaussians in the plane."""
  basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))
  a, b = random_moments(1, dim=2), random_moments(2, dim=2)
  lifted = [Moments(basis @ m.mean, basis @ m.cov @ basis.T) for m in (a, b)]
  assert frechet_distance(*lifted) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_singular_covariances_of_orthogonal_ranges_share_nothing():
  zero = np.zeros(4)
  a, b = Moments(zero, np.diag([2.0, 3.0, 0.0, 0.0])), Moments(zero, np.diag([0.0, 0.0, 5.0, 0.0]))
  assert frechet_distance(a, b) == pytest.approx(10.0, rel=1e-12)


def test_points_are_as_far_apart_as_points():
  points = [Moments(np.array(mean), np.zeros((2, 2))) for mean in ([0.0, 0.0], [3.0, 4.0])]
  assert frechet_distance(*points) == 25.0


@pytest.mark.parametrize('rank', [None, 2])
def test_a_set_is_at_distance_zero_from_itself_and_never_below(rank):
  a = random_moments(0, rank=rank)
  assert 0.0 <= frechet_distance(a, a) < 1e-6 * np.trace(a.cov)


def test_distance_is_symmetric():
  a, b = random_moments(0), random_moments(1, rank=3)
  assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
  assert frechet_distance(a, b) > 1.0


@pytest.mark.parametrize('cuts', [[], [1], [30], [10, 11, 12], [99]])
def test_moments_in_batches_are_those_of_the_whole(cuts):
  """Far from the origin as well: 1e4 standard deviations away, E[f f'] - m m' would lose 8 digits."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(100, 5)) @ rng.normal(size=(5, 5)) + 1e4
  moments = gather(*np.split(features, cuts))
  np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(moments.cov, np.cov(features.T), rtol=1e-9)


def test_moments_of_float32_features_are_taken_in_float64():
  features = np.float32(1000.0 + np.random.default_rng(0).normal(size=(50, 3)))
  moments = gather(features[:20], features[20:])
  assert moments.mean.dtype == moments.cov.dtype == np.float64
  np.testing.assert_allclose(moments.cov, np.cov(np.float64(features).T), rtol=1e-9)


@pytest.mark.parametrize('batches', [[], [np.ones((1, 3))]])
def test_fewer_than_two_examples_have_no_covariance(batches):
  with pytest.raises(ValueError, match=f'at least 2 examples, got {len(batches)}'):
    gather(*batches)


def test_two_examples_have_one():
  moments = gather(np.array([[0.0, 1.0]]), np.array([[2.0, 5.0]]))
  np.testing.assert_allclose(moments.mean, [1.0, 3.0])
  np.testing.assert_allclose(moments.cov, [[2.0, 4.0], [4.0, 8.0]])


@pytest.mark.parametrize(('a', 'b'), [('a', 'b'), ('a', 'few'), ('a', 'a')])
def test_distances_are_those_of_pytorch_fid(a, b):
  """`few` has fewer samples than dimensions; the distance of a set to itself is zero up to rounding."""
  case, arrays = peers.read('frechet_distance')
  moments = {name: gather(arrays[f'in/features_{name}']) for name in {a, b}}
  for name, found in moments.items():
    np.testing.assert_allclose(found.mean, arrays[f'out/mean_{name}'], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.cov, arrays[f'out/covariance_{name}'], rtol=1e-9, atol=1e-12)
  theirs = arrays[f'out/distance_{a}_{b}']
  tolerance = max(1e-6, 5.0 * case['sensitivity'].get(f'distance_{a}_{b}', 0.0))
  assert frechet_distance(moments[a], moments[b]) == pytest.approx(theirs, rel=tolerance, abs=1e-9)
