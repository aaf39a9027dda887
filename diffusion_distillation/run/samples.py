"""The features of samples and of training images, for measurements between the updates and the stages of a run."""

import pathlib

import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.evaluation import measure
from diffusion_distillation.evaluation.features import FeatureExtractor, load_or_train
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.evaluation.reference import directory_of, of_training_images
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

  Sampler, seed and batches are those of the evaluation, and so are the `texts` of a model that takes them. If `name` is
  given, shows progress under this name.
  """
  counts = measure.label_counts(config, workdir)
  draw = measure.drawer(config, stage, stage.sampler, counts, guidance, texts=texts)
  grid, seed = measure.grid(config, stage, stage.num_steps), config.evaluation.seed
  found: list[np.ndarray] = []
  progress = None if name is None else Progress(name, count)
  for images, size in draw.batches(params, grid, count, seed):
    found.append(sharding.to_host(extractor.of(images).features)[:size])
    if progress is not None:
      progress.advance(size)
  return np.concatenate(found)
