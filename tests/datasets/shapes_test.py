"""Drawn shapes: their stated distribution, in closed form."""

import dataclasses

import numpy as np
import pytest

from diffusion_distillation.datasets import decoding, shapes
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError


def open_shapes(role='train', **changes):
  fields = {
    'name': 'shapes',
    'path': '',
    'prepared': '',
    'split': '',
    'eval_split': '',
    'image_size': 16,
  }
  return shapes.open_split(Settings(**fields | {'channels': None, 'resize': 'area'} | changes), role)


def black_on_white(kind, radius=0.25, angle=0.0, centre=(0.5, 0.5)):
  kind = shapes.CLASSES.index(kind)
  return shapes.Parameters(kind, np.array(centre), radius, angle, 1.0, np.zeros(3))


def coverage(p, size):
  """The share of each pixel that the shape covers."""
  return 1.0 - shapes.draw(p, size, 1)[..., 0] / 255.0


BAR = 0.35
AREAS = {
  'disc': np.pi,
  'square': 2.0,
  'triangle': 3.0 * np.sqrt(3.0) / 4.0,
  'ring': np.pi * (1.0 - 0.5**2),
  'cross': 8.0 * BAR * np.sqrt(1.0 - BAR**2) - 4.0 * BAR**2,
  'half_disc': np.pi / 2.0,
}


def test_every_class_has_an_area():
  assert tuple(AREAS) == shapes.CLASSES


@pytest.mark.parametrize('kind', AREAS)
def test_areas_are_those_of_shapes_in_a_circle(kind):
  for radius, angle, centre in (
    (0.15, 0.3, (0.7, 0.3)),
    (0.22, 2.0, (0.41, 0.52)),
    (0.3, 5.0, (0.3, 0.7)),
  ):
    covered = coverage(black_on_white(kind, radius, angle, centre), 400).mean()
    assert covered == pytest.approx(AREAS[kind] * radius**2, rel=2e-3)


@pytest.mark.parametrize('kind', AREAS)
def test_shapes_reach_their_circle_and_stay_inside(kind):
  middle = (np.arange(400) + 0.5) / 400
  covered = coverage(black_on_white(kind, 0.3, 0.7, (0.4, 0.6)), 400)
  from_centre = np.hypot(middle[None, :] - 0.4, middle[:, None] - 0.6)
  assert from_centre[covered > 0.5].max() == pytest.approx(0.3, abs=0.004)


@pytest.mark.parametrize('kind', ['disc', 'ring', 'square', 'cross', 'triangle'])
def test_the_centre_is_the_centre_of_gravity(kind):
  """Its first coordinate along the rows, from the left; its second from the top."""
  middle = (np.arange(300) + 0.5) / 300
  covered = coverage(black_on_white(kind, 0.2, 1.0, (0.35, 0.6)), 300)
  x, y = (covered * middle[None, :]).sum(), (covered * middle[:, None]).sum()
  np.testing.assert_allclose([x, y] / covered.sum(), [0.35, 0.6], atol=2e-4)


def test_half_a_disc_has_its_centre_of_gravity_at_four_thirds_of_a_pi_th():
  middle = (np.arange(300) + 0.5) / 300
  for angle in (0.0, 1.0, 4.0):
    covered = coverage(black_on_white('half_disc', 0.3, angle), 300)
    x = (covered * (middle[None, :] - 0.5)).sum() / covered.sum()
    y = (covered * (middle[:, None] - 0.5)).sum() / covered.sum()
    assert np.hypot(x, y) == pytest.approx(0.3 * 4.0 / (3.0 * np.pi), rel=5e-3)


@pytest.mark.parametrize('kind', AREAS)
def test_a_quarter_more_of_the_angle_is_a_quarter_turn(kind):
  p = black_on_white(kind, 0.28, 0.4)
  turned = dataclasses.replace(p, angle=0.4 + np.pi / 2)
  once, twice = (shapes.draw(q, 48, 1)[..., 0].astype(int) for q in (p, turned))
  assert np.abs(np.rot90(once, -1) - twice).max() <= 1
  assert (kind in ('disc', 'ring', 'square', 'cross')) == (np.abs(once - twice).max() <= 1)


def test_ground_and_colour_are_plain():
  p = dataclasses.replace(black_on_white('disc'), ground=0.8, colour=np.array([0.0, 0.2, 0.4]))
  pixels = shapes.draw(p, 32, 3)
  np.testing.assert_array_equal(pixels[0, 0], np.round(255 * np.array([0.8, 0.8, 0.8])))
  np.testing.assert_array_equal(pixels[16, 16], np.round(255 * p.colour))


