"""The features that images are compared by: their network, its task, and moments over sets with broken images."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.datasets.image_set import BrokenImage, ImageSet, InMemory
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation import features, kept_features
from diffusion_distillation.networks.classifier import Classifier
from diffusion_distillation.system.checkpoints import digest

SHOWN = 8  # images at a time; 500 outside tests
BROKEN = {*range(SHOWN), 13, 22}  # the first batch, of which nothing is whole, and two more


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed(ImageSet):
  """Another set, which is never in memory as far as a loader knows."""

  inner: ImageSet

  def __len__(self):
    return len(self.inner)

  def read(self, k):
    return self.inner.read(k)


def noise(count, seed=0, broken=(), classes=('a', 'b', 'c')):
  """`count` images of noise; the broken ones white, so that none of them passes for another."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 200, (count, 8, 8, 1)).astype(np.uint8)
  images[list(broken)] = 255
  labels = (rng.integers(0, len(classes), count) if classes else np.zeros(count)).astype(np.int32)
  reasons = {k: f'image {k} is broken' for k in broken}
  return InMemory('noise', (8, 8, 1), classes, 'noise', images, labels, reasons)


def streamed(images):
  return Streamed(images.name, images.image_shape, images.classes, images.identity, images)


def turned_up(count):
  """Images that are brighter towards the bottom, and a little to the right, in noise."""
  ramp = np.add.outer(20 * np.arange(8), 8 * np.arange(8))
  images = ramp[..., None] + np.random.default_rng(count).integers(0, 40, (count, 8, 8, 1))
  return InMemory('ramps', (8, 8, 1), (), 'ramps', images.astype(np.uint8), np.zeros(count, np.int32))


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(features, '_SHOWN', SHOWN)


