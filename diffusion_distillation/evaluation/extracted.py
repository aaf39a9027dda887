"""What a feature extractor computes of images, and the interface that every extractor has."""

from typing import NamedTuple, Protocol

import jax
import numpy as np


class Extracted(NamedTuple):
  """What an extractor computes of n images, on the devices or as NumPy arrays.

  Attributes:
    features: (n, D) float32, in which distributions of images are compared.
    logits: (n, K) float32, the scores of classes before the softmax; None if the extractor has no classifier.
    spatial: (n, S) float32, features that keep their position in the image; None if the extractor has none.
  """

  features: jax.Array | np.ndarray
  logits: jax.Array | np.ndarray | None = None
  spatial: jax.Array | np.ndarray | None = None


class Extractor(Protocol):
  """A fixed map from images to features."""

  @property
  def name(self) -> str:
    """Name of the extractor, or of the dataset that it was trained on."""
    ...

  @property
  def digest(self) -> str:
    """SHA-256 of the parameters. Distances of extractors with different digests cannot be compared."""
    ...

  @property
  def metric(self) -> str:
    """Name of the Fréchet distance in these features, such as 'FD-digits' or 'FID'."""
    ...

  def of(self, images: jax.Array) -> Extracted:
    """Maps (n, H, W, C) uint8 images on the devices to their features, without waiting for the result."""
    ...
