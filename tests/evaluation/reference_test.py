"""Features of real images: they are kept for the images and the extractor that they were computed with."""

import itertools

import numpy as np
import pytest

from diffusion_distillation.evaluation import features, reference

KINDS = ('reference', 'held_out', 'floor')


class Computed:
  """In place of an extractor: features are noise, and what is summed up is noted."""

  def __init__(self, digest):
    self.digest, self.asked = digest, []

  def summary(self, images, indices=None):
    """With logits and spatial features, in which case these are kept as well."""
    self.asked.append(len(images) if indices is None else len(indices))
    running = features.RunningFeatures(100)
    rng = np.random.default_rng(len(self.asked))
    running.add(*(rng.normal(size=(9, size)).astype(np.float32) for size in (3, 2, 4)))
    return running.result()


class Images:
  """As far as features depend on a loader's images."""

  def __init__(self, count, identity):
    self.images = self
    self.count, self.identity, self.image_shape = count, identity, (8, 8, 1)

  def __len__(self):
    return self.count


@pytest.fixture(autouse=True)
def computed(monkeypatch):
  summary = reference.summary

  def either(extractor, *args):
    return extractor.summary(*args) if isinstance(extractor, Computed) else summary(extractor, *args)

  monkeypatch.setattr(reference, 'summary', either)


def loaded(directory, digest='a', train='t', held_out='h', size=5, seed=1):
  """The features, and the numbers of images of which they were computed now."""
  extractor = Computed(digest)
  args = (Images(20, train), Images(10, held_out), size, seed)
  return reference.load_or_compute(directory, extractor, *args), extractor.asked


def test_features_are_those_of_the_images_and_the_extractor_that_are_named(tmp_path):
  made, asked = loaded(tmp_path / 'features')
  assert asked == [20, 10, 5]
  found, asked = loaded(tmp_path / 'features')
  assert not asked
  for one, other in zip(made, found, strict=True):
    assert one.count == other.count == 9
    arrays = reference._arrays(one)
    assert arrays.keys() == reference._arrays(other).keys() and len(arrays) == 7
    for name, array in arrays.items():
      np.testing.assert_array_equal(array, reference._arrays(other)[name], strict=True)
  changes = {'digest': 'b', 'train': 'u', 'held_out': 'i', 'size': 6, 'seed': 2}
  due = {'digest': [20, 10, 5], 'train': [20, 5], 'held_out': [10], 'size': [6], 'seed': [5]}
  for name, change in changes.items():
    assert loaded(tmp_path / 'features', **{name: change})[1] == due[name]
    loaded(tmp_path / 'features')


DAMAGES = {
  'short': lambda whole: whole[:-5],
  'empty': lambda whole: b'',
  'one bit': lambda whole: whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:],
  'other': lambda whole: b'x' * 500,
}


def test_damaged_features_are_computed_again_with_a_warning(tmp_path, caplog):
  loaded(tmp_path)
  whole = {kind: (tmp_path / f'{kind}.safetensors').read_bytes() for kind in KINDS}
  for (name, damage), kind in itertools.product(DAMAGES.items(), KINDS):
    (tmp_path / f'{kind}.safetensors').write_bytes(damage(whole[kind]))
    caplog.clear()
    assert len(loaded(tmp_path)[1]) == 1, name
    (record,) = caplog.records
    assert f'{kind}.safetensors is damaged' in record.getMessage()
    assert not loaded(tmp_path)[1]
