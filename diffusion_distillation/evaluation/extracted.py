"""What a feature extractor computes of images, and the interface that every extractor has."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import numpy as np


class Extracted(NamedTuple):
  """What an extractor computes of n images, on the devices or as NumPy arrays.

  Attributes:
    features: (n, D) float32, in which distributions of images are compared.
    logits: (n, K) float32, the scores of classes before the softmax; None if the extractor has no classifier.
    spatial: (n, S) float32, features that keep their position in the image; None if the extractor has none.
    dinov2: (n, F) float32, the features of DINOv2; None if the evaluation names no weights for it.
  """

  features: jax.Array | np.ndarray
  logits: jax.Array | np.ndarray | None = None
  spatial: jax.Array | np.ndarray | None = None
  dinov2: jax.Array | np.ndarray | None = None


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


@dataclasses.dataclass(frozen=True, eq=False)
class Extractors:
  """The extractors of an evaluation.

  Attributes:
    main: the extractor of all metrics but `fd_dinov2`.
    dinov2: the extractor of `fd_dinov2`; None if the evaluation names no weights for it.
  """

  main: Extractor
  dinov2: Extractor | None = None

  @property
  def digest(self) -> str:
    """The digests of all extractors."""
    return self.main.digest + ('' if self.dinov2 is None else f' {self.dinov2.digest}')

  @property
  def metric(self) -> str:
    """Name of the Fréchet distance in the features of `main`."""
    return self.main.metric

  def of(self, images: jax.Array) -> Extracted:
    """Maps (n, H, W, C) uint8 images on the devices to the features of all extractors, without waiting for the result."""
    found = self.main.of(images)
    return found if self.dinov2 is None else found._replace(dinov2=self.dinov2.of(images).features)
