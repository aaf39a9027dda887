"""Images of teacher and student from the same noise, with their cost: what the page of `--mode=serve` shows."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import loading
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.evaluation.sampling import Chosen, Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.guidance import GuidingModel, asked_weight, check
from diffusion_distillation.serving.worker import Report
from diffusion_distillation.stages import guiding_models, model, model_folders
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import Params

TEACHER = 'base'  # the stage that is drawn beside the selected one
NUM_IMAGES = (1, 4, 16, 64)  # each number needs a compiled program of its own
MAX_STEPS = 8192
MAX_SEED = 2**31 - 1
MAX_PROMPT = 2000  # characters


class Texts(NamedTuple):
  """What text-to-image models should draw.

  Attributes:
    prompts: the prompts, drawn in turn.
    negative: what guidance leads away from; None for the empty text.
  """

  prompts: tuple[str, ...] = ()
  negative: str | None = None


class Drawn(NamedTuple):
  """Images of a stage and their cost.

  Attributes:
    stage: the name of the stage.
    images: (n, H, W, C) uint8.
    steps: sampling steps.
    sampler: a name in SAMPLERS.
    calls: network calls per image.
    milliseconds: per image, without compilation.
  """

  stage: str
  images: np.ndarray
  steps: int
  sampler: str
  calls: int
  milliseconds: float


@dataclasses.dataclass(frozen=True)
class _Request:
  """What is to be drawn from one stage, after all checks."""

  stage: str
  stored: StoredModel
  grid: np.ndarray
  sampler: str
  chosen: Chosen
  drawer: Drawer


class Gallery:
  """Draws from the finished stages of a workdir, or from a single model; `draw` is called by one thread at a time.

  The weights of a stage are read once and stay on the devices.
  """

  def __init__(self, directory: pathlib.Path, guiding_model: str | os.PathLike[str] | None = None):
    self._directory = directory
    self._guiding_model = guiding_model
    self._guiding_models: dict[
      str | None, GuidingModel
    ] = {}  # by the digest of the model that is guided
    self._params: dict[pathlib.Path, tuple[str | None, Params]] = {}
    self._compiled: set[Drawer] = set()

  def stages(self) -> dict[str, pathlib.Path]:
    """Returns the folder of each stage's model: the teacher, then the students by method and falling number of steps.

    Damaged models come last.

    Raises:
      UserError: there is no model.
    """
    newest = model_folders.find(self._directory)
    if newest.parent.parent != self._directory:  # a stage, or the folder of a model
      name = model.read(newest, weights=False).provenance.get('stage')
      return {str(name or self._directory.name): newest}
    found = {
      path.parent.parent.name: path.parent
      for path in self._directory.glob(f'*/model/{model.DESCRIPTION}')
    }

    def place(name: str) -> tuple[bool, bool, str, int, str]:
      try:
        described = model.read(found[name], weights=False)
      except UserError:  # drawing the stage reports it
        return True, True, '', 0, name
      method = str(described.provenance.get('method'))
      return False, name != TEACHER, method, -described.num_steps, name

    return {name: found[name] for name in sorted(found, key=place)}

  def newest(self) -> str:
    """The name of the stage that finished last."""
    folder = model_folders.find(self._directory)
    return next(name for name, other in self.stages().items() if other == folder)

  def describe(self, stage: Any) -> StoredModel:
    """The model of a stage without its weights; raises UserError if there is no such stage."""
    folder: pathlib.Path = choose('stage', str(stage), self.stages())
    return model.read(folder, weights=False)

  def draw(
    self,
    stage: Any,
    steps: Any,
    sampler: Any,
    label: Any,
    seed: Any,
    num: Any,
    weight: Any,
    prompts: Any = '',
    negative: Any = '',
    report: Report = lambda line: None,
  ) -> list[Drawn]:
    """Draws a stage, and the teacher with its own sampler and steps if there is one, from the same noise.

    Args:
      stage: the name of the stage.
      steps: number of sampling steps of the stage, 1 to MAX_STEPS.
      sampler: a name in SAMPLERS.
      label: a class by name or number, or 'none' for images without a class; '' for all classes in turn.
      seed: seed of the noise, 0 to MAX_SEED.
      num: number of images, one of NUM_IMAGES.
      weight: W of guidance, for the stage and, if it `can_be_guided`, for the teacher; empty for the smallest. A student of
        texts that cannot be guided is drawn without, beside its guided teacher.
      prompts: what models of texts draw, one prompt per line, in turn.
      negative: what guidance leads away from; empty for the empty text.
      report: called with a line of progress before each step that takes time.

    Returns:
      The teacher's images, if there is a teacher, and those of the stage.

    Raises:
      UserError: an argument is out of range; nothing has been drawn.
      DamagedError: the files of a model are damaged.
    """
    seed, num = check_integer('seed', seed, 0, MAX_SEED), check_integer('images', num, 1, NUM_IMAGES[-1])
    if num not in NUM_IMAGES:
      raise UserError(f'images={num} is not one of {", ".join(map(str, NUM_IMAGES))}')
    stored = self.describe(stage)
    guidance = check_weight(stored, weight)
    steps = check_integer('steps', steps, 1, MAX_STEPS)
    texts, with_teacher = check_texts(prompts, negative, num), TEACHER in self.stages()
    teacher = self.describe(TEACHER) if with_teacher else stored
    own, own_texts = guidance, texts
    if takes_text(stored) and not self.can_be_guided(stored) and self.can_be_guided(teacher):
      own, own_texts = NONE, texts._replace(negative=None)
    requests = [self._request(str(stage), stored, steps, sampler, label, num, own, own_texts)]
    if with_teacher:
      known = conditioning.classes(teacher.denoise.conditioning) is not None
      given = (label if known else None, num, guidance if self.can_be_guided(teacher) else NONE)
      said = texts if takes_text(teacher) else Texts()
      settings = (teacher.num_steps, teacher.sampler, *given, said)
      requests.insert(0, self._request(TEACHER, teacher, *settings))
    return [self._draw(request, seed, num, report) for request in requests]

  def can_be_guided(self, stored: StoredModel) -> bool:
    """Whether a model can be drawn with guidance.

    It takes the weight as an input, it can also be called without a class, or there is a guiding model.
    """
    takes = stored.denoise.conditioning
    if conditioning.weights(takes) is not None:
      return True
    return self._guiding_model is not None or bool(takes and stored.cond_dropout)

  def check_guiding_model(self) -> None:
    """Raises UserError if the guiding model cannot guide the newest stage."""
    self._guiding(self.describe(self.newest()))

  def _guiding(self, stored: StoredModel) -> GuidingModel | None:
    """Returns the guiding model for a model that does not take the weight as an input; None if there is none."""
    if self._guiding_model is None or conditioning.weights(stored.denoise.conditioning):
      return None
    if stored.digest not in self._guiding_models:
      guided = (stored.denoise.conditioning, stored.space, stored.image_shape)
      found = guiding_models.read('--guiding_model', self._guiding_model, *guided)
      self._guiding_models[stored.digest] = found
    return self._guiding_models[stored.digest]

  def _request(
    self,
    stage: str,
    stored: StoredModel,
    steps: int,
    sampler: Any,
    label: Any,
    num: int,
    guidance: Guidance,
    texts: Texts,
  ) -> _Request:
    step = choose('sampler', str(sampler), samplers.SAMPLERS)()
    text = '' if label is None else str(label)
    chosen = loading.chosen_classes(stored, [text] if text else [], 'class=')
    try:
      grid = times.make_grid(stored.times, steps, stored.schedule)
    except ValueError as error:
      raise UserError(f'steps={steps}, times={stored.times}: {error}') from error
    guiding = self._guiding(stored) if guidance else None
    takes, labels = stored.denoise.conditioning, (chosen or {}).get('label')
    check('guidance', guidance, takes, stored.cond_dropout, labels, guiding is not None)
    guided = bool(guidance)
    if texts.negative is not None:
      loading.check_negative(stored, guided, guiding is not None, 'negative prompt', 'guidance')
    chosen = loading.with_texts(stored, chosen, texts.prompts, guided, texts.negative, 'prompt')
    size = loading.batch_size(stored, num, num)
    drawer = LoadedModel(stored).drawer(step, stored.clip_x, size, guidance, guiding)
    return _Request(stage, stored, grid, str(sampler), chosen, drawer)

  def _draw(self, request: _Request, seed: int, num: int, report: Report) -> Drawn:
    params, draw = self._load(request, report), request.drawer
    if draw.program not in self._compiled:
      report(
        f'{request.stage}: compiling {request.sampler} for {num} image{"s" * (num > 1)}, which is done once'
      )
      one_step, chosen = times.uniform(1), request.chosen
      jax.block_until_ready(next(draw.batches(params, one_step, 1, seed, chosen))[0])
      self._compiled.add(draw.program)
    steps = len(request.grid) - 1
    report(f'{request.stage}: drawing in {steps} step{"s" * (steps > 1)}')
    began = time.monotonic()
    images = draw.draw(params, request.grid, num, seed, request.chosen)
    seconds = time.monotonic() - began
    calls = draw.calls(request.grid)
    return Drawn(request.stage, images, steps, request.sampler, calls, 1e3 * seconds / num)

  def _load(self, request: _Request, report: Report) -> Params:
    """The weights on the devices; they are read again only if the stage has been trained again."""
    folder = self.stages()[request.stage]
    digest, params = self._params.get(folder, (None, None))
    if digest is None or digest != request.stored.digest:
      report(f'{request.stage}: reading the weights')
      read = model.read(folder)
      params = sharding.replicate(read.params)
      self._params[folder] = read.digest, params
    return params


def classes(stored: StoredModel) -> list[str]:
  """The names of a model's classes, or else their numbers, and 'none' if it can draw without a class; [] if unconditional."""
  known = conditioning.classes(stored.denoise.conditioning)
  if known is None:
    return []
  names = list(stored.class_names) or [str(label) for label in range(known.count)]
  return names + (['none'] if stored.cond_dropout and 'none' not in names else [])


