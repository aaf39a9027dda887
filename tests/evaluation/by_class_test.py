"""Quality by class, with a classifier and features whose answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.datasets.image_set import InMemory
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import by_class, kept_features
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import RunningMoments, frechet_distance
from diffusion_distillation.networks.conditioning import Classes

DIMENSION = 3


def extractor(task='classes'):
  """A classifier that tells the class by the largest of three features; bias against the last."""
  logits = {'kernel': np.eye(DIMENSION), 'bias': np.array([0.0, 0.0, -1.0])}

  class Known(FeatureExtractor):
    def of(self, images):
      return Extracted(jnp.asarray(images, jnp.float32)[:, 0, :3, 0] / 16)

  return Known(name='known', digest='d', task=task, accuracy=1.0, params={'logits': logits})


def test_the_classifier_sees_what_its_last_layer_says():
  predict = by_class.predictor(extractor())
  features = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 2.5], [0.0, 1.0, 2.5]])
  assert predict(features).tolist() == [0, 1, 2]
  assert by_class.predictor(extractor('quarter turns')) is None


def test_accuracy_by_class_is_the_share_of_its_samples_that_are_recognized():
  tally = by_class.Tally(by_class.predictor(extractor()), 3, None)
  of = np.eye(3) * 4
  tally.add(of[[0, 0, 1]], {'label': np.array([0, 0, 0])})
  tally.add(of[[1, 1, 0, 0]], {'label': np.array([1, 1, 1, 1])})
  found = tally.result()
  assert found['class_accuracy'] == pytest.approx(4 / 7)
  assert found['by_class'] == {'count': [3, 4, 0], 'accuracy': [pytest.approx(2 / 3), 0.5, None]}


def test_of_an_unconditional_model_the_shares_are_shown():
  tally = by_class.Tally(by_class.predictor(extractor()), 3, None)
  tally.add(4 * np.eye(3)[[0, 0, 1, 0]], None)
  assert tally.result() == {'by_class': {'share': [0.75, 0.25, 0.0]}}
  known = by_class.Classes(by_class.predictor(extractor()), 3, None)
  assert known.shares(4 * np.eye(3)[[0, 2]]) == [0.5, 0.0, 0.5]


def test_without_a_classifier_of_classes_nothing_is_said():
  assert by_class.NO_CLASSES.shares(np.eye(3)) is None
  tally = by_class.NO_CLASSES.tally({'label': Classes(2)})
  tally.add(np.eye(3), {'label': np.array([0, 1, 1])})
  assert tally.result() == {}


def moments(features):
  running = RunningMoments()
  running.add(features)
  return running.result()


def train(counts, seed=0):
  """Images of the given number of each class, in mixed order, with the labels of which some are unknown."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
  labels[-1] = -1
  images = rng.integers(0, 256, (len(labels), 8, 8, 1)).astype(np.uint8)
  images[:, 0, :3, 0] //= 2
  images[np.arange(len(labels)), 0, labels, 0] += 100
  names = tuple('abc'[: len(counts)])
  return images, labels, Loader(InMemory('three', (8, 8, 1), names, 'i', images, labels))


def summarized(directory, loader, num_samples):
  found = by_class.summary(extractor(), loader, num_samples)
  kept_features.load_or_compute(directory, extractor(), loader, [found])
  return found


def test_the_distance_of_a_class_is_that_of_its_samples_to_its_training_images(tmp_path):
  images, labels, loader = train((40, 40, 5))
  known = by_class.classes(extractor(), loader, summarized(tmp_path, loader, 30))
  tally = known.tally({'label': Classes(3)})
  samples = np.random.default_rng(5).normal(size=(60, DIMENSION)).astype(np.float32)
  drawn_for = np.repeat([0, 1, 2], [5, 30, 25])
  for part in np.split(np.arange(60), 4):
    tally.add(samples[part], {'label': drawn_for[part]})
  found = tally.result()['by_class']
  assert found['frechet'][0] is None and found['frechet'][2] is None  # too few samples, too few images
  real = extractor()(images[labels == 1])
  expected = frechet_distance(moments(samples[drawn_for == 1]), moments(real))
  assert found['frechet'][1] == pytest.approx(expected, rel=1e-6)


def test_the_reference_is_computed_once_and_again_for_other_images(tmp_path, monkeypatch):
  computed = []
  really = kept_features.compute
  monkeypatch.setattr(kept_features, 'compute', lambda *args: computed.append(1) or really(*args))
  _, _, loader = train((20, 20))
  first = summarized(tmp_path, loader, 100).result
  again = summarized(tmp_path, loader, 100).result
  assert len(computed) == 1
  np.testing.assert_array_equal(first.cov, again.cov)
  moments = again.of(1)
  np.testing.assert_allclose(moments.root @ moments.root, moments.cov, atol=1e-6)
  assert np.shares_memory(moments.root, again.root)  # it is read, not computed
  loader.images = InMemory('three', (8, 8, 1), ('a', 'b'), 'other', *train((20, 20), 1)[:2])
  summarized(tmp_path, loader, 100)
  assert len(computed) == 2
  (tmp_path / 'by_class.safetensors').write_bytes(b'damaged')
  summarized(tmp_path, loader, 100)
  assert len(computed) == 3


def test_no_images_are_read_where_samples_do_not_suffice():
  _, _, loader = train((20, 20))
  loader.in_order = None
  assert by_class.summary(extractor(), loader, 2 * 2 * DIMENSION - 1) is None
  loader.images = InMemory('none', (8, 8, 1), (), 'i', *train((20, 20))[:2])
  assert by_class.summary(extractor(), loader, 100) is None
