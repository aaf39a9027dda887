"""The texts that the samples of an evaluation are drawn for: those that models are trained with, or the prompts of a file."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_distillation.datasets.image_set import BrokenImage, ImageSet
from diffusion_distillation.datasets.orders import shuffled
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.evaluation.clip_score import BETTER, NAME, RunningScore
from diffusion_distillation.evaluation.prompted import NOT_ASKED, Prompted
from diffusion_distillation.stages.texts import TextEncoder

_AT_ONCE = 8  # texts that are embedded together, whatever the batch of images, so that a text always has the same embeddings


@dataclasses.dataclass(frozen=True, eq=False)
class SampledTexts:
  """The texts of an evaluation's samples, as a `conditioning.Texts`.

  The texts of the dataset come in the order of `shuffled`: each epoch of samples has every text once, as the reference, if there
  is one, has every image once. Prompts of a file come in their order, and again from the first if there are fewer than samples.

  Attributes:
    encoder: the text encoder of the models.
    dataset: the texts of the dataset, an `ImageSet` if they are captions of training images; None if it has none.
    asked: the prompts of a file, () for the texts of the dataset; and what measures how well samples show their texts.
  """

  encoder: TextEncoder
  dataset: Captions | ImageSet | None
  asked: Prompted = NOT_ASKED

  @property
  def prompts(self) -> Sequence[str]:
    """The prompts of the file."""
    return self.asked.prompts

  def _places(self, index: np.ndarray, seed: int) -> np.ndarray:
    """Returns which texts the samples at `index` (n,) have."""
    return index % len(self.prompts) if self.prompts else shuffled(len(self._own), seed, index)

  @property
  def _own(self) -> Captions | ImageSet:
    assert self.dataset is not None  # or else there are prompts, see `compared.check`
    return self.dataset

  def texts(self, index: np.ndarray, seed: int) -> list[str]:
    """Returns the texts of the samples at `index` (n,), a function of (seed, index)."""
    places = map(int, self._places(index, seed))
    return [self.prompts[k] if self.prompts else str(self._own.caption(k)) for k in places]

  @property
  def name(self) -> str:
    """The name of the dataset, or of the file of prompts if it has no texts."""
    return self.asked.file if self.dataset is None else self.dataset.name

  @property
  def _labelled(self) -> ImageSet | None:
    """The images with classes whose captions the texts are."""
    found = self.dataset
    return found if isinstance(found, ImageSet) and found.classes and not self.prompts else None

  @property
  def labelled(self) -> bool:
    """Whether the texts have labels: those of the images whose captions they are."""
    return self._labelled is not None

  def labels(self, index: np.ndarray, seed: int) -> np.ndarray | None:
    """Returns the labels of the texts of the samples at `index` (n,) int32, -1 if one cannot be read; None without labels."""
    if (images := self._labelled) is None:
      return None
    places, known = self._places(index, seed), images.known_labels()
    found = known[places] if known is not None else [_label(images, int(k)) for k in places]
    return np.asarray(found, np.int32)

  def draw(self, index: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """See `conditioning.Texts.draw`."""
    found = self._embedded(self.texts(index, seed))
    return {'text': found, 'no_text': np.broadcast_to(self._no_text, found.shape)}

  def _embedded(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings (n, T, D) float32; a text of too many tokens is cut."""
    tokenize, embed = self._networks
    parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
    padded = [tokenize([*part, *[''] * (_AT_ONCE - len(part))], warns=False) for part in parts]
    found = [embed(tokens) for tokens in padded]  # all are dispatched before the first is waited for
    return np.concatenate([np.asarray(part, np.float32) for part in found])[: len(texts)]

  @functools.cached_property
  def _networks(self) -> tuple[Callable[..., np.ndarray], Callable[[np.ndarray], jax.Array]]:
    return self.encoder.tokenize(), self.encoder.embedder()

  @functools.cached_property
  def _no_text(self) -> np.ndarray:
    return self._embedded([''])

  def describe(self) -> dict[str, Any]:
    """Returns what `results.json` says of the texts, as `prompts` or `captions`, and of the CLIP model."""
    found = self.asked.describe()
    if self.prompts:
      return found
    del found['prompts']
    of, count = self._own, len(self._own)
    if isinstance(of, ImageSet):
      named = {'split': 'train', 'name': of.name, 'num_captions': count, 'digest': of.identity}
      return {'captions': named, **found}
    return {'prompts': {'dataset': of.name, 'num_prompts': count, 'digest': of.identity}, **found}

  @property
  def digest(self) -> str:
    """The digest of the texts: the identity of the images with their captions, or the sha256 of the prompts."""
    found = self.describe()
    return str((found.get('prompts') or found['captions'])['digest'])

  def of_row(self) -> dict[str, Any]:
    """Returns what a row says of them: with other texts, or scores by another CLIP model, it is measured again."""
    return {'texts': self.digest, 'clip': self.asked.clip and self.asked.clip.digest}

  def metrics(self) -> dict[str, dict[str, str]]:
    """Returns the metrics that rows have because of the texts, each with its better direction."""
    return {} if self.asked.clip is None else {NAME: {'better': BETTER}}

  def running(self, count: int, seed: int) -> RunningScore | None:
    """Returns the accumulator of the CLIP score of `count` samples; None without a CLIP model."""
    clip = self.asked.clip
    return None if clip is None else RunningScore(clip, self.texts(np.arange(count), seed))


def _label(images: ImageSet, k: int) -> int:
  """Returns the label of image k, -1 if it cannot be read."""
  try:
    return images.label(k)
  except BrokenImage:
    return -1
