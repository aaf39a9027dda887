"""The CLIP score of real images and their captions, which that of samples is compared with.

The images are those whose captions the first samples are drawn for, each once: `num_samples` of them, or all if there are fewer.

workdir/features/clip/clip_score.safetensors   the score of each image
"""

import pathlib
from typing import Any

import jax
import numpy as np

from diffusion_distillation.datasets.image_set import ImageSet
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.orders import shuffled
from diffusion_distillation.evaluation import kept_features
from diffusion_distillation.evaluation.clip_score import AT_ONCE, NAME, Clip, estimate, scores
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.kept_features import Arrays, Summary
from diffusion_distillation.system import sharding


class _Embeddings:
  """A CLIP model as an `Extractor`, whose features are the embeddings of the images."""

  name, metric = 'clip', NAME
  at_once = AT_ONCE

  def __init__(self, clip: Clip) -> None:
    self._clip, self.digest = clip, clip.digest

  def of(self, images: jax.Array) -> Extracted:
    """See `Extractor.of`; it waits for the result."""
    return Extracted(self._clip.of_images(list(sharding.to_host(images))))


class _OfCaptions(Summary):
  """The score of each image with its caption, (n,) float64, in the order of the images; `scores` is set by `load`."""

  name = NAME

  def __init__(self, clip: Clip, images: ImageSet, size: int, seed: int) -> None:
    self._clip, self._images, self._seed = clip, images, seed
    self._size = min(size, len(images))
    self.scores: np.ndarray

  def described(self) -> dict[str, Any]:
    return {'size': self._size, 'seed': self._seed}

  def begin(self, count: int) -> np.ndarray | None:
    self._parts: list[np.ndarray] = []
    return np.sort(shuffled(count, self._seed, np.arange(self._size)))

  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    del labels
    captions = [str(self._images.caption(int(k))) for k in places]
    self._parts.append(scores(np.asarray(found.features), self._clip.of_texts(captions)))

  def arrays(self) -> Arrays:
    return {'scores': np.concatenate(self._parts)}

  def load(self, arrays: Arrays) -> None:
    self.scores = arrays['scores']


def add(
  results: dict[str, Any],
  clip: Clip | None,
  train: Loader,
  workdir: pathlib.Path,
  size: int,
  seed: int,
) -> None:
  """Adds the CLIP score of the training images to what results say of the CLIP model, if there is one and images have captions.

  See `measure` for the other arguments.
  """
  if clip is not None and train.images.caption(0) is not None:
    results['clip']['real_images'] = measure(clip, train, workdir, size, seed)


def measure(clip: Clip, train: Loader, workdir: pathlib.Path, size: int, seed: int) -> dict[str, Any]:
  """Returns the CLIP score of the training images, which is computed once for a CLIP model, a size and a seed.

  Args:
    clip: the CLIP model.
    train: the training images, which have captions; unreadable ones are left out.
    workdir: the directory of the run, which keeps the scores.
    size: number of images at most, that of samples in a row.
    seed: seed of the samples.

  Returns:
    `value`, the mean, its standard `error`, None if there is one image, and `num_images`.
  """
  found = _OfCaptions(clip, train.images, size, seed)
  kept_features.load_or_compute(workdir / 'features' / 'clip', _Embeddings(clip), train, [found])
  train.close()
  of_images = estimate(found.scores)
  return {'value': of_images.value, 'error': of_images.error, 'num_images': len(found.scores)}
