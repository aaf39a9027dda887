"""Evaluation of the stages of a workdir by itself, without training."""

import pathlib

from diffusion_distillation.config import Config
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import measure, reference
from diffusion_distillation.run import compared
from diffusion_distillation.stages import provenance, workdir
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage


def evaluate(config: Config, directory: pathlib.Path) -> pathlib.Path:
  """Measures every stage with a complete checkpoint again, and returns the path of the results.

  Args:
    config: the config of the run.
    directory: the workdir.

  Raises:
    UserError: there is nothing to measure samples by, or the base has no complete checkpoint.
  """
  planned, images = workdir.plan_for(directory, config)
  against = compared.of_run(config, planned, images, workdir.open_captions(directory, config))
  if not against.is_measured:
    raise UserError(
      f'--mode=evaluate needs images to compare with, and dataset.name={config.dataset.name} has none; set evaluation.clip=FOLDER '
      'for the CLIP score of a model of texts, or measure a stage with --workdir=STAGE/model and a --config that names images'
    )
  reference.check(config)
  with workdir.lock_workdir(directory):
    found = [_released(directory, stage, config) for stage in planned]
    models = [model for model in found if model is not None]
    if found[0] is None:
      raise UserError(f'--workdir={directory}: no complete checkpoint of {planned[0].name} yet')
    measure.evaluate(against.config, models, against.images, directory, again=True, texts=against.texts)
  return directory / 'results.json'


def _released(directory: pathlib.Path, stage: Stage, config: Config) -> Model | None:
  """Returns a stage's verified model, whose weights are loaded again when needed; None without a complete checkpoint."""
  model = provenance.load_model(directory, stage, config, stage.weights[:-1])
  return None if model is None else provenance.release(directory, model, ())
