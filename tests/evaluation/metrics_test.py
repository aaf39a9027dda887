"""Metrics on distributions whose values are known, and the streaming of what they are computed from."""

import math

import numpy as np
import pytest

from diffusion_distillation.evaluation import inception_score, kernel_distance, manifold, metrics
from diffusion_distillation.evaluation.metrics import METRICS, RunningFeatures, entry, measure_all


@pytest.mark.parametrize('count', [10_000, 10_001, 25_000])
def test_the_features_that_are_kept_are_the_same_whatever_the_batches(count):
  features = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
  running = RunningFeatures(count)
  for batch in np.split(features, [1, 500, 501, 503, 9000]):
    running.add(batch)
  assert sum((part if part.base is None else part.base).nbytes for part in running._some) <= 80_000
  found = running.result()
  np.testing.assert_array_equal(found.some, features[metrics.some_of(count, 10_000)])
  np.testing.assert_allclose(found.moments.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize(('count', 'classes'), [(50_000, 10), (24_000, 48), (20_000, 2)])
def test_the_features_that_are_kept_have_all_classes_of_labels_in_turn(count, classes):
  """Each in its share, within five standard deviations."""
  labels = np.arange(count) % classes
  running = RunningFeatures(count)
  for batch in np.split(labels[:, None].astype(np.float32), [4096, 30_000]):
    running.add(batch, spatial=batch)
  found = running.result()
  kept = np.bincount(found.some[:, 0].astype(int), minlength=classes)
  np.testing.assert_allclose(kept, 10_000 / classes, atol=5 * math.sqrt(10_000 / classes))
  np.testing.assert_array_equal(found.spatial.some, found.some)  # of the same images


def test_too_few_kept_features_leave_the_error_unknown():
  """A row that is stopped after its first images may have kept none of them."""
  running = RunningFeatures(1_000_000)
  running.add(np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32))
  samples, rng = running.result(), np.random.default_rng(1)
  assert len(samples.some) < 2
  found = measure_all(samples, gathered([rng.normal(size=(9, 2)).astype(np.float32)]))
  assert found.keys() == {'frechet'} and found['frechet'].error is None


def normal(rng, count, dim=4, spread=1.0, shift=0.0, classes=3, spatial=6, dinov2=5):
  """Features, logits, spatial features and those of DINOv2 of `count` images."""
  features = spread * rng.normal(size=(count, dim)) + shift
  logits = rng.normal(size=(count, classes))
  parts = features, logits, *(rng.normal(size=(count, size)) + shift for size in (spatial, dinov2))
  return [part.astype(np.float32) for part in parts]


def gathered(parts, cuts=(), count=None):
  running = RunningFeatures(count or len(parts[0]))
  for batch in zip(*(np.split(part, cuts) for part in parts), strict=True):
    running.add(*batch)
  return running.result()


def test_metrics_do_not_depend_on_the_batches():
  rng = np.random.default_rng(0)
  samples, reference = normal(rng, 1200), gathered(normal(rng, 900, shift=0.2))
  one, other = (measure_all(gathered(samples, cuts), reference) for cuts in ([], [1, 64, 65, 128, 1100]))
  assert one.keys() == other.keys() == METRICS.keys()
  for name in METRICS:
    assert other[name].value == pytest.approx(one[name].value, rel=1e-9), name


def test_a_metric_without_its_input_is_left_out():
  rng = np.random.default_rng(0)
  samples, reference = gathered(normal(rng, 60)), gathered(normal(rng, 60))
  plain = gathered(normal(rng, 60)[:1])
  assert measure_all(plain, reference).keys() == {'frechet', 'kid', 'precision', 'recall'}
  assert 'inception_score' in measure_all(samples, plain)  # which needs the samples' classes only
  only_moments = metrics.Features(reference.moments, None, None)
  assert measure_all(samples, only_moments).keys() == {'frechet', 'inception_score'}
  few = measure_all(gathered(normal(rng, 3)), reference)
  assert few.keys() == {'frechet', 'kid', 'inception_score', 'sfid', 'fd_dinov2'}


def test_metrics_say_which_direction_is_better():
  """Better samples, those of the reference's own law, have better values."""
  rng = np.random.default_rng(0)
  parts = normal(rng, 400)
  parts[1] = 20 * np.eye(3, dtype=np.float32)[np.arange(400) % 3]
  good, reference = measure_all(gathered(parts), gathered(normal(rng, 400))), gathered(normal(rng, 400))
  # Half of them are elsewhere, the others too close together, and all in one class.
  worse = normal(rng, 400, spread=0.2)
  worse[0][::2] += 9.0
  worse[1][:] = [20, 0, 0]
  worse[2] += 3.0
  worse[3] += 3.0
  bad = measure_all(gathered(worse), reference)
  assert good.keys() == bad.keys() == METRICS.keys()
  for name in METRICS:
    sign = {'lower': 1, 'higher': -1}[entry(name).better]
    assert sign * good[name].value < sign * bad[name].value, name


