"""What the samples of an evaluation are measured by: real images in the features of an extractor, a CLIP model, or both."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation import by_class, curves, real_captions, real_images
from diffusion_distillation.evaluation.by_class import Classes
from diffusion_distillation.evaluation.clip_score import NAME
from diffusion_distillation.evaluation.extracted import Extracted, Extractors
from diffusion_distillation.evaluation.kept_features import OfEach
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.evaluation.results import empty, sampling_floor
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.stages import workdir as workdirs


class NoFeatures:
  """The extractor of an evaluation without images: all that it says of samples is how many they are."""

  name = digest = ''
  metric = curves.metric_name(NAME)

  def of(self, images: jax.Array) -> Extracted:
    """See `Extractor.of`; the features are (n, 0)."""
    return Extracted(np.zeros((len(images), 0), np.float32))


class Yardstick(NamedTuple):
  """What the samples of an evaluation are measured by.

  Attributes:
    extractors: the feature extractors.
    reference: features of real images, with which those of samples are compared; None without images.
    floor: the part of the Frechet distance of as many real images as a row has samples that decreases with their number.
    label_counts: number of training images of each class, if labels are drawn in their proportions; else ().
    classes: what is known about the classes of the training images.
    searched: features of the training images among which the report looks for the nearest; None: it does not.
  """

  extractors: Extractors
  reference: Features | None
  floor: float = 0.0
  label_counts: tuple[int, ...] = ()
  classes: Classes = by_class.NO_CLASSES
  searched: OfEach | None = None


def make(
  config: Config,
  train: Loader | None,
  workdir: pathlib.Path,
  labels: str | None,
  texts: SampledTexts | None,
) -> tuple[Yardstick, dict[str, Any]]:
  """Returns what samples are measured by, and results without rows.

  Args:
    config: the config of the run.
    train: the training images; None for a dataset without images, whose samples only have a CLIP score.
    workdir: the directory of the run, where features are kept.
    labels: see `results.empty`.
    texts: what models of texts draw; None for other models.
  """
  if train is None:
    assert texts is not None  # or else nothing can be measured
    by, results = Yardstick(Extractors(NoFeatures()), None), empty(NoFeatures.metric, texts.name, labels)
  else:
    by, results = _of_images(config, train, workdir, labels, texts)
  if texts is not None:
    results |= texts.describe()
    results['metrics'] |= texts.metrics()
    if train is not None:
      section, clip = config.evaluation, texts.asked.clip
      real_captions.add(results, clip, train, workdir, section.num_samples, section.seed)
  return by, results


def _of_images(
  config: Config,
  train: Loader,
  workdir: pathlib.Path,
  labels: str | None,
  texts: SampledTexts | None,
) -> tuple[Yardstick, dict[str, Any]]:
  extractors = real_images.open_extractors(config, train, workdir)
  extractor, size, most = extractors.main, config.evaluation.num_samples, config.evaluation.neighbours
  has_classes = labels is not None or (texts is not None and texts.labelled)
  found = by_class.summary(extractor, train, size if has_classes else 0)
  searched = OfEach('searched', most) if most else None
  more = [summary for summary in (found, searched) if summary is not None]
  real, results = real_images.summarize(config, extractors, train, workdir, labels, more=more)
  counts = workdirs.count_labels(workdir, train.images) if labels == 'data' else ()
  classes = by_class.classes(extractor, train, found)
  of_training_images = real.floor if 'file' in results['reference'] else real.reference
  results['class_shares'] = classes.shares(of_training_images.some)
  floor = sampling_floor(results)
  return Yardstick(extractors, real.reference, floor, counts, classes, searched), results