@pytest.fixture(scope='module')
def extractor():
  """One that nobody has trained."""
  params = Classifier(3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
  return features.FeatureExtractor('noise', 'digest', 'classes', 0.5, params)


def shapes(size, channels=3, num_classes=10):
  model = Classifier(num_classes)
  x = jnp.zeros((2, size, size, channels))
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return {name: layer['kernel'].shape for name, layer in params.items()}


@pytest.mark.parametrize(
  ('size', 'convolutions'),
  [
    (1, 1),
    (4, 1),
    (5, 2),
    (7, 2),
    (8, 2),
    (9, 3),
    (12, 3),
    (16, 3),
    (28, 4),
    (32, 4),
    (64, 5),
    (128, 6),
  ],
)
def test_convolutions_halve_an_image_down_to_four_pixels_a_side(size, convolutions):
  found = shapes(size)
  names = [f'conv{k}' for k in range(convolutions)]
  assert sorted(found) == sorted([*names, 'features', 'logits'])
  assert found['conv0'] == (3, 3, 3, 32)
  inputs = [32, *[64] * (convolutions - 1)]
  for name, channels in zip(names[1:], inputs, strict=False):
    assert found[name] == (3, 3, channels, 64)
  side = math.ceil(size / 2 ** (convolutions - 1))
  assert side <= 4 and found['features'] == (side * side * inputs[-1], 64)
  assert found['logits'] == (64, 10)


def test_of_8x8_images_it_is_the_network_that_it_always_was():
  """So that distances on the digits go on to mean what they meant."""
  assert shapes(8, channels=1) == {
    'conv0': (3, 3, 1, 32),
    'conv1': (3, 3, 32, 64),
    'features': (4 * 4 * 64, 64),
    'logits': (64, 10),
  }


def assert_moments_of(moments, found):
  assert len(found) > 8
  np.testing.assert_allclose(moments.mean, np.mean(np.float64(found), axis=0), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(moments.cov, np.cov(np.float64(found).T), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('hold', [InMemory, Streamed])
@pytest.mark.parametrize('broken', [(), BROKEN], ids=['whole', 'broken'])
def test_moments_are_those_of_the_images_that_are_whole_each_once(few, extractor, broken, hold):
  """27 images in batches of 8: what fills the last one up does not count, nor what stands in for others."""
  images = noise(27, broken=broken)
  found = extractor(images.images[[k for k in range(27) if k not in broken]])
  loader = Loader(images if hold is InMemory else streamed(images))
  assert_moments_of(kept_features.of_all(extractor, loader).moments, found)
  assert set(loader.skipped) == set(broken)


def test_moments_of_chosen_images_count_them_as_often_as_they_are_chosen(few, extractor):
  images = noise(27, broken=BROKEN)
  chosen = np.random.Generator(np.random.Philox(1)).integers(27, size=45)
  found = extractor(images.images[[k for k in chosen if k not in BROKEN]])
  assert 20 < len(found) < 45
  drawn = kept_features.OfDraw('floor', 45, 1)
  kept_features.compute(extractor, Loader(streamed(images)), [drawn])
  drawn.load(drawn.arrays())
  assert_moments_of(drawn.result.moments, found)


def test_only_a_classifier_of_classes_has_logits(few, extractor):
  images = noise(SHOWN).images
  found = extractor.of(images)
  assert (
    found.features.shape == (SHOWN, 64) and found.logits.shape == (SHOWN, 3) and found.spatial is None
  )
  assert dataclasses.replace(extractor, task='quarter turns').of(images).logits is None
  assert extractor.metric == 'FD-noise'


def test_features_do_not_depend_on_the_batches_and_are_one_program(few, extractor):
  images = noise(27).images
  every = extractor(images)
  programs = features._apply._cache_size()
  np.testing.assert_allclose(extractor(images[20:23]), every[20:23], rtol=1e-5, atol=1e-6)
  assert every.shape == (27, 64) and features._apply._cache_size() == programs


def test_where_there_are_classes_these_are_to_be_told():
  batch = Loader(noise(27)).images.batch(np.arange(27))
  image, label = features._task(batch)
  np.testing.assert_array_equal(image, batch['image'])
  np.testing.assert_array_equal(label, batch['cond']['label'])


def test_where_there_are_none_every_image_is_given_a_quarter_turn():
  """Counter-clockwise, the next one more than the last; what was read stays as it is."""
  batch = noise(11, classes=()).batch(np.arange(11))
  before = batch['image'].copy()
  image, turns = features._task(batch)
  assert turns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2] and turns.dtype == np.int32
  for given, shown, k in zip(before, image, turns, strict=True):
    np.testing.assert_array_equal(shown, np.rot90(given, k))
  np.testing.assert_array_equal(batch['image'], before)


@pytest.mark.parametrize('classes', [('a', 'b', 'c'), ()])
@pytest.mark.parametrize('answer', [0, 2])
def test_accuracy_is_the_share_of_the_whole_images_that_are_told_rightly(
  few, extractor, classes, answer
):
  """A classifier that always gives one answer is right where that is the label, or the turn."""
  images = noise(27, broken=BROKEN, classes=classes)
  bias = jnp.arange(len(classes) or 4) == answer
  params = jax.tree.map(jnp.zeros_like, extractor.params)
  logits = {'kernel': jnp.zeros((64, len(bias))), 'bias': jnp.float32(bias)}
  label = images.labels if classes else np.arange(27) % SHOWN % 4
  right = [label[k] == answer for k in range(27) if k not in BROKEN]
  assert 0.0 < np.mean(right) < 1.0
  found = features._accuracy(params | {'logits': logits}, Loader(images))
  assert found == pytest.approx(np.mean(right))


def test_the_classifier_is_that_of_the_training_images_alone_however_they_are_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(features, '_UPDATES', 3)
  images = noise(27, broken={3, 4})
  made = [
    features.load_or_train(tmp_path / str(k), Loader(train), Loader(held_out))
    for k, (train, held_out) in enumerate(
      [(images, noise(9, 1)), (streamed(images), noise(9, 2)), (noise(27, broken={3}), noise(9, 1))]
    )
  ]
  one, same, other = made
  assert one.digest == same.digest == digest(same.params) != other.digest
  again = features.load_or_train(tmp_path / '0', None, None)
  for extractor in (one, again):
    assert (extractor.name, extractor.task, extractor.digest) == ('noise', 'classes', one.digest)
  assert again.accuracy == one.accuracy and one.params['logits']['bias'].shape == (3,)


def test_it_learns_to_tell_quarter_turns_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(features, '_UPDATES', 40)
  made = features.load_or_train(tmp_path / 'x', Loader(turned_up(50)), Loader(turned_up(30)))
  assert (made.name, made.task) == ('ramps', 'quarter turns')
  assert made.params['logits']['bias'].shape == (4,) and made.accuracy > 0.95


def test_a_set_of_which_nothing_can_be_read_is_no_reference(few, extractor):
  images = noise(9, broken=set(range(9)))
  with pytest.raises(Exception, match=r'9 images in a row, of .*, cannot be used') as error:
    kept_features.of_all(extractor, Loader(streamed(images)))
  assert not isinstance(error.value, BrokenImage)


def test_a_damaged_extractor_is_named_and_not_used(finished, tmp_path):
  whole = (finished / 'extractor.safetensors').read_bytes()
  path = tmp_path / 'extractor.safetensors'
  for position in (12, len(whole) // 2):
    content = bytearray(whole)
    content[position] ^= 1
    for damaged in (bytes(content), whole[: len(whole) // 2]):
      path.write_bytes(damaged)
      with pytest.raises(DamagedError, match=r'extractor\.safetensors is damaged'):
        features.load_or_train(path, None, None)
      assert path.read_bytes() == damaged


def test_the_stored_extractor_is_the_one_of_the_results(finished):
  extractor = features.load_or_train(finished / 'extractor.safetensors', None, None)
  results = json.loads((finished / 'results.json').read_text())
  assert extractor.digest == results['extractor']['digest']
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
  assert extractor(images).shape == (7, 64)
  np.testing.assert_allclose(extractor(images)[:2], extractor(images[:2]), rtol=1e-5)
