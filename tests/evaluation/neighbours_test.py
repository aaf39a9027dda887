"""The training images nearest to samples, and whether copies of training images are noticed."""

import numpy as np
import pytest

from diffusion_distillation.datasets.image_set import InMemory
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import kept_features, neighbours
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import some_of

COUNT = 1203  # training images: more than two batches, and a part of one


class Coarse:
  """In place of an extractor: the features are the mean grey values of the four quarters."""

  def of(self, images):
    n = len(images)
    return Extracted(np.asarray(images, np.float32).reshape(n, 2, 4, 2, 4).mean((2, 4)).reshape(n, 4))


def noise(seed, count):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)


def loader(images, broken=()):
  labels = np.zeros(len(images), np.int32)
  skipped = {k: 'broken' for k in broken}
  return Loader(InMemory('noise', (8, 8, 1), (), 'identity', images, labels, skipped))


TRAIN, HELD_OUT = noise(0, COUNT), noise(1, 40)


def find(samples, most=COUNT, train=TRAIN, **given):
  searched = kept_features.OfEach('searched', most)
  kept_features.compute(Coarse(), loader(train, **given), [searched])
  searched.load(searched.arrays())
  return neighbours.find(samples, Coarse(), loader(train, **given), loader(HELD_OUT), searched)


def brute(queries, vectors):
  """Distances (n, m)."""
  return np.sqrt(np.square(queries[:, None].astype(float) - vectors[None].astype(float)).sum(-1))


def test_the_nearest_are_those_of_an_exhaustive_search():
  samples = noise(2, 20)
  found = find(samples)
  assert found.searched == COUNT and len(found.samples) == 8
  flat = [images.reshape(len(images), -1) for images in (samples, TRAIN, HELD_OUT)]

  def of(images):
    return Coarse().of(images).features

  for measure, shown, (a, b, c), scale in (
    (found.pixels, found.by_pixels, flat, 8.0),  # the root of the number of pixels
    (found.features, found.by_features, (of(samples), of(TRAIN), of(HELD_OUT)), 1.0),
  ):
    distances = brute(a, b) / scale
    np.testing.assert_allclose(measure.samples, distances.min(1), rtol=1e-5)
    np.testing.assert_allclose(measure.held_out, brute(c, b).min(1) / scale, rtol=1e-5)
    order = np.argsort(distances, axis=1)[:8, :3]
    np.testing.assert_array_equal(shown, TRAIN[order])


def test_large_images_are_compared_at_a_size_that_bounds_the_memory():
  images = np.random.default_rng(6).integers(0, 256, (3, 128, 128, 3)).astype(np.uint8)
  flat = neighbours._flat(images)
  assert flat.shape == (3, 64 * 64 * 3)
  means = images.reshape(3, 64, 2, 64, 2, 3).astype(float).mean((2, 4))
  expected = np.sqrt(np.square(means[0] - means[1]).mean())
  assert np.linalg.norm(flat[0] - flat[1]) == pytest.approx(expected, rel=1e-5)
  assert neighbours._flat(images[:, :100, :127]).shape == (3, 100 * 127 * 3)


def test_copies_of_training_images_are_noticed():
  copies = TRAIN[5::37][:30]
  found = find(copies)
  for measure in (found.features, found.pixels):
    assert measure.ratio < 1e-3 and measure.closer == 1.0
  np.testing.assert_array_equal(found.by_pixels[:, 0], copies[:8])
  np.testing.assert_array_equal(found.by_features[:, 0], copies[:8])
  # A third of them is enough to stand out.
  mixed = find(np.concatenate([copies[:10], noise(3, 20)]))
  assert mixed.pixels.closer > 0.3 and mixed.pixels.ratio > 0.9


def test_new_images_are_as_far_as_held_out_ones():
  found = find(noise(4, 200))
  assert found.pixels.ratio == pytest.approx(1.0, abs=0.03)
  assert found.features.ratio == pytest.approx(1.0, abs=0.25)
  assert found.pixels.closer < 0.2


def test_a_part_of_the_training_images_is_a_random_choice_and_broken_ones_are_left_out():
  chosen = some_of(COUNT, 2)
  assert chosen.tolist() != [0, 1]
  copies = TRAIN[chosen]
  assert find(copies, most=2).searched == 2
  np.testing.assert_array_equal(find(copies, most=2).pixels.samples, [0.0, 0.0])
  left = find(copies, broken=(int(chosen[0]),))
  assert left.searched == COUNT - 1 and left.pixels.samples[0] > 10.0 and left.pixels.samples[1] == 0.0
