"""The features of samples and of training images, for measurements between the updates and the stages of a run.

These measurements decide which weights a stage keeps and when it ends. They draw from other noise than the evaluation: of
the same samples, the distance of weights that were selected by them would be too low.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.evaluation import measure
from diffusion_distillation.evaluation.features import FeatureExtractor, load_or_train
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.evaluation.reference import directory_of, of_training_images
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.networks.conditioning import Texts
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training.state import Params


def prepare(config: Config, workdir: pathlib.Path, images: Loader) -> tuple[FeatureExtractor, Features]:
  """Returns the extractor of a run and the features of its training images; makes their files as the evaluation does."""
  held_out = workdirs.open_images(config, 'eval')
  extractor = load_or_train(workdir / 'extractor.safetensors', images, held_out)
  held_out.close()
  return extractor, of_training_images(directory_of(workdir, extractor), extractor, images)


def seed_of(config: Config) -> int:
  """Returns the seed of these measurements, `evaluation.seed` with bit 30 inverted: never that of the evaluation's own samples."""
  return config.evaluation.seed ^ 2**30


def describe(config: Config, stage: Stage, texts: SampledTexts | None) -> dict[str, Any]:
  """Returns everything that a config can change about the samples of a stage's weights, beside their number."""
  section = config.evaluation
  found: dict[str, Any] = {
    'seed': seed_of(config),
    'clip_x': section.clip_x,
    'labels': section.labels,
    'grid': measure.grid_name(config, stage),
    **dataclasses.asdict(measure.make(config, stage.sampler)),
  }
  return found | ({} if texts is None else {'texts': texts.digest})


def features_of(
  config: Config,
  workdir: pathlib.Path,
  extractor: FeatureExtractor,
  stage: Stage,
  params: Params,
  count: int,
  guidance: Guidance = NONE,
  name: str | None = None,
  texts: Texts | None = None,
) -> np.ndarray:
  """Draws `count` images of a stage in its own number of steps and returns their features, (count, D) float32.

  Sampler and batches are those of the evaluation, and so are the `texts` of a model that takes them; the seed is `seed_of`. If
  `name` is given, shows progress under this name.
  """
  counts = measure.label_counts(config, workdir)
  draw = measure.drawer(config, stage, stage.sampler, counts, guidance, texts=texts)
  grid, seed = measure.grid(config, stage, stage.num_steps), seed_of(config)
  found: list[np.ndarray] = []
  progress = None if name is None else Progress(name, count)
  for images, size in draw.batches(params, grid, count, seed):
    found.append(sharding.to_host(extractor.of(images).features)[:size])
    if progress is not None:
      progress.advance(size)
  return np.concatenate(found)