def takes_text(stored: StoredModel) -> bool:
  """Whether a model draws what a text says."""
  return conditioning.takes_text(stored.denoise.conditioning)


def check_texts(prompts: Any, negative: Any, num: int) -> Texts:
  """Returns the prompts in `prompts`, one per line, and the negative prompt; raises UserError if there are more than images."""
  found = tuple(filter(None, (line.strip() for line in str(prompts or '').splitlines())))
  if len(found) > num:
    raise UserError(f'images={num} are fewer than the {len(found)} prompts, of which each line is one')
  longest = max(map(len, (*found, str(negative or ''))), default=0)
  if longest > MAX_PROMPT:
    raise UserError(f'a prompt has {longest} characters; at most {MAX_PROMPT} are allowed')
  return Texts(found, ' '.join(str(negative or '').split()) or None)


def check_weight(stored: StoredModel, value: Any) -> Guidance:
  """Returns the guidance of weight `value`, which may be of any type; raises UserError if it is not a weight."""
  try:
    weight = None if value is None or value == '' else float(value)
    return make_guidance(asked_weight('guidance', weight, stored.denoise.conditioning))
  except (TypeError, ValueError) as error:
    raise UserError(f'guidance={str(value)[:40]} must be a number, zero or more') from error


def check_integer(name: str, value: Any, least: int, most: int) -> int:
  """`value`, which may be of any type, as an integer; raises UserError if it is not one, or out of range."""
  try:
    number = int(value)
    if number == float(value) and least <= number <= most:
      return number
  except (TypeError, ValueError, OverflowError):
    pass
  shown = '' if value is None else str(value)[:40]
  raise UserError(f'{name}={shown} must be a whole number, {least} to {most}')


def figures(drawn: Drawn) -> Mapping[str, str]:
  """The cost of the images, as the page shows it."""
  return {
    'sampler': drawn.sampler,
    'steps': str(drawn.steps),
    'network calls': str(drawn.calls),
    'ms per image': f'{drawn.milliseconds:.3g}',
  }
