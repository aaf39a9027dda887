"""The CLIP score: how well images show what their prompts say, as the cosine similarity of CLIP's embeddings, times 100.

The score of a set is the mean of 100 cos(image, text) over the images (Hessel et al. 2021 define 2.5 max(cos, 0) for one image;
torchmetrics' `clip_score` is this mean, and 0 if the mean is below 0). It depends on the CLIP model: scores of different
models cannot be compared. `interop/clip.py` reads a model.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_distillation.evaluation.uncertainty import Estimate
from diffusion_distillation.networks.clip_vision import CLIPVision
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import Params

NAME, BETTER = 'clip_score', 'higher'
AT_ONCE = 64  # maximum number of images per device at a time, which bounds the memory


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What transformers' CLIPImageProcessor does to images.

  Attributes:
    shortest_edge: the shorter side to which images are resized, bicubic, in pixels.
    crop: height and width of the central part that is kept.
    scale: multiplies the values 0 ... 255.
    mean, std: of each channel, subtracted and divided by after that.
  """

  shortest_edge: int = 224
  crop: tuple[int, int] = (224, 224)
  scale: float = 1 / 255
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

  def __call__(self, image: np.ndarray) -> np.ndarray:
    """Maps an image (H, W, C) uint8, with one channel or three, to (h, w, 3) float32."""
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image).convert('RGB')
    width, height = picture.size
    short, long = sorted((width, height))
    resized = int(self.shortest_edge * long / short)
    size = (self.shortest_edge, resized) if width <= height else (resized, self.shortest_edge)
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    scaled = (pixels.astype(np.float64) * self.scale).astype(np.float32)
    return (self._central(scaled) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

  def _central(self, pixels: np.ndarray) -> np.ndarray:
    """Returns the central part; zeros surround an image that is smaller."""
    height, width = self.crop
    missing = [max(0, wanted - have) for wanted, have in zip(self.crop, pixels.shape, strict=False)]
    pixels = np.pad(pixels, [(-(-m // 2), m // 2) for m in missing] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """A CLIP model.

  Attributes:
    name: the name of its folder.
    digest: sha256 of all of its weights.
    vision: the image encoder, with its projection.
    vision_params: its parameters.
    text: the text encoder.
    text_projection: (D, P) float32, from its pooled embeddings to the space of images and texts.
    preprocessing: what is done to images.
  """

  name: str
  digest: str
  vision: CLIPVision
  vision_params: Params
  text: TextEncoder
  text_projection: np.ndarray
  preprocessing: Preprocessing

  def of_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the embeddings (n, P) float32, of length 1, of images (H, W, C) uint8, the same in every process."""
    size = sharding.round_up(min(AT_ONCE, len(images)))
    params, found = sharding.replicate(self.vision_params), []
    for start in range(0, len(images), size):
      some = np.stack([self.preprocessing(image) for image in images[start : start + size]])
      padded = np.pad(some, [(0, size - len(some)), (0, 0), (0, 0), (0, 0)])
      made = sharding.to_host(_embed(self.vision, params, sharding.spread(padded)))
      found.append(np.asarray(made)[: len(some)])
    return _normalized(np.concatenate(found))

  def of_texts(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings (n, P) float32, of length 1, of texts; a text of too many tokens is cut, with a warning."""
    found = []
    for start in range(0, len(texts), AT_ONCE):
      some = list(texts[start : start + AT_ONCE])
      padded = some + [''] * (min(AT_ONCE, len(texts)) - len(some))
      found.append(self.text.pooled(padded)[: len(some)])
    return _normalized(np.concatenate(found) @ self.text_projection)


@functools.partial(jax.jit, static_argnums=0)
def _embed(network: CLIPVision, params: Params, images: jax.Array) -> jax.Array:
  return jnp.asarray(network.apply({'params': params}, images), jnp.float32)


def _normalized(values: np.ndarray) -> np.ndarray:
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """Returns the score of each image with its text, (n,) float64, from their embeddings (n, P)."""
  found: np.ndarray = 100.0 * np.einsum('np,np->n', images, texts, dtype=np.float64)
  return found


def estimate(scores: np.ndarray) -> Estimate:
  """Returns the mean of the scores (n,) of images, with its standard error."""
  error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
  return Estimate(float(scores.mean()), error)


class RunningScore:
  """Accumulates the CLIP score of images and their prompts.

  Args:
    clip: the model.
    prompts: the prompt of each image.
  """

  def __init__(self, clip: Clip, prompts: Sequence[str]):
    self._clip, self._prompts = clip, prompts
    self._scores = list[np.ndarray]()

  def add(self, places: Sequence[int], images: np.ndarray) -> None:
    """Adds the images (n, H, W, C) uint8 of the prompts at `places`."""
    self.add_scores(self.of(places, images))

  def of(self, places: Sequence[int], images: np.ndarray) -> np.ndarray:
    """Returns the score of each image (n, H, W, C) uint8 with the prompt at its place, (n,) float64."""
    found = self._clip.of_images(list(images))
    return scores(found, self._clip.of_texts([self._prompts[k] for k in places]))

  def add_scores(self, found: np.ndarray) -> None:
    """Adds the scores (n,) of images."""
    self._scores.append(found)

  def result(self) -> Estimate:
    """Returns the mean over the images, with its standard error."""
    return estimate(np.concatenate(self._scores))
