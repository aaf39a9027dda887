"""The quality gate: a student that falls short of its teacher is trained for longer, or ends the run.

stage_dir/gate.json   every measurement of the finished stage, and whether the student passed

Student and teacher are drawn from the same noise, each in its own number of steps, and compared with the training images by the
Frechet distance; the evaluation draws from other noise. The distance of n samples of a perfect model is not 0 but the floor, that of
n training images, which decreases as 1/n. A plain ratio of two distances therefore tends to 1 the fewer samples there are, and would let a bad student pass. So the
floor is subtracted from both. The difference may be close to 0 for a good teacher, and a quotient of two such numbers is mostly
noise. The gate therefore does not divide: with the distances S of the student and T of the teacher, the floor b and the factor f,
it computes the shortfall

  (S - b) - f (T - b),

which is at most 0 for a student that passes, and its standard error. The student fails if the shortfall exceeds two standard
errors: a student that is exactly as bad as allowed fails one time in forty. The error is that of the infinitesimal jackknife
(`evaluation/uncertainty.py`): the influences of a pair of samples with the same noise, one of the student and one of the teacher,
are subtracted, so that the noise that both share cancels. With few samples the error is large and only gross failures are found;
more samples make the gate stricter, never laxer.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_distillation import datasets
from diffusion_distillation.config import (
  POSITIVE,
  Config,
  Range,
  key,
)
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.errors import QualityError, UserError
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.frechet import Moments, RunningMoments, frechet_distance
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.evaluation.uncertainty import influences
from diffusion_distillation.networks import conditioning
from diffusion_distillation.run import samples
from diffusion_distillation.stages import extending
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster
from diffusion_distillation.system.files import read_json, write_json

_log = logging.getLogger(__name__)

_DRAWS = 16  # sets of training images whose mean distance is the floor
_SURE = 2.0  # standard errors by which a student must fall short to fail

FACTOR = Range('zero or at least 1', lambda v: v == 0 or 1 <= v < math.inf)
MULTIPLE = Range('at least 1', lambda v: 1 <= v < math.inf)
ENOUGH = Range('at least 20', lambda v: v >= 20)


@dataclasses.dataclass(frozen=True)
class GateSection:
  """The quality gate: after its training, each student is compared with its teacher."""

  factor: float = key(
    0.0,
    "Largest ratio of the student's Frechet distance to its teacher's, each less that of as many training images (the floor). "
    'A student above it is trained for longer; 0: no gate.',
    FACTOR,
  )
  samples: int = key(
    2000, 'Number of samples that are drawn from the student and from its teacher.', ENOUGH
  )
  extra: float = key(
    0.5,
    'Updates that a student that fails is trained further, as a fraction of those it has had.',
    POSITIVE,
  )
  limit: float = key(
    3.0, 'Largest number of updates of a stage, as a multiple of `num_updates`.', MULTIPLE
  )
  stop: bool = key(
    True, 'Whether the run stops if a student fails at the limit; otherwise, it warns and continues.'
  )


class Shortfall(NamedTuple):
  """How far a student falls short of its teacher; see the head of this file.

  Attributes:
    student: the Frechet distance of the student's samples, S.
    teacher: that of the teacher's, T.
    floor: that of as many training images, b.
    value: (S - b) - f (T - b).
    error: standard error of `value`.
  """

  student: float
  teacher: float
  floor: float
  value: float
  error: float

  @property
  def fails(self) -> bool:
    """Whether the student falls short of its teacher by more than the noise of the measurement."""
    return not self.value <= _SURE * self.error  # not finite: fails


def moments_of(features: np.ndarray) -> Moments:
  """Returns the moments of features (n, D)."""
  running = RunningMoments()
  running.add(features)
  return running.result()


class Floor(NamedTuple):
  """The mean Frechet distance between sets of training images and all of them, and its standard error."""

  value: float
  error: float


def floor_of(real: np.ndarray, count: int, seed: int) -> Floor:
  """Returns the floor of `count` images, which are drawn with replacement from those with the features `real` (N, D)."""
  rng, of_all = np.random.Generator(np.random.Philox(seed)), moments_of(real)
  drawn = (real[rng.integers(len(real), size=count)] for _ in range(_DRAWS))
  found = [frechet_distance(of_all, moments_of(some)) for some in drawn]  # whose root is computed once
  return Floor(float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(_DRAWS))


def shortfall(
  student: np.ndarray, teacher: np.ndarray, reference: Moments, floor: Floor, factor: float
) -> Shortfall:
  """Returns how far a student falls short of its teacher.

  Args:
    student: (n, D), features of the student's samples.
    teacher: (n, D), features of the teacher's samples from the same noise.
    reference: moments of the training images' features.
    floor: the floor of n images.
    factor: the largest ratio of the distances, each less the floor.
  """
  both = [(features, moments_of(features)) for features in (student, teacher)]
  of_student, of_teacher = (frechet_distance(reference, moments) for _, moments in both)
  value = (of_student - floor.value) - factor * (of_teacher - floor.value)
  by_student, by_teacher = (influences(moments, features, reference) for features, moments in both)
  of_samples = float(np.std(by_student - factor * by_teacher)) / math.sqrt(len(student))
  error = math.hypot(of_samples, (factor - 1.0) * floor.error)
  return Shortfall(of_student, of_teacher, floor.value, value, error)


def more_updates(stage: Stage, config: Config) -> int | None:
  """Returns the number of updates to which a stage that failed is extended; None if that is above `gate.limit`.

  The number is a multiple of the method's period if the planned number is, as for DMD with several updates of the fake score.
  """
  planned, period = stage.planned_updates or stage.num_updates, stage.recipe.method.period
  extra = -(-math.ceil(config.gate.extra * stage.num_updates) // period) * period
  most = math.floor(config.gate.limit * planned) // period * period
  total = min(stage.num_updates + extra, most)
  return total if total > stage.num_updates else None


class Gate:
  """Compares finished students with their teachers.

  Args:
    config: the config of the run, with `gate.factor` above 0.
    workdir: the directory of the run.
    images: the training images.
    real: the feature extractor and the features of the training images; None: those of the run.
    texts: what models of texts draw; None for other models.
  """

  def __init__(
    self,
    config: Config,
    workdir: pathlib.Path,
    images: Loader,
    real: tuple[FeatureExtractor, Features] | None = None,
    texts: SampledTexts | None = None,
  ) -> None:
    self._config, self._workdir, self._images = config, workdir, images
    self._real, self._texts = real, texts
    self._floor: Floor | None = None
    self._drawn: dict[tuple, np.ndarray] = {}  # features by model, so that each is drawn only once

  def judge(self, model: Model, teacher: Model) -> Stage | None:
    """Returns the stage with more updates if its student must be trained further, else None.

    A student that other stages were made from is not judged again: they would be stale.

    Raises:
      QualityError: the student fails at `gate.limit`, and `gate.stop` is set.
    """
    stage, config = model.stage, self._config
    if any(extending.made_from(self._workdir, stage.name)):
      return None
    found = self._measured(model, teacher)
    if not found.fails:
      return None
    total = None if config.early_stop.patience else more_updates(stage, config)
    what = (
      f'stage {stage.name} falls short of its teacher after {stage.num_updates} updates: its Frechet distance is '
      f"{found.student:.4g}, its teacher's {found.teacher:.4g}, that of training images {found.floor:.4g} "
      f'(gate.factor={config.gate.factor:g}, shortfall {found.value:.2g} +- {found.error:.1g})'
    )
    if total is not None:
      _log.warning('%s; training it to %d updates', what, total)
      return stage.lengthened(total)
    remedy = f'raise gate.limit={config.gate.limit:g} or gate.factor'
    if config.early_stop.patience:
      remedy = f'raise gate.factor, as early_stop.patience={config.early_stop.patience} decides how long a stage is trained'
    if config.gate.stop:
      raise QualityError(
        f'{what}; {remedy}, set gate.stop=False, or remove {self._workdir / stage.name} and train it with other settings'
      )
    _log.warning('%s; the run continues with it. To train it further, %s', what, remedy)
    return None

  def _measured(self, model: Model, teacher: Model) -> Shortfall:
    """Returns the shortfall from gate.json, or measures it and writes it there; the same in every process."""
    path = self._workdir / model.stage.name / 'gate.json'
    guidance = guidance_of(model.stage)
    described = {
      'updates': model.stage.num_updates,
      'student_digest': model.digest,
      'teacher_digest': teacher.digest,
      'factor': self._config.gate.factor,
      'samples': self._config.gate.samples,
      'student_steps': model.stage.num_steps,
      'teacher_steps': teacher.stage.num_steps,
      'teacher_guidance': guidance.weight,
      **samples.describe(self._config, model.stage, self._texts),
      **samples.describe(self._config, teacher.stage, self._texts),  # whose grid may be another one
    }
    extractor, reference = self._prepared()
    described['extractor'] = extractor.digest
    checks = read_json(path).get('checks', []) if path.is_file() else []
    known = [check for check in checks if described.items() <= check.items()]
    if cluster.agree(bool(known)):
      return Shortfall(**{name: known[-1][name] for name in Shortfall._fields})
    of_teacher = self._features(extractor, teacher, guidance)
    of_student = self._features(extractor, model)
    if self._floor is None:
      assert reference.some is not None  # the reference of the gate is the training images
      self._floor = floor_of(reference.some, described['samples'], described['seed'])
    measured = shortfall(of_student, of_teacher, reference.moments, self._floor, described['factor'])
    found = Shortfall(*cluster.from_first(list(measured)))  # processes may differ in the last bits
    write_json(path, {'checks': [*checks, described | found._asdict() | {'passed': not found.fails}]})
    cluster.barrier()
    return found

  def _prepared(self) -> tuple[FeatureExtractor, Features]:
    """Returns the extractor and the features of the training images."""
    if self._real is None:
      self._real = samples.prepare(self._config, self._workdir, self._images)
    return self._real

  def _features(
    self, extractor: FeatureExtractor, model: Model, guidance: Guidance = NONE
  ) -> np.ndarray:
    """Draws samples of a model in its own number of steps and returns their features, (n, D)."""
    stage, known = model.stage, (model.stage.name, model.digest, guidance)
    if known not in self._drawn:
      args = (self._config, self._workdir, extractor, stage, model.params, self._config.gate.samples)
      name = f'samples of {stage.name}'
      self._drawn[known] = samples.features_of(*args, guidance, name, self._texts)
    return self._drawn[known]


def guidance_of(stage: Stage) -> Guidance:
  """Returns the guidance with which a student's teacher must be sampled to draw what the student is trained to draw.

  A student that takes the weight as an input is drawn with its smallest weight, and so is its teacher.
  """
  if known := conditioning.weights(stage.denoise.conditioning):
    return make_guidance(known.low)
  if stage.pairs is not None:
    return stage.pairs.guidance
  return make_guidance(float(getattr(stage.recipe.method, 'guidance', 0.0)))


def make_gate(
  config: Config, workdir: pathlib.Path, images: Loader | None, texts: SampledTexts | None = None
) -> Gate | None:
  """Returns the gate of a run, or None if the config has none."""
  if not config.gate.factor or images is None:
    return None
  return Gate(config, workdir, images, texts=texts)


def check(config: Config) -> None:
  """Raises UserError if the section `gate` is not valid."""
  if config.gate.factor and not datasets.has_images(name := config.dataset.name):
    raise UserError(
      f'gate.factor={config.gate.factor:g} needs images to compare samples with, and dataset.name={name} has none; set '
      'gate.factor=0'
    )


def until_it_passes(
  gate: Gate | None, train: Callable[[Stage], Model], stage: Stage, teacher: Model | None
) -> Model:
  """Trains a stage and, as long as the gate asks for it, trains it further.

  Args:
    gate: the quality gate, or None.
    train: trains a stage until it has all its updates, or reads it if it has.
    stage: the stage.
    teacher: its teacher; a stage without one is not judged.
  """
  model = train(stage)
  while gate is not None and teacher is not None and (longer := gate.judge(model, teacher)):
    model = train(longer)
  return model
