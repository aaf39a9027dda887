"""Measures a stage's samples at intervals during training, keeps the weights that were best, and stops a stage early.

stage_dir/best/        the model with the lowest Frechet distance so far; see `stages/model.py`
stage_dir/track.json   the distance at each measured update with its error, and the update of the best

A measurement improves on the earlier ones if it is below the last improvement by more than its own standard error. With
`early_stop.patience` = K, a stage ends after K measurements in a row without an improvement. Whether it does is a function of
the recorded measurements up to that update, so that a stage that is interrupted and resumed ends at the same update. The
first moving average of the finished stage is then the best one that was measured.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_distillation import datasets
from diffusion_distillation.config import NOT_NEGATIVE, Config, key
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import RunningMoments, frechet_distance
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.evaluation.uncertainty import error_and_bias
from diffusion_distillation.networks.lora import Adapters
from diffusion_distillation.run import samples
from diffusion_distillation.stages import adapters, provenance, trained
from diffusion_distillation.stages import model as models
from diffusion_distillation.stages.provenance import Model, Parents
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.training.state import Params, TrainState

BEST, _RECORD = 'best', 'track.json'


@dataclasses.dataclass(frozen=True)
class EarlyStopSection:
  """Ending a stage before its last update, when its samples have stopped improving."""

  patience: int = key(
    0,
    'Number of measurements in a row, `log.frechet_every` updates apart, without an improvement of the Frechet distance beyond '
    'its standard error, after which a stage ends; its first moving average is then the best one that was measured. 0: every '
    'stage has all its updates, and keeps its last average.',
    NOT_NEGATIVE,
  )


def check(config: Config) -> None:
  """Raises UserError if the section `early_stop` is not valid."""
  if not (patience := config.early_stop.patience):
    return
  if not config.log.frechet_every:
    raise UserError(
      f'early_stop.patience={patience} counts measurements, but log.frechet_every=0 takes none; set log.frechet_every to the '
      'number of updates between two measurements'
    )
  if not datasets.has_images(name := config.dataset.name):
    raise UserError(
      f'early_stop.patience={patience} needs images to compare samples with, and dataset.name={name} has none; set '
      'early_stop.patience=0'
    )


def is_stopped(values: Mapping[int, float], errors: Mapping[int, float], patience: int) -> bool:
  """Whether the last `patience` measurements have not improved on the earlier ones.

  Args:
    values: the distances by number of updates.
    errors: their standard errors; 0 where one is missing.
    patience: the number of measurements; 0: never.
  """
  lowest, since = float('inf'), 0
  for done in sorted(values):
    if values[done] < lowest - errors.get(done, 0.0):
      lowest, since = values[done], 0
    else:
      since += 1
  return 0 < patience <= since


class Tracker:
  """Measures the first moving average of a stage every `log.frechet_every` updates, and at its end.

  The value is the Frechet distance of `log.frechet_samples` images, drawn with the sampler of the evaluation from other noise. All
  measurements of a stage have the same noise, so that small differences between them mean something; values with different
  numbers of samples cannot be compared.

  Args:
    config: the config of the run.
    stage: the stage in training.
    workdir: the directory of the run.
    parents: the parents of the stage, for the provenance of its best model.
    extractor: the feature extractor.
    reference: features of the training images.
    texts: what a model of texts draws; None for other models.
  """

  def __init__(
    self,
    config: Config,
    stage: Stage,
    workdir: pathlib.Path,
    parents: Parents,
    extractor: FeatureExtractor,
    reference: Features,
    texts: SampledTexts | None = None,
  ) -> None:
    self._config, self._stage, self._workdir, self._parents = config, stage, workdir, parents
    self._extractor, self._reference, self._texts = extractor, reference, texts

  def due(self, done: int) -> bool:
    """Whether to measure after update `done`."""
    ends = (*self._stage.earlier_ends, self._stage.num_updates)
    return done % self._config.log.frechet_every == 0 or done in ends

  def ends(self, done: int) -> bool:
    """Whether the stage ends after update `done` with its best weights; False without early stopping."""
    patience, found = self._config.early_stop.patience, self._recorded()
    if not patience or str(done) not in found['frechet']:
      return False
    values, errors = (
      {int(at): value for at, value in found[name].items() if int(at) <= done}
      for name in ('frechet', 'errors')
    )
    return done == self._stage.num_updates or is_stopped(values, errors, patience)

  def with_best(self, state: TrainState) -> tuple[TrainState, bool]:
    """Returns the state with the best weights as its first moving average, and whether these were other ones."""
    folder, (ema, *others) = self._workdir / self._stage.name / BEST, state.ema_params
    stored = models.read(folder)
    best = (
      stored.params if self._stage.recipe.lora is None else adapters.read(folder, stored.params).factors
    )
    if digest(ema) == digest(best):
      return state, False
    averages = type(state.ema_params)([sharding.place(best), *others])
    return dataclasses.replace(state, ema_params=averages), True

  def outcome(self, done: int) -> dict[str, Any]:
    """Returns what stage.json records of a stage that ended after update `done`; empty without early stopping."""
    if not self._config.early_stop.patience:
      return {}
    found = {
      name: value for name, value in self._recorded().items() if name not in ('frechet', 'errors')
    }
    return {
      'early_stop': {'patience': self._config.early_stop.patience, 'updates': done, 'measured': found}
    }

  def forget(self, done: int) -> None:
    """Drops what was measured after update `done`, to which training goes back to continue with other batches.

    The best weights are those of the best measurement that remains; if they are no longer there, the next measurement is the best.
    """
    found = self._recorded()
    for name in ('frechet', 'errors'):
      found[name] = {at: value for at, value in found[name].items() if int(at) <= done}
    if found['best'] is not None and found['best']['updates'] > done:
      found['best'] = None
    write_json(self._workdir / self._stage.name / _RECORD, found)
    cluster.barrier()

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
    """Returns the distance of the first moving average after update `done`, and records it; with LoRA, `params` are its factors."""
    found = self._recorded()  # in every process, before the first one writes
    known, weights = found['best'], params
    if self._stage.recipe.lora is not None:
      assert self._parents.start is not None
      weights = trained.weights_on_host(self._stage, params, self._parents.start.params)
    value, error = cluster.from_first(self._distance(weights))  # processes may differ in the last bits
    if known is None or value < known['frechet']:
      self._keep(done, weights, params)
      found['best'] = {'updates': done, 'frechet': value}
    found['frechet'][str(done)], found['errors'][str(done)] = value, error
    write_json(self._workdir / self._stage.name / _RECORD, found)
    cluster.barrier()
    return value

  def _distance(self, params: Params) -> tuple[float, float]:
    """Returns the Frechet distance of samples, and its standard error."""
    config, count = self._config, self._config.log.frechet_samples
    args = (config, self._workdir, self._extractor, self._stage, params, count)
    drawn = samples.features_of(*args, texts=self._texts)
    running = RunningMoments()
    running.add(drawn)
    moments, reference = running.result(), self._reference.moments
    error, _ = error_and_bias(moments, drawn, count, reference)
    return frechet_distance(reference, moments), error

  def _keep(self, done: int, weights: Params, params: Params) -> None:
    """Writes the weights as the best model; with LoRA, `params` are the factors in them."""
    on_host: Any = sharding.to_host(weights)
    of, sets = self._stage.recipe.lora, {'ema': on_host}
    adapted = None if of is None else Adapters(sharding.to_host(params), of.scale)
    model = Model(self._stage, 'ema', digest(on_host), done, 0.0, sets, adapters=adapted)
    stored = provenance.to_stored(self._workdir, model, self._config, self._parents)
    made = {key: value for key, value in stored.provenance.items() if key != 'seconds'}
    folder = self._workdir / self._stage.name / BEST
    models.write(folder, dataclasses.replace(stored, provenance=made), anew=True)

  def check_record(self) -> None:
    """Raises UserError if the stage is stopped early and earlier measurements were taken in another way."""
    self._recorded()

  def _recorded(self) -> dict[str, Any]:
    """Returns the measurements of the stage by number of updates, and the best one."""
    path, samples_of = self._workdir / self._stage.name / _RECORD, self._described()
    found = read_json(path) if path.is_file() else {}
    changed = [name for name, value in samples_of.items() if found.get(name) != value]
    if changed and found.get('frechet') and self._config.early_stop.patience:
      listed = ', '.join(f'{name} was {found.get(name)}, is {samples_of[name]}' for name in changed)
      raise UserError(
        f'{path}: stage {self._stage.name} is stopped early by measurements that were taken in another way: {listed}. Measure '
        f'in the same way, or remove {path.parent} to train this stage again'
      )
    if changed:
      return {**samples_of, 'frechet': {}, 'errors': {}, 'best': None}  # measured in another way
    found.setdefault('errors', {})  # older versions did not record them
    if not isinstance(found.get('frechet'), dict) or 'best' not in found:
      raise DamagedError(f'{path} is damaged (no measurements in it); remove it')
    return found

  def _described(self) -> dict[str, Any]:
    """Returns everything that measurements must share to be compared."""
    log = self._config.log
    found: dict[str, Any] = {}
    if self._config.early_stop.patience:
      found['every'] = log.frechet_every
    return found | {
      'samples': log.frechet_samples,
      'steps': self._stage.num_steps,
      'extractor': self._extractor.digest,
      **samples.describe(self._config, self._stage, self._texts),
    }


def begin(
  config: Config,
  stage: Stage,
  workdir: pathlib.Path,
  images: Loader,
  parents: Parents,
  texts: SampledTexts | None = None,
) -> Tracker:
  """Creates the tracker of a stage; makes the run's feature extractor and its reference if they do not exist yet."""
  extractor, reference = samples.prepare(config, workdir, images)
  (workdir / stage.name).mkdir(exist_ok=True)
  tracker = Tracker(config, stage, workdir, parents, extractor, reference, texts)
  tracker.check_record()
  return tracker


def read_best(workdir: pathlib.Path, names: Sequence[str]) -> models.StoredModel:
  """Reads the best model of the first stage in `names` that has one, finished or not; raises UserError if none has."""
  for name in names:
    if (workdir / name / BEST / models.DESCRIPTION).is_file():
      return models.read(workdir / name / BEST)
  raise UserError(
    f'--weights=best: {" and ".join(names)} of {workdir} kept no best weights; a run keeps them with log.frechet_every above 0'
  )