@pytest.mark.parametrize('size', [16, 32])
def test_resolutions_agree(size):
  """A straight edge through a pixel's centre covers 1/2 of it, where a corner of a right angle covers 1/4."""
  corners = dict.fromkeys(AREAS, 1 / 4) | {'disc': 0.0, 'ring': 0.0, 'triangle': 1 / 2 - 1 / 6}
  for k in range(90):
    p = shapes.parameters(k)
    fine = decoding.area(shapes.draw(p, 2 * size, 1), size)
    difference = np.abs(fine - shapes.draw(p, size, 1)) / (255 * (p.ground - p.colour.mean()))
    assert difference.max() < corners[shapes.CLASSES[p.kind]] + 0.1
    assert difference.mean() < 0.12 / size


def uniform(values, low, high):
  """Kolmogorov and Smirnov's test at the level 0.001."""
  share = np.sort((np.asarray(values) - low) / (high - low))
  assert share[0] >= 0.0 and share[-1] < 1.0
  empirical = np.arange(len(share) + 1) / len(share)
  furthest = max((empirical[1:] - share).max(), (share - empirical[:-1]).max())
  return furthest < 1.95 / np.sqrt(len(share))


@pytest.fixture(scope='module')
def drawn():
  """The numbers of 6000 images: x, y, radius, angle, ground, red, green, blue."""
  found = [shapes.parameters(k) for k in range(6000)]
  return np.array([[*p.centre, p.radius, p.angle, p.ground, *p.colour] for p in found])


RANGES = [(0.3, 0.7), (0.3, 0.7), (0.15, 0.3), (0.0, 2 * np.pi), (0.6, 1.0), *[(0.0, 0.5)] * 3]


def test_parameters_are_uniform(drawn):
  for column, (low, high) in zip(drawn.T, RANGES, strict=True):
    assert uniform(column, low, high)
    for kind in range(6):
      assert uniform(column[kind::6], low, high)


def test_parameters_are_independent(drawn):
  """Of each other, and of those of the image before and of the same class."""
  for lag in (0, 1, 6):
    both = np.corrcoef(drawn[lag:].T, drawn[: len(drawn) - lag].T)[:8, 8:]
    if lag == 0:
      np.fill_diagonal(both, 0.0)
    assert np.abs(both).max() < 4.0 / np.sqrt(len(drawn) - lag)


def test_images_are_drawn_by_index():
  images = open_shapes()
  for k in (4, 49_999, 0, 4):
    p, (pixels, label) = shapes.parameters(k), images.read(k)
    assert p.kind == label == k % 6
    np.testing.assert_array_equal(pixels, shapes.draw(p, 16, 3))
  again = open_shapes().batch(np.array([4]))
  np.testing.assert_array_equal(images.read(4)[0], again['image'][0])


def test_classes_are_equally_many():
  images = open_shapes(split='train[:600]', image_size=2)
  batch = images.batch(np.arange(600))
  np.testing.assert_array_equal(np.bincount(batch['cond']['label']), [100] * 6)
  assert images.classes == shapes.CLASSES and batch['valid'].all() and batch['skipped'] == ()


def test_training_and_test_images_are_others():
  train, test = open_shapes(), open_shapes('eval')
  assert (len(train), len(test)) == (50_000, 10_000)
  assert not set(train.indices) & set(test.indices)
  assert train.identity != test.identity
  some = {train.read(k)[0].tobytes() for k in range(300)} | {
    test.read(k)[0].tobytes() for k in range(300)
  }
  assert len(some) == 600


def test_splits_are_slices_of_the_same_images():
  part = open_shapes(split='train[100:200]+test[:1]')
  assert len(part) == 101
  np.testing.assert_array_equal(part.read(3)[0], open_shapes().read(103)[0])
  np.testing.assert_array_equal(part.read(100)[0], open_shapes('eval').read(0)[0])
  assert part.identity != open_shapes().identity
  assert open_shapes('eval', eval_split='train').identity == open_shapes().identity


def test_a_split_that_there_is_not_is_refused():
  with pytest.raises(
    UserError, match=r"^dataset\.eval_split='tset': .* train, test, .*did you mean 'test'"
  ):
    open_shapes('eval', eval_split='tset')


def test_grey_images_have_the_mean_colour():
  colour, grey = open_shapes(), open_shapes(channels=1)
  assert grey.image_shape == (16, 16, 1)
  for k in range(12):
    mean = colour.read(k)[0].mean(-1, keepdims=True)
    np.testing.assert_allclose(grey.read(k)[0], mean, atol=1.0)


@pytest.mark.parametrize('size', [1, 2, 7, 33, 256])
def test_any_size_can_be_had(size):
  images = open_shapes(image_size=size)
  pixels, _ = images.read(5)
  assert pixels.shape == images.image_shape == (size, size, 3) and pixels.dtype == np.uint8