def test_a_bare_function_in_the_table_is_a_metric_of_individual_features(monkeypatch):
  monkeypatch.setitem(METRICS, 'gap', lambda samples, reference: samples.some[0, 0])
  samples = gathered([np.full((9, 2), 7.0, np.float32)])
  assert measure_all(samples, samples)['gap'] == (7.0, None, None)
  assert 'gap' not in measure_all(samples, metrics.Features(samples.moments, None, None))


# KID. For normal features, E k(x, y) follows from the moments of x'y.


def mean_kernel(m_x, c_x, m_y, c_y):
  """E (x'y / D + 1)^3 for independent x ~ N(m_x, c_x) and y ~ N(m_y, c_y)."""
  dim = len(m_x)
  s_x, s_y = c_x + np.outer(m_x, m_x), c_y + np.outer(m_y, m_y)
  first, second = m_x @ m_y, np.sum(s_x * s_y)
  # E x_i x_j x_k = m_i m_j m_k + C_ij m_k + C_ik m_j + C_jk m_i
  third_x, third_y = (
    np.einsum('i,j,k', m, m, m)
    + np.einsum('ij,k', c, m)
    + np.einsum('ik,j', c, m)
    + np.einsum('jk,i', c, m)
    for m, c in ((m_x, c_x), (m_y, c_y))
  )
  third = np.sum(third_x * third_y)
  return third / dim**3 + 3 * second / dim**2 + 3 * first / dim + 1


def draws(x, y, count, size=12, dim=3):
  """Estimates from `count` pairs of small sets of normal features, given as (mean, factor of the covariance)."""
  rng = np.random.default_rng(0)
  return [
    kernel_distance.squared_mmd(
      *(m[None, :] + rng.normal(size=(size, dim)) @ factor.T for m, factor in (x, y))
    )
    for _ in range(count)
  ]


@pytest.mark.parametrize('same', [True, False])
def test_kid_is_unbiased_for_sets_of_any_size(same):
  rng = np.random.default_rng(3)
  x = rng.normal(size=3), rng.normal(size=(3, 3))
  y = x if same else (rng.normal(size=3), rng.normal(size=(3, 3)))
  laws = [(m, factor @ factor.T) for m, factor in (x, y)]
  of = {(i, j): mean_kernel(*laws[i], *laws[j]) for i in (0, 1) for j in (0, 1)}
  truth = of[0, 0] + of[1, 1] - 2 * of[0, 1]
  assert truth == pytest.approx(0.0, abs=1e-12) if same else truth > 1.0
  found = draws(x, y, 4000)
  assert np.min(found) < 0.0 or not same
  assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_kid_is_the_mean_over_subsets_with_its_error(monkeypatch):
  monkeypatch.setattr(kernel_distance, '_SUBSET', 50)
  rng = np.random.default_rng(0)
  samples, reference = (rng.normal(size=(size, 2)).astype(np.float32) for size in (500, 140))
  found = kernel_distance.kernel_distance(samples, reference)
  # Spread over independent sets of samples; the reference stays.
  others = [
    kernel_distance.kernel_distance(rng.normal(size=(500, 2)).astype(np.float32), reference).value
    for _ in range(40)
  ]
  assert 0.3 < found.error / np.std(others) < 3.0
  few = kernel_distance.kernel_distance(samples[:199], reference)
  assert few.error is None and few.value == pytest.approx(0.0, abs=1.0)
  assert kernel_distance.kernel_distance(samples[:1], reference) is None


def test_kid_does_not_depend_on_the_order_of_sorted_sets():
  """Sets that are sorted, as a folder with a directory per class is, are compared in random subsets."""
  rng = np.random.default_rng(0)
  sets = [np.sort(rng.normal(size=(3000, 1)), axis=0).astype(np.float32) for _ in range(2)]
  sets[1] = sets[1][::-1]
  assert abs(kernel_distance.kernel_distance(*sets).value) < 0.5  # 20 for parts of the sorted sets


# Precision and recall. Modes are far apart; noise lies where no mode is.

MODES = 50.0 * np.eye(5, 16)


def modes(rng, count, chosen=range(5)):
  return (MODES[rng.choice(list(chosen), count)] + rng.normal(size=(count, 16))).astype(np.float32)


