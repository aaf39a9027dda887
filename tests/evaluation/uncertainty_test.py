"""The error bar of the Frechet distance covers the true distance of distributions that are known."""

import numpy as np
import pytest

from diffusion_distillation.evaluation.frechet import Moments, frechet_distance
from diffusion_distillation.evaluation.metrics import Features as AnyFeatures
from diffusion_distillation.evaluation.metrics import RunningFeatures, frechet_estimate, measure_all

DIM, COUNT, DRAWS = 8, 800, 600


def reference(seed=0):
  factor = np.random.default_rng(seed).normal(size=(DIM, DIM)) / np.sqrt(DIM)
  return Moments(np.zeros(DIM), factor @ factor.T + 0.1 * np.eye(DIM))


def law(distance):
  """Mean and factor of the covariance of the samples' distribution, `far` from or `equal` to the reference's."""
  rng, factor = np.random.default_rng(1), np.linalg.cholesky(reference().cov)
  if distance == 'equal':
    return np.zeros(DIM), factor
  return 0.5 * rng.normal(size=DIM), factor + 0.3 * rng.normal(size=(DIM, DIM))


def estimates(distance, law_of_noise=None, count=COUNT):
  """The true distance, and value, error and bias of DRAWS sets of samples."""
  (mean, factor), rng = law(distance), np.random.default_rng(2)
  draw = law_of_noise or (lambda rng, shape: rng.normal(size=shape))
  truth = frechet_distance(Moments(mean, factor @ factor.T), reference())
  found = []
  for _ in range(DRAWS):
    running = RunningFeatures(count)
    running.add(draw(rng, (count, DIM)) @ factor.T + mean[None, :])
    found.append(frechet_estimate(running.result(), AnyFeatures(reference(), None, None)))
  return truth, np.array(found)


def uniform(rng, shape):
  """Mean 0 and variance 1 like the normal law, but lighter tails: its moments scatter less."""
  return rng.uniform(-np.sqrt(3.0), np.sqrt(3.0), shape)


def heavy(rng, shape):
  """Mean 0, variance 1 and heavier tails: a Laplace law."""
  return rng.laplace(scale=np.sqrt(0.5), size=shape)


@pytest.mark.parametrize('noise', [None, uniform, heavy], ids=['normal', 'uniform', 'heavy'])
def test_the_error_bar_covers_the_true_distance_at_its_rate(noise):
  """95 % of 600 draws have a standard deviation of 0.9 %, 68 % of them 1.9 %."""
  truth, found = estimates('far', noise)
  value, error, bias = found.T
  apart = np.abs(value - bias - truth) / error
  assert np.mean(apart < 1.96) == pytest.approx(0.95, abs=0.03)
  assert np.mean(apart < 1.0) == pytest.approx(0.683, abs=0.06)
  assert np.mean(error) == pytest.approx(np.std(value), rel=0.1)


def test_near_the_reference_it_covers_at_least_as_often():
  """There, the terms of second order scatter as well: the error is too large by a factor below sqrt(2)."""
  truth, found = estimates('equal')
  value, error, bias = found.T
  assert truth < 1e-6
  assert np.mean(np.abs(value - bias - truth) < 1.96 * error) > 0.94
  assert np.std(value) < np.mean(error) < 1.5 * np.std(value)


@pytest.mark.parametrize('distance', ['equal', 'far'])
def test_the_bias_is_how_much_larger_finite_sets_look(distance):
  truth, found = estimates(distance)
  value, _, bias = found.T
  assert np.mean(bias) == pytest.approx(np.mean(value) - truth, abs=4 * np.std(value) / np.sqrt(DRAWS))
  assert np.std(bias) < 0.2 * np.mean(bias) and np.mean(bias) > 0.0


@pytest.mark.slow
def test_it_covers_with_as_many_samples_per_feature_as_published_fids_have():
  """24 each, about 50,000 / 2048, of features whose variances fall as 1 / k; the distance is half of the bias, as is usual."""
  dim, count, rng = 32, 768, np.random.default_rng(0)
  scale = np.sqrt(1.0 / np.arange(1, dim + 1))
  basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
  target = Moments(np.zeros(dim), (basis * scale**2) @ basis.T)
  factor = basis * scale @ (np.eye(dim) + 0.12 * rng.normal(size=(dim, dim)) / np.sqrt(dim))
  truth, found = frechet_distance(target, Moments(np.zeros(dim), factor @ factor.T)), []
  for _ in range(300):
    running = RunningFeatures(count)
    running.add(rng.normal(size=(count, dim)) @ factor.T)
    found.append(frechet_estimate(running.result(), AnyFeatures(target, None, None)))
  value, error, bias = np.array(found).T
  assert 0.3 < truth / np.mean(bias) < 2.0
  assert np.mean(np.abs(value - bias - truth) < 1.96 * error) > 0.93
  assert np.mean(bias) == pytest.approx(np.mean(value) - truth, rel=0.06)


def test_the_bias_of_one_dimension_is_that_of_a_standard_deviation():
  """(s - s_r)^2 + m^2 with n samples of N(0, s^2): E m^2 = s^2 / n, and E of the deviation is s (1 - 1 / (4 n))."""
  rng, count = np.random.default_rng(0), 100_000
  running = RunningFeatures(count)
  running.add(3.0 * rng.normal(size=(count, 1)))
  found = frechet_estimate(
    running.result(), AnyFeatures(Moments(np.zeros(1), np.full((1, 1), 4.0)), None, None)
  )
  assert found.bias == pytest.approx((9.0 + 3.0 * 2.0 / 2.0) / count, rel=0.05)
  # d = (s - 2)^2 has the error 2 (s - 2) s / sqrt(2 n).
  assert found.error == pytest.approx(2.0 * 1.0 * 3.0 / np.sqrt(2.0 * count), rel=0.05)


def test_of_fewer_samples_than_dimensions_there_is_no_bias_but_an_error():
  """And features that are constant or repeated leave both finite."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(500, 5))
  features[:, 3], features[:, 4] = 0.0, features[:, 0]
  for count in (4, 500):
    running = RunningFeatures(count)
    running.add(features[:count])
    samples = running.result()
    found = measure_all(samples, samples)['frechet']
    assert np.isfinite(found.error) and found.error >= 0.0
    assert (found.bias is None) if count == 4 else (0.0 < found.bias < 1.0)
