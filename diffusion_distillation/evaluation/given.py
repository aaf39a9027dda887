"""Features of images that come from elsewhere."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.extracted import Extractor
from diffusion_distillation.evaluation.features import FeatureExtractor, batch_size
from diffusion_distillation.evaluation.given_images import Batch, GivenImages
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.system.progress import Progress


def features_of(
  extractor: Extractor,
  images: GivenImages,
  image_shape: tuple[int, ...],
  also: Callable[[Sequence[int], np.ndarray], None] | None = None,
) -> tuple[Features, str]:
  """Computes the features of all images, and the sha256 of their shapes and pixels, in order.

  Args:
    extractor: the feature extractor.
    images: the images, the same in every process.
    image_shape: (H, W, C) of the dataset, which the images must have if the extractor is a classifier of the dataset.
    also: called with the places and the pixels of each batch, for other measurements.

  Raises:
    UserError: an image has another shape, or cannot be read.
  """
  size, running = batch_size(extractor, len(images)), RunningFeatures(len(images))
  digests = [b''] * len(images)
  steps = math.ceil(len(images) / size)

  def batches() -> Iterator[Batch]:
    for batch in images.batches(size):
      interrupts.check()
      for place, image in zip(batch.places, batch.images, strict=True):
        digests[place] = hashlib.sha256(f'{image.shape}'.encode() + image.tobytes()).digest()
      if also is not None:
        also(batch.places.tolist(), batch.images)
      yield batch

  with Progress('features of the images', steps, images_per_step=size) as progress:
    if (of_given := getattr(extractor, 'of_given', None)) is not None:  # it resizes images of any size
      for count, found in of_given(batches(), size):
        running.take(found, slice(count))
        progress.advance()
    else:
      for batch in batches():
        pixels = batch.images
        if isinstance(extractor, FeatureExtractor):
          pixels = _as_in_dataset(pixels, image_shape, images.source, extractor.metric)
        padded = np.pad(pixels, [(0, size - len(pixels)), (0, 0), (0, 0), (0, 0)])
        running.take(extractor.of(sharding.spread(padded)), slice(len(pixels)))
        progress.advance()
  return running.result(), hashlib.sha256(b''.join(digests)).hexdigest()


def check(images: GivenImages, image_shape: tuple[int, ...] | None, metric: str) -> None:
  """Checks images before anything is computed.

  Args:
    images: the images.
    image_shape: (H, W, C) of the dataset, if the extractor compares images of this shape only; else None.
    metric: name of the distance, for the message.

  Raises:
    UserError: there are fewer than two images, or the first ones have another shape.
  """
  if len(images) < 2:
    raise UserError(f'{images.source} holds {len(images)} image; a distance needs at least 2')
  if image_shape is not None:
    _as_in_dataset(next(images.batches(2)).images, image_shape, images.source, metric)


def _as_in_dataset(
  pixels: np.ndarray, image_shape: tuple[int, ...], source: str, metric: str
) -> np.ndarray:
  """Returns images (n, H, W, C) with the dataset's number of channels; raises UserError for another size."""
  height, width, channels = image_shape
  is_grey = channels == 1 and pixels.shape[-1] == 3 and (pixels == pixels[..., :1]).all()
  found = pixels[..., :1] if is_grey else pixels
  if channels == 3 and pixels.shape[-1] == 1:
    found = pixels.repeat(3, axis=-1)
  if found.shape[1:] != image_shape:
    shape = ' x '.join(map(str, pixels.shape[1:]))
    raise UserError(
      f'{source} has images of {shape}, but {metric} compares images of {height} x {width} x {channels} (height, width, '
      'channels); write them in this size'
    )
  return found
