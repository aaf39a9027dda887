"""Drawn shapes with captions: the image, its label and its caption say the same."""

import numpy as np
import pytest

from diffusion_distillation import datasets
from diffusion_distillation.datasets import captioned_shapes, shapes
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

COUNT = 48


def open_images(role='train', **changes):
  return datasets.open_split(Settings(name='captioned_shapes', **{'image_size': 32} | changes), role)


def test_captions_are_the_names_of_the_classes_and_all_different():
  images = open_images()
  assert len(images.classes) == len(set(images.classes)) == COUNT
  assert [images.caption(k) for k in range(2 * COUNT)] == [*images.classes, *images.classes]
  assert images.known_labels()[: 2 * COUNT].tolist() == [*range(COUNT), *range(COUNT)]
  assert all(images.read(k)[1] == images.label(k) == k % COUNT for k in (0, 47, 48, 1000))
  assert images.classes[0] == 'a small red circle on black'


def test_an_image_shows_what_its_caption_says():
  """Colour in the centre of the shape, ground in the corner, and size and shape by the covered area, in closed form."""
  areas = {'circle': np.pi, 'square': 2.0, 'triangle': 3.0 * np.sqrt(3.0) / 4.0}
  areas['cross'] = 8.0 * 0.35 * np.sqrt(1.0 - 0.35**2) - 4.0 * 0.35**2
  images = open_images(image_size=64)
  for k in range(2 * COUNT):
    _, size, colour, shape, _, ground = images.caption(k).split()
    image, centre = images.read(k)[0], captioned_shapes.parameters(k).centre
    x, y = np.floor(64 * centre).astype(int)
    expected = np.round(255 * np.array(captioned_shapes.COLOURS[colour]))
    assert np.abs(image[y, x] - expected).max() <= 1  # float32
    on = {'black': 0, 'white': 255}[ground]
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == on).all()
    channel = np.argmax(np.abs(expected - on))
    covered = ((image[..., channel].astype(float) - on) / (expected[channel] - on)).mean()
    low, high = captioned_shapes.RADII[size]
    assert 0.97 * areas[shape] * low**2 < covered < 1.03 * areas[shape] * high**2


def test_images_of_a_class_differ_and_are_functions_of_their_index():
  first, test = open_images(), open_images('eval')
  assert len(first) == 500 * COUNT and len(test) == 100 * COUNT
  np.testing.assert_array_equal(first.read(5)[0], open_images(split='train[5:9]').read(0)[0])
  assert (first.read(0)[0] != first.read(COUNT)[0]).any()
  assert (first.read(0)[0] != test.read(0)[0]).any() and test.caption(0) == first.caption(0)
  assert first.identity != open_images(split='train[:50%]').identity
  centres = np.array([captioned_shapes.parameters(k).centre for k in range(500)])
  assert np.abs(centres - 0.5).max() <= 0.1 and np.abs(centres.mean(0) - 0.5).max() < 0.015
  assert {shapes.CLASSES[captioned_shapes.parameters(k).kind] for k in range(COUNT)} == set(
    captioned_shapes.KINDS.values()
  )


def test_grey_images_are_refused():
  with pytest.raises(UserError, match=r'dataset\.channels=1: the captions .* name colours'):
    open_images(channels=1)
