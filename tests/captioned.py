"""A dataset of coloured squares with captions and labels, of the size and the vocabulary of `text_model`."""

import numpy as np

from diffusion_distillation import datasets
from diffusion_distillation.datasets import InMemory
from tests import text_model

NAME = 'squares'
CAPTIONS = ('a red circle', 'blue', 'a large green square')  # of each class
COUNTS = {'train': 24, 'eval': 12}


def open_squares(settings, role):
  """Images of a colour for each class, with noise; a third of them have a caption that begins otherwise."""
  count = COUNTS[role]
  rng, labels = np.random.default_rng(count), np.arange(count, dtype=np.int32) % len(CAPTIONS)
  images = rng.integers(0, 100, (count, *text_model.IMAGE), np.uint8)
  images[np.arange(count), :, :, labels] += 150
  captions = [('a ' if k % 4 == 0 else '') + CAPTIONS[label] for k, label in enumerate(labels)]
  classes = ('red', 'blue', 'green')
  identity = f'{count} squares'
  return InMemory(settings.name, text_model.IMAGE, classes, identity, images, labels, {}, captions)


def config(path, **changes):
  """The config of a run on these images, whose evaluation is small."""
  small = {
    'dataset__name': NAME,
    'dataset__path': '',
    'evaluation__grid': 'uniform',  # as the model's own times
    'evaluation__num_samples': 24,
    'evaluation__batch_size': 24,
    'evaluation__samplers': ('ddim',),
    'evaluation__neighbours': 0,
  }
  return text_model.config(path, **{**small, **changes})


def register(monkeypatch):
  """Adds the dataset to the table."""
  monkeypatch.setitem(datasets.SOURCES, NAME, open_squares)