def precision_and_recall(samples, reference):
  return manifold.precision(samples, reference), manifold.recall(samples, reference)


def test_a_set_has_precision_and_recall_of_one_to_itself():
  """Repeated features too, whose distances are zero up to rounding."""
  rng = np.random.default_rng(0)
  x = modes(rng, 500)
  assert precision_and_recall(x, x.copy()) == (1.0, 1.0)
  repeated = np.repeat(x[:100], 5, axis=0)
  assert precision_and_recall(repeated, rng.permutation(repeated)) == (1.0, 1.0)


def test_dropped_modes_lower_recall_only():
  rng = np.random.default_rng(1)
  reference = modes(rng, 1000)
  full = precision_and_recall(modes(rng, 1000), reference)
  precision, recall = precision_and_recall(modes(rng, 1000, chosen=(0, 1)), reference)
  assert precision == pytest.approx(full[0], abs=0.1) and precision > 0.7
  share = np.mean(np.linalg.norm(reference[:, None] - MODES[None, :2], axis=-1).min(1) < 25)
  assert recall == pytest.approx(share * full[1], abs=0.1) and recall < 0.45


def test_noise_lowers_precision_only():
  """A third of the samples lies 200 from all modes, each on its own; the others are as good as before."""
  rng = np.random.default_rng(2)
  reference, samples = modes(rng, 1000), modes(rng, 1000)
  full = precision_and_recall(samples, reference)
  noise = rng.normal(size=(333, 16))
  samples[::3][:333] = -200.0 * np.abs(noise) / np.linalg.norm(noise, axis=1, keepdims=True)
  precision, recall = precision_and_recall(samples, reference)
  assert precision == pytest.approx(full[0] * 2 / 3, abs=0.03)
  assert recall == pytest.approx(full[1], abs=0.05) and recall > 0.7


def test_neighbours_are_the_third_ones_and_blocks_change_nothing(monkeypatch):
  """Radii by hand: in 0, 1, 3, 7, 15 the third nearest others are at 7, 6, 4 (or 3), 7 and 14."""
  centres = np.array([[0], [1], [3], [7], [15]], np.float32)
  np.testing.assert_array_equal(manifold._squared_radii(centres), np.square([7, 6, 4, 7, 14]))
  rng = np.random.default_rng(0)
  x, y = modes(rng, 333), modes(rng, 333)
  expected = precision_and_recall(x, y)
  monkeypatch.setattr(manifold, '_BLOCK', 50)
  assert precision_and_recall(x, y) == expected


def test_sets_of_other_sizes_are_compared_in_equal_numbers():
  """Sorted by mode, so that the first ones alone would miss modes."""
  rng = np.random.default_rng(0)
  reference = modes(rng, 2000)
  reference = reference[np.argsort(reference.argmax(1), kind='stable')]
  small, large = (
    precision_and_recall(modes(rng, 500), reference),
    precision_and_recall(reference, modes(rng, 500)),
  )
  assert min(*small, *large) > 0.7
  assert manifold.precision(reference[:3], reference) is None
  assert manifold.recall(reference[:3], reference) is None


# The Inception score, from posteriors that are known.


def score(probabilities, cuts=()):
  running = inception_score.RunningScore()
  for batch in np.split(np.log(np.maximum(probabilities, 1e-30)), cuts):
    running.add(batch)
  return inception_score.inception_score(running.result())


def test_the_score_of_certain_and_evenly_spread_classes_is_their_number():
  """In turn, as a sampler with balanced classes draws them: every split has all classes."""
  found = score(np.eye(10)[np.arange(50_000) % 10])
  assert found.value == pytest.approx(10.0, rel=2e-3) and 0.0 < found.error < 0.02


def test_the_score_of_a_constant_posterior_is_one():
  assert score(np.tile([0.2, 0.5, 0.3], (100, 1))) == pytest.approx((1.0, 0.0, None), abs=1e-12)


def test_the_score_is_that_of_the_mean_divergence_from_the_mean_posterior():
  """Half of the samples say (0.9, 0.1), half (0.1, 0.9): exp(KL((0.9, 0.1) || (0.5, 0.5)))."""
  found = score(np.array([[0.9, 0.1], [0.1, 0.9]])[np.arange(40_000) % 2], cuts=[7, 8, 1000])
  expected = math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
  assert found.value == pytest.approx(expected, rel=1e-3)


def test_large_logits_do_not_overflow():
  running = inception_score.RunningScore()
  running.add(np.array([[1e4, 0.0], [0.0, 1e4]] * 500, np.float32))
  assert inception_score.inception_score(running.result()).value == pytest.approx(2.0, rel=0.05)
