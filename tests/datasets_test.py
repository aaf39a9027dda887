import numpy as np
import pytest

from diffusion_distillation import datasets
from diffusion_distillation.datasets import batch_indices
from diffusion_distillation.errors import UserError


def test_pixels_survive_the_way_to_x_and_back():
  pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  x = datasets.to_x(pixels)
  assert float(x.min()) == -1.0 and float(x.max()) == 1.0
  np.testing.assert_array_equal(datasets.to_image(x), pixels)


def test_x_beyond_its_range_is_clipped_not_wrapped():
  np.testing.assert_array_equal(datasets.to_image(np.array([-3.0, 3.0, 0.0])), [0, 255, 128])


def test_each_epoch_visits_every_example_once():
  stream = np.concatenate([batch_indices(10, 3, step, 4) for step in range(10)])
  epochs = stream.reshape(4, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_is_a_function_of_seed_and_step_alone():
  late = batch_indices(10, 3, 1000, 4)
  for step in range(20):
    batch_indices(10, 3, step, 4)
  np.testing.assert_array_equal(batch_indices(10, 3, 1000, 4), late)
  assert any((batch_indices(10, 3, k, 4) != batch_indices(10, 4, k, 4)).any() for k in range(5))


def test_the_stream_does_not_depend_on_the_batch_size():
  by_four = np.concatenate([batch_indices(10, 3, step, 4) for step in range(15)])
  by_six = np.concatenate([batch_indices(10, 3, step, 6) for step in range(10)])
  np.testing.assert_array_equal(by_four, by_six)


def test_a_batch_larger_than_the_set_goes_round_it():
  assert np.bincount(batch_indices(10, 3, 0, 30)).tolist() == [3] * 10


def test_digits_are_images_with_their_labels():
  train = datasets.load('digits', 8, 'train')
  assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8
  assert train.images.min() == 0 and train.images.max() == 255
  assert len(np.unique(train.images)) == 17
  batch = train.batch(np.array([5, 2]))
  np.testing.assert_array_equal(batch['image'][1], train.images[2])
  np.testing.assert_array_equal(batch['label'], train.labels[[5, 2]])
  assert np.bincount(train.labels).min() > 100


def test_sets_are_described_without_being_read():
  assert datasets.describe('digits', 8) == ((8, 8, 1), 10)
  assert datasets.describe('lsun/bedroom', 128) == ((128, 128, 3), 0)
  images = datasets.load('digits', 8, 'test')
  assert datasets.describe('digits', 8) == (images.images.shape[1:], images.num_classes)


@pytest.mark.parametrize(
  ('name', 'image_size', 'message'),
  [
    ('mnist', 28, r"dataset\.name='mnist' is not known.*digits"),
    ('cifar10', 32, r"dataset\.name='cifar10' cannot be read.*digits"),
    ('digits', 16, r"dataset\.image_size=16, .* 'digits' have 8"),
  ],
)
def test_sets_that_cannot_be_had_are_refused(name, image_size, message):
  with pytest.raises(UserError, match=message):
    datasets.load(name, image_size, 'train')


def test_an_unknown_set_is_not_described():
  with pytest.raises(UserError, match=r"'mnist'.*digits"):
    datasets.describe('mnist', 28)
