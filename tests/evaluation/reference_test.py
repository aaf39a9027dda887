"""Features of real images: they are kept for the images and the extractor that they were computed with."""

import itertools

import numpy as np
import pytest

from diffusion_distillation.datasets.image_set import InMemory
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import by_class, kept_features, metrics, reference
from diffusion_distillation.evaluation.extracted import Extracted

KINDS = ('reference', 'held_out', 'floor')


class Extractor:
  """Features are some pixels of each image, with logits and spatial features, which are kept as well."""

  def __init__(self, digest):
    self.digest, self.seen = digest, []

  def of(self, images):
    pixels = np.asarray(images, np.float32).reshape(len(images), -1)
    self.seen.append(len(images))
    return Extracted(pixels[:, :3], pixels[:, :2] / 99, pixels[:, 3:7])


def images(count, identity, broken=()):
  pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 1), np.uint8)
  labels = np.arange(count, dtype=np.int32) % 2
  skipped = {k: 'broken' for k in broken}
  return Loader(InMemory('noise', (8, 8, 1), ('a', 'b'), identity, pixels, labels, skipped))


@pytest.fixture
def read(monkeypatch):
  """Numbers of images that were read together."""
  found, really = [], InMemory.batch
  monkeypatch.setattr(
    InMemory, 'batch', lambda self, index: found.append(len(index)) or really(self, index)
  )
  return found


def loaded(directory, digest='a', train='t', held_out='h', size=5, seed=1, more=()):
  args = (images(20, train), images(10, held_out), size, seed)
  return reference.load_or_compute(directory, Extractor(digest), *args, more=more)


def drawn(size, seed):
  return np.random.Generator(np.random.Philox(seed)).integers(20, size=size)


def test_features_are_those_of_the_images_and_the_extractor_that_are_named(tmp_path, read):
  made = loaded(tmp_path / 'features')
  assert read == [20, 10]  # the floor is computed in the pass of the reference
  read.clear()
  found = loaded(tmp_path / 'features')
  assert not read
  for one, other, count in zip(made, found, (20, 10, 5), strict=True):
    assert one.count == other.count == count
    arrays = kept_features.to_arrays(one)
    assert arrays.keys() == kept_features.to_arrays(other).keys() and len(arrays) == 9
    for name, array in arrays.items():
      np.testing.assert_array_equal(array, kept_features.to_arrays(other)[name], strict=True)
  changes = {'digest': 'b', 'train': 'u', 'held_out': 'i', 'size': 6, 'seed': 2}
  some = {name: len(set(drawn(*of))) for name, of in (('size', (6, 1)), ('seed', (5, 2)))}
  due = {
    'digest': [20, 10],
    'train': [20],
    'held_out': [10],
    'size': [some['size']],
    'seed': [some['seed']],
  }
  for name, change in changes.items():
    read.clear()
    loaded(tmp_path / 'features', **{name: change})
    assert read == due[name]
    loaded(tmp_path / 'features')


def test_everything_is_computed_in_one_pass_and_is_what_it_would_be_alone(tmp_path, read):
  """Broken images are left out of everything; the floor counts an image as often as it is drawn."""
  train, held_out, extractor = images(20, 't', broken=(3,)), images(10, 'h'), Extractor('a')
  each, classes = kept_features.OfEach('searched', 7), by_class.ByClass(2, 3)
  found = reference.load_or_compute(tmp_path, extractor, train, held_out, 40, 1, more=[each, classes])
  assert read == [20, 10] and len(extractor.seen) == 2
  pixels = train.images.images.reshape(20, -1).astype(np.float64)
  intact = np.arange(20) != 3
  chosen = [k for k in drawn(40, 1) if k != 3]
  for features, rows in ((found.reference, pixels[intact]), (found.floor, pixels[chosen])):
    np.testing.assert_allclose(features.moments.mean, rows[:, :3].mean(0))
    np.testing.assert_allclose(features.moments.cov, np.cov(rows[:, :3].T), rtol=1e-6)
    np.testing.assert_allclose(features.spatial.moments.mean, rows[:, 3:7].mean(0))
    assert features.count == len(rows) and sorted(features.some[:, 0]) == sorted(rows[:, 0])
  root = vars(found.reference.moments)['root']  # it was read from the file
  np.testing.assert_allclose(root @ root, found.reference.moments.cov, rtol=1e-6)
  assert 'root' in vars(found.reference.spatial.moments)
  places = [k for k in metrics.some_of(20, 7) if k != 3]
  assert each.places.tolist() == places
  np.testing.assert_array_equal(each.features, pixels[places][:, :3])
  odd = pixels[1::2][np.arange(10) != 1]
  assert classes.result.counts.tolist() == [10, 9]
  np.testing.assert_allclose(classes.result.of(1).mean, odd[:, :3].mean(0))


DAMAGES = {
  'short': lambda whole: whole[:-5],
  'empty': lambda whole: b'',
  'one bit': lambda whole: whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:],
  'other': lambda whole: b'x' * 500,
}


def test_damaged_features_are_computed_again_with_a_warning(tmp_path, caplog, read):
  loaded(tmp_path)
  whole = {kind: (tmp_path / f'{kind}.safetensors').read_bytes() for kind in KINDS}
  for (name, damage), kind in itertools.product(DAMAGES.items(), KINDS):
    (tmp_path / f'{kind}.safetensors').write_bytes(damage(whole[kind]))
    caplog.clear()
    read.clear()
    loaded(tmp_path)
    assert len(read) == 1, name
    (record,) = caplog.records
    assert f'{kind}.safetensors is damaged' in record.getMessage()
    read.clear()
    loaded(tmp_path)
    assert not read
