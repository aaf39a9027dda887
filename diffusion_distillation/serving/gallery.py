"""What the page of `--mode=serve` shows, without the page: the finished stages, and images of teacher and student with their cost."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import loading
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.evaluation.sampling import Chosen, Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import model
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import Params

TEACHER = 'base'  # the stage that is drawn beside the chosen one
NUMS = (1, 4, 16, 64)  # images at a time: each number is a program of its own
MAX_STEPS = 8192
MAX_SEED = 2**31 - 1

Tell = Callable[[str], None]


class Drawn(NamedTuple):
  """Images of a stage, and what they cost.

  Attributes:
    stage: its name.
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
class _Order:
  """What is drawn of one stage, checked."""

  stage: str
  stored: StoredModel
  grid: np.ndarray
  sampler: str
  chosen: Chosen
  drawer: Drawer


class Gallery:
  """Draws from the finished stages of a workdir, or from the model of a folder; used by one thread at a time.

  The weights of a stage are read once, and stay on the devices.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._params: dict[pathlib.Path, tuple[str | None, Params]] = {}
    self._compiled: set[Drawer] = set()

  def stages(self) -> dict[str, pathlib.Path]:
    """The folders of the models by stage, the teacher first, then method by method, most steps first.

    Raises:
      UserError: there is none.
    """
    newest = loading.find(self._directory)
    if newest.parent.parent != self._directory:  # a stage, or the folder of a model
      name = model.read(newest, weights=False).provenance.get('stage')
      return {str(name or self._directory.name): newest}
    found = {
      path.parent.parent.name: path.parent
      for path in self._directory.glob(f'*/model/{model.DESCRIPTION}')
    }
    described = {name: model.read(folder, weights=False) for name, folder in found.items()}

    def place(name: str) -> tuple[bool, str, int, str]:
      method = str(described[name].provenance.get('method'))
      return name != TEACHER, method, -described[name].num_steps, name

    return {name: found[name] for name in sorted(found, key=place)}

  def newest(self) -> str:
    """The name of the stage that was finished last."""
    folder = loading.find(self._directory)
    return next(name for name, other in self.stages().items() if other == folder)

  def describe(self, stage: Any) -> StoredModel:
    """The model of a stage without its weights; UserError if there is none of that name."""
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
    tell: Tell = lambda text: None,
  ) -> list[Drawn]:
    """Draws images of the teacher, if there is one, with its own sampler and steps, and of a stage from the same noise.

    Args:
      stage: its name.
      steps: sampling steps, 1 to MAX_STEPS.
      sampler: a name in SAMPLERS.
      label: a class by name or number, or 'none'; empty for all classes in turn.
      seed: of the noise, 0 to MAX_SEED.
      num: images, one of NUMS.
      tell: is given a line when something begins that takes time.

    Raises:
      UserError: one of these is out of range; nothing has been drawn.
      DamagedError: a model is not what was written.
    """
    seed, num = whole('seed', seed, 0, MAX_SEED), whole('images', num, 1, NUMS[-1])
    if num not in NUMS:
      raise UserError(f'images={num} is not one of {", ".join(map(str, NUMS))}')
    stored = self.describe(stage)
    orders = [self._order(str(stage), stored, whole('steps', steps, 1, MAX_STEPS), sampler, label, num)]
    if TEACHER in self.stages():
      teacher = self.describe(TEACHER)
      known = conditioning.classes(teacher.denoise.conditioning) is not None
      its_label = label if known else None
      orders.insert(0, self._order(TEACHER, teacher, teacher.num_steps, teacher.sampler, its_label, num))
    return [self._draw(order, seed, num, tell) for order in orders]

  def _order(
    self, stage: str, stored: StoredModel, steps: int, sampler: Any, label: Any, num: int
  ) -> _Order:
    step = choose('sampler', str(sampler), samplers.SAMPLERS)()
    text = '' if label is None else str(label)
    chosen = loading.chosen_classes(stored, [text] if text else [], 'class=')
    try:
      grid = times.make_grid(stored.times, steps, stored.schedule)
    except ValueError as error:
      raise UserError(f'steps={steps}, times={stored.times}: {error}') from error
    drawer = LoadedModel(stored).drawer(step, stored.clip_x, num)
    return _Order(stage, stored, grid, str(sampler), chosen, drawer)

  def _draw(self, order: _Order, seed: int, num: int, tell: Tell) -> Drawn:
    params, draw = self._load(order, tell), order.drawer
    if draw not in self._compiled:
      tell(
        f'{order.stage}: compiling {order.sampler} for {num} image{"s" * (num > 1)}, which is done once'
      )
      jax.block_until_ready(next(draw.batches(params, times.uniform(1), 1, seed))[0])
      self._compiled.add(draw)
    steps = len(order.grid) - 1
    tell(f'{order.stage}: drawing in {steps} step{"s" * (steps > 1)}')
    began = time.monotonic()
    images = draw.draw(params, order.grid, num, seed, order.chosen)
    seconds = time.monotonic() - began
    calls = draw.sampler.calls(steps)
    return Drawn(order.stage, images, steps, order.sampler, calls, 1e3 * seconds / num)

  def _load(self, order: _Order, tell: Tell) -> Params:
    """The weights on the devices, read again only if the stage was trained again since."""
    folder = self.stages()[order.stage]
    known, params = self._params.get(folder, (None, None))
    if known is None or known != order.stored.digest:
      tell(f'{order.stage}: reading the weights')
      read = model.read(folder)
      params = sharding.replicate(read.params)
      self._params[folder] = read.digest, params
    return params


def classes(stored: StoredModel) -> list[str]:
  """What a user may call the classes of a model, by label, and 'none' if it draws without; empty if it has none."""
  told = conditioning.classes(stored.denoise.conditioning)
  if told is None:
    return []
  names = list(stored.class_names) or [str(label) for label in range(told.count)]
  return names + (['none'] if stored.cond_dropout and 'none' not in names else [])


def whole(name: str, value: Any, least: int, most: int) -> int:
  """`value`, whatever a page or a program sent, as an integer; UserError if it is none, or out of range."""
  try:
    number = int(value)
    if number == float(value) and least <= number <= most:
      return number
  except (TypeError, ValueError, OverflowError):
    pass
  shown = '' if value is None else str(value)[:40]
  raise UserError(f'{name}={shown} must be a whole number, {least} to {most}')


def figures(drawn: Drawn) -> Mapping[str, str]:
  """What drawing cost, in words."""
  plural = 's' if drawn.steps > 1 else ''
  return {
    'sampler': f'{drawn.steps} {drawn.sampler} step{plural}',
    'network calls per image': str(drawn.calls),
    'time per image': f'{drawn.milliseconds:.3g} ms',
  }
