"""Measures a model of texts with one image per prompt, and the CLIP score of images and their prompts."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.clip_score import Clip, RunningScore
from diffusion_distillation.evaluation.extracted import Extractors
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks.conditioning import NONE_OF
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system import sharding
from diffusion_distillation.system.progress import Progress


@dataclasses.dataclass(frozen=True)
class Prompted:
  """What the images should show.

  Attributes:
    file: the name of the file of prompts.
    prompts: the prompts.
    clip: measures how well they do; None: not measured.
  """

  file: str
  prompts: Sequence[str]
  clip: Clip | None

  def first(self, count: int) -> 'Prompted':
    """Returns the first `count` prompts; raises UserError if there are fewer."""
    if len(self.prompts) < count:
      raise UserError(
        f'evaluation.prompts={self.file} holds {len(self.prompts):,} prompts, but evaluation.num_samples={count:,} images are '
        'drawn, one for each; set it to that number or less'
      )
    return dataclasses.replace(self, prompts=self.prompts[:count])

  def check(self, count: int, source: str) -> None:
    """Raises UserError unless there is one prompt for each of `count` images from `source`."""
    if len(self.prompts) != count:
      raise UserError(
        f'evaluation.prompts={self.file} holds {len(self.prompts):,} prompts, but {source} holds {count:,} images; image k, in '
        'the order of the names, belongs to prompt k'
      )

  def describe(self) -> dict[str, Any]:
    """Returns what results say of the prompts and of the CLIP model."""
    digest = hashlib.sha256('\0'.join(self.prompts).encode()).hexdigest()
    found = {'prompts': {'file': self.file, 'num_prompts': len(self.prompts), 'digest': digest}}
    return found | (
      {} if self.clip is None else {'clip': {'name': self.clip.name, 'digest': self.clip.digest}}
    )

  def running(self) -> RunningScore | None:
    """Returns the accumulator of the CLIP score; None without a CLIP model."""
    return None if self.clip is None else RunningScore(self.clip, self.prompts)


NOT_ASKED = Prompted('', (), None)  # neither a file of prompts nor a CLIP model


def check_texts(asked: Prompted, stored: StoredModel | None = None, folder: object = None) -> None:
  """Raises UserError unless the texts can be encoded, by a model that draws them and for the CLIP score, before anything is drawn."""
  if stored is not None and stored.text is None:
    raise UserError(f'--workdir={folder}: this model has no text encoder, and cannot draw prompts')
  if stored is not None and stored.text is not None:
    stored.text.tokenize()
  if asked.clip is not None:
    asked.clip.text.tokenize()


def check_shape(stored: StoredModel, image_shape: tuple[int, ...], folder: object, dataset: str) -> None:
  """Raises UserError unless the model's images have the dataset's shape, or are larger squares, which are resized to it."""
  drawn, squares = stored.image_shape, len({*stored.image_shape[:2]}) == len({*image_shape[:2]}) == 1
  if drawn != image_shape and not (
    squares and drawn[0] > image_shape[0] and drawn[2] == image_shape[2] == 3
  ):
    raise UserError(
      f'--workdir={folder} draws images of shape {drawn}, which cannot be resized to those of dataset {dataset!r}, '
      f'{image_shape}; set dataset.image_size to {drawn[0]} or less, and dataset.channels to {drawn[2]}'
    )


def resized(images: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
  """Returns images (n, H, W, 3) uint8 with `image_shape`, resized with Pillow's Lanczos filter, which is antialiased."""
  if images.shape[1:] == image_shape:
    return images
  size = image_shape[1], image_shape[0]
  made = [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images]
  return np.stack([np.asarray(image) for image in made])


def draw(
  drawer: Drawer,
  stored: StoredModel,
  seed: int,
  extractors: Extractors,
  asked: Prompted,
  image_shape: tuple[int, ...],
) -> tuple[Features, RunningScore | None]:
  """Draws one image per prompt with the model's own sampler and steps.

  Image k has the noise of (seed, k). The CLIP score is that of the images as they are drawn; features are those of
  the images after they are resized to `image_shape`. The prompts of a batch are embedded when it is drawn.
  """
  count, size = len(asked.prompts), sharding.round_up(drawer.batch_size)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  assert stored.text is not None  # see `check_texts`
  tokenize, embed = stored.text.tokenize(), stored.text.embedder()
  no_text = np.asarray(embed(tokenize(['']))) if drawer.guidance else None
  params = sharding.replicate(stored.params)
  running, score = RunningFeatures(count), asked.running()
  with Progress('evaluation', math.ceil(count / size), images_per_step=size) as progress:
    for start in range(0, count, size):
      here = range(start, min(start + size, count))
      prompts = [asked.prompts[min(k, count - 1)] for k in range(start, start + size)]
      chosen: dict[str, Any] = {'text': np.asarray(embed(tokenize(prompts)))}
      chosen |= {} if no_text is None else {NONE_OF + 'text': no_text}
      batch = drawer.batches(params, grid, here.stop, seed, chosen, start)
      images = np.asarray(sharding.to_host(next(batch)[0]))[: len(here)]
      if score is not None:
        score.add(here, images)
      padded = np.pad(resized(images, image_shape), [(0, size - len(here)), (0, 0), (0, 0), (0, 0)])
      running.take(extractors.of(sharding.spread(padded)), slice(len(here)))
      progress.advance()
  return running.result(), score
