"""The CLIP score of real images and their captions: of which images, once, and kept."""

import numpy as np
import pytest

from diffusion_distillation.datasets import InMemory
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import real_captions
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from tests.evaluation.clip_score_test import Directions

COUNT = 40
ANGLES = np.random.default_rng(0).integers(0, 180, (2, COUNT))  # of the images and of their captions


class Counted(Directions):
  """It counts the images that it has seen."""

  digest, seen = 'digest', 0

  def of_images(self, images):
    assert all(image.shape == (2, 2, 3) for image in images)
    self.seen += sum(image.any() for image in images)
    return super().of_images(images)


def images(broken=None):
  pixels = np.ones((COUNT, 2, 2, 3), np.uint8)
  pixels[:, 0, 0, 0] = ANGLES[0]
  captions = [str(angle) for angle in ANGLES[1]]
  return InMemory('x', (2, 2, 3), (), 'id', pixels, np.zeros(COUNT, np.int32), broken or {}, captions)


def expected(places):
  scores = 100 * np.cos(np.deg2rad(ANGLES[0, places] - ANGLES[1, places]))
  error = scores.std(ddof=1) / len(scores) ** 0.5
  return {
    'value': pytest.approx(scores.mean()),
    'error': pytest.approx(error),
    'num_images': len(scores),
  }


def test_all_images_are_scored_once_without_broken_ones(tmp_path):
  clip, loader = Counted(), Loader(images({7: 'is empty'}))
  every = np.delete(np.arange(COUNT), 7)
  assert real_captions.measure(clip, loader, tmp_path, 1000, 1) == expected(every)
  seen = clip.seen
  assert real_captions.measure(clip, loader, tmp_path, 2000, 1) == expected(every)
  assert clip.seen == seen == COUNT  # with the one that stands in for the broken one


def test_few_samples_are_compared_with_the_images_whose_captions_they_have(tmp_path):
  found = SampledTexts(None, images())
  places = found._places(np.arange(12), 3)
  assert len(set(places)) == 12
  score = real_captions.measure(Counted(), Loader(images()), tmp_path, 12, 3)
  assert score == expected(places)
  other = Counted()
  assert real_captions.measure(other, Loader(images()), tmp_path, 12, 4) != score
  assert other.seen == 12
