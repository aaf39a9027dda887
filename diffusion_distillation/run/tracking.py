"""Measures a stage's samples at intervals during training, and keeps the weights that were best.

stage_dir/best/        the model with the lowest Frechet distance so far; see `stages/model.py`
stage_dir/track.json   the distance at each measured update, and the update of the best
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import RunningMoments, frechet_distance
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.run import samples
from diffusion_distillation.stages import model as models
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages.provenance import Model, Parents
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.training.state import Params, TrainState

BEST, _RECORD = 'best', 'track.json'


class Tracker:
  """Measures the first moving average of a stage every `log.frechet_every` updates, and at its end.

  The value is the Frechet distance of `log.frechet_samples` images, drawn with the sampler and the seed of the evaluation. All
  measurements of a stage have the same noise, so that small differences between them mean something; values with different
  numbers of samples cannot be compared.

  Args:
    config: the config of the run.
    stage: the stage in training.
    workdir: the directory of the run.
    parents: the parents of the stage, for the provenance of its best model.
    extractor: the feature extractor.
    reference: features of the training images.
  """

  def __init__(
    self,
    config: Config,
    stage: Stage,
    workdir: pathlib.Path,
    parents: Parents,
    extractor: FeatureExtractor,
    reference: Features,
  ) -> None:
    self._config, self._stage, self._workdir, self._parents = config, stage, workdir, parents
    self._extractor, self._reference = extractor, reference

  def due(self, done: int) -> bool:
    """Whether to measure after update `done`."""
    ends = (*self._stage.earlier_ends, self._stage.num_updates)
    return done % self._config.log.frechet_every == 0 or done in ends

  def resume(self, done: int, params: Params) -> None:
    """Measures the parameters after update `done`, from which training resumes, if a signal prevented this measurement.

    Measurements of later updates, which are on record if an older checkpoint was restored, are repeated when training gets there.
    """
    if done and self.due(done) and str(done) not in self._recorded()['frechet']:
      self.measure(done, params)

  def look(self, state: TrainState, frozen: Mapping[str, Params]) -> dict[str, float]:
    """Returns `frechet` after the update of `state`; writes its average to `best/` if no measurement was lower."""
    del frozen
    return {'frechet': self.measure(int(state.step), state.ema_params[0])}

  def measure(self, done: int, params: Params) -> float:
    """Returns the distance of the parameters after update `done`, and records it."""
    found = self._recorded()  # in every process, before the first one writes
    known = found['best']
    value = float(cluster.from_first(self._distance(params)))  # processes may differ in the last bits
    if known is None or value < known['frechet']:
      self._keep(done, params)
      found['best'] = {'updates': done, 'frechet': value}
    found['frechet'][str(done)] = value
    write_json(self._workdir / self._stage.name / _RECORD, found)
    cluster.barrier()
    return value

  def _distance(self, params: Params) -> float:
    config, count = self._config, self._config.log.frechet_samples
    drawn = samples.features_of(config, self._workdir, self._extractor, self._stage, params, count)
    running = RunningMoments()
    running.add(drawn)
    return frechet_distance(running.result(), self._reference.moments)

  def _keep(self, done: int, params: Params) -> None:
    """Writes the parameters as the best model."""
    on_host: Any = sharding.to_host(params)
    model = Model(self._stage, 'ema', digest(on_host), done, 0.0, {'ema': on_host})
    stored = provenance.to_stored(self._workdir, model, self._config, self._parents)
    made = {key: value for key, value in stored.provenance.items() if key != 'seconds'}
    folder = self._workdir / self._stage.name / BEST
    models.write(folder, dataclasses.replace(stored, provenance=made), anew=True)

  def _recorded(self) -> dict[str, Any]:
    """Returns the measurements of the stage by number of updates, and the best one."""
    path, samples_of = self._workdir / self._stage.name / _RECORD, self._described()
    found = read_json(path) if path.is_file() else {}
    if not all(found.get(key) == value for key, value in samples_of.items()):
      return {**samples_of, 'frechet': {}, 'best': None}  # measured in another way
    if not isinstance(found.get('frechet'), dict) or 'best' not in found:
      raise DamagedError(f'{path} is damaged (no measurements in it); remove it')
    return found

  def _described(self) -> dict[str, Any]:
    """Returns everything that measurements must share to be compared."""
    evaluation = self._config.evaluation
    return {
      'samples': self._config.log.frechet_samples,
      'seed': evaluation.seed,
      'clip_x': evaluation.clip_x,
      'labels': evaluation.labels,
      'steps': self._stage.num_steps,
      'extractor': self._extractor.digest,
    }


def begin(
  config: Config, stage: Stage, workdir: pathlib.Path, images: Loader, parents: Parents
) -> Tracker:
  """Creates the tracker of a stage; makes the run's feature extractor and its reference if they do not exist yet."""
  extractor, reference = samples.prepare(config, workdir, images)
  (workdir / stage.name).mkdir(exist_ok=True)
  return Tracker(config, stage, workdir, parents, extractor, reference)


def read_best(workdir: pathlib.Path, names: Sequence[str]) -> models.StoredModel:
  """Reads the best model of the first stage in `names` that has one, finished or not; raises UserError if none has."""
  for name in names:
    if (workdir / name / BEST / models.DESCRIPTION).is_file():
      return models.read(workdir / name / BEST)
  raise UserError(
    f'--weights=best: {" and ".join(names)} of {workdir} kept no best weights; a run keeps them with log.frechet_every above 0'
  )
