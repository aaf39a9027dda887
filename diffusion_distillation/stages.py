"""From a config to the list of stages: base training, then one round after the other. Pure."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
from ml_collections import ConfigDict as Config

from diffusion_distillation import samplers
from diffusion_distillation.diffusion import OUTPUTS
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS, Denoising, Method, Progressive
from diffusion_distillation.optimizers import Adam, LearningRate
from diffusion_distillation.schedules import SCHEDULES, Schedule
from diffusion_distillation.train_state import Params, TrainState
from diffusion_distillation.unet import Denoiser, UNet
from diffusion_distillation.weightings import WEIGHTINGS


@flax.struct.dataclass
class Recipe:
  """All that the compiled step knows of a stage; its leaves are arguments, the rest is static.

  Attributes:
    denoise: the network, seen as a denoiser.
    method: the loss.
    optimizer: from gradients to updates of unit learning rate.
    learning_rate: of each step.
    ema_decay: of the moving average; 0 follows the parameters.
    seed: of all noise in this stage.
    random_flip: whether images are mirrored at random.
  """

  denoise: Denoiser = flax.struct.field(pytree_node=False)
  method: Method
  optimizer: Adam = flax.struct.field(pytree_node=False)
  learning_rate: LearningRate
  ema_decay: float | jax.Array
  seed: int | jax.Array
  random_flip: bool = flax.struct.field(pytree_node=False, default=False)

  def create_state(self, student_params: Params) -> TrainState:
    """The state before the first update of a student that starts from `student_params`."""
    return TrainState.create(self.method.init(student_params), self.optimizer.transform())


@dataclasses.dataclass(frozen=True)
class Stage:
  """One directory of the workdir: what is trained there, from whom, for how long.

  Attributes:
    name: of the stage and its directory.
    parent: the stage whose EMA parameters are teacher and start, or None.
    recipe: what the compiled step needs.
    num_steps: sampling steps that its model is made for.
    num_updates: updates until it is finished.
    batch_size: examples an update, over all devices.
    schedule: t to logsnr.
    image_shape: (H, W, C).
  """

  name: str
  parent: str | None
  recipe: Recipe
  num_steps: int
  num_updates: int
  batch_size: int
  schedule: Schedule
  image_shape: tuple[int, ...]

  @property
  def method(self) -> str:
    """The name of its method, in METHODS."""
    return next(name for name, cls in METHODS.items() if isinstance(self.recipe.method, cls))

  @property
  def denoise(self) -> Denoiser:
    """The stage's model as it is sampled from: without dropout."""
    return without_dropout(self.recipe.denoise)


def without_dropout(denoise: Denoiser) -> Denoiser:
  """The same denoiser over a network that has no dropout; equal to every other of its shape."""
  return dataclasses.replace(denoise, network=dataclasses.replace(denoise.network, dropout=0.0))


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """('train.batch_size', 64) and so on, in the config's order; sequences as tuples."""
  for key, value in config.items():
    if isinstance(value, Mapping | Config):
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, tuple(value) if isinstance(value, list | tuple) else value


def check_keys(config: Mapping[str, Any], default: Mapping[str, Any]) -> None:
  """Raises UserError unless `config` has exactly the keys of `default`; names the nearest one."""
  known = [key for key, _ in flatten(default)]
  given = [key for key, _ in flatten(config)]
  check_known(given, known)
  missing = [key for key in known if key not in given]
  if missing:
    raise UserError(f'config lacks the keys {", ".join(missing)}; start from configs/default.py')


def check_known(given: list[str], known: list[str]) -> None:
  """Raises UserError for the first key in `given` that is not known; names the nearest one."""
  for key in given:
    if key not in known:
      raise UserError(f'config has no key {key!r}{nearest(key, known)}')


def nearest(word: str, known: list[str]) -> str:
  """'; did you mean ...?' if something near is known, else ''."""
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else ''


def _choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
  if value not in table:
    raise UserError(f'{key}={value!r} is not one of {list(table)}{nearest(value, list(table))}')
  return table[value]


def _build(key: str, cls: type, **fields: Any) -> Any:
  try:
    return cls(**fields)
  except (TypeError, ValueError) as error:
    raise UserError(f'config.{key}: {error}') from error


def rounds(start_steps: int, end_steps: int) -> list[int]:
  """The students' step counts, start / 2 down to end.

  Raises:
    UserError: halving start_steps does not arrive at end_steps.
  """
  steps, n = [], start_steps
  while n > end_steps and n % 2 == 0:
    n //= 2
    steps.append(n)
  if end_steps < 1 or n != end_steps:
    raise UserError(
      f'distill.start_steps={start_steps} does not halve down to distill.end_steps={end_steps}; '
      f'start_steps must be end_steps times a power of two'
    )
  return steps


def make_sampler(name: str, clip_x: bool) -> Any:
  """A sampler by name; raises UserError if there is none."""
  return _choose('sampler', name, samplers.SAMPLERS)(clip_x=clip_x)


POSITIVE = [
  'model.ch',
  'model.emb_ch',
  'model.ch_mult',
  'model.num_res_blocks',
  'model.num_groups',
  'model.num_heads',
  'model.head_dim',
  'optimizer.eps',
  'optimizer.clip_norm',
  'train.num_updates',
  'train.batch_size',
  'train.learning_rate',
  'distill.num_updates',
  'distill.num_updates_last',
  'distill.batch_size',
  'distill.learning_rate',
  'max_skipped',
  'checkpoint.every',
  'log.every',
  'evaluation.num_samples',
  'evaluation.batch_size',
]
NOT_NEGATIVE = [
  'seed',
  'evaluation.seed',
  'train.warmup',
  'train.weight_decay',
  'distill.warmup',
  'distill.weight_decay',
  'distill.last_steps',
  'log.seconds',
]
FRACTIONS = ['train.ema_decay', 'distill.ema_decay', 'model.dropout', 'optimizer.b1', 'optimizer.b2']


def _check_numbers(config: Config) -> None:
  """Raises UserError for numbers that no stage could use; None stands for 'not given'."""
  values = dict(flatten(config))
  for keys, wanted, holds in (
    (POSITIVE, 'positive', lambda v: 0 < v < math.inf),
    (NOT_NEGATIVE, 'zero or more, and below 2^31', lambda v: 0 <= v < 2**31),
    (FRACTIONS, 'in [0, 1)', lambda v: 0 <= v < 1),
  ):
    for key in keys:
      value = values[key]
      numbers = value if isinstance(value, tuple) else (value,)
      if not numbers or not all(number is None or holds(number) for number in numbers):
        raise UserError(f'{key}={value} must be {wanted}')
  if config.evaluation.num_samples < 2:
    raise UserError('evaluation.num_samples must be at least 2: a covariance needs two examples')


def make_denoiser(config: Config, image_shape: tuple[int, ...], num_classes: int) -> Denoiser:
  """The network of the config for images (H, W, C), as a denoiser."""
  fields = dict(config.model)
  output = fields.pop('output')
  _choose('model.output', output, OUTPUTS)
  if not fields.pop('conditional'):
    num_classes = 0
  elif not num_classes:
    raise UserError(f'model.conditional=True, but dataset {config.dataset.name!r} has no labels')
  network = _build('model', UNet, out_ch=image_shape[-1], num_classes=num_classes, **fields)
  try:
    network.check(image_shape)
  except ValueError as error:
    raise UserError(f'config.model: {error}') from error
  return Denoiser(network, output)


def plan(config: Config, image_shape: tuple[int, ...], num_classes: int) -> list[Stage]:
  """All stages of a run, in order; nothing is read, compiled or written.

  Args:
    config: with exactly the keys of configs/default.py.
    image_shape: (H, W, C) of the data.
    num_classes: of the data; 0 without labels.

  Raises:
    UserError: something in the config does not fit; the message names the key.
  """
  _check_numbers(config)
  distill = config.distill
  student_steps = rounds(distill.start_steps, distill.end_steps)
  denoise = make_denoiser(config, image_shape, num_classes)
  schedule = _make_schedule(config)
  weighting = _choose('weighting', config.weighting, WEIGHTINGS)()

  base = Stage(
    name='base',
    parent=None,
    recipe=_recipe(config, 0, denoise, Denoising(schedule, weighting), config.train.num_updates),
    num_steps=distill.start_steps,
    num_updates=config.train.num_updates,
    batch_size=config.train.batch_size,
    schedule=schedule,
    image_shape=image_shape,
  )
  stages = [base]
  for num_steps in student_steps:
    few = num_steps <= distill.last_steps
    num_updates = distill.num_updates_last if few else distill.num_updates
    loss = Progressive(num_steps, schedule, weighting)
    student = dataclasses.replace(
      base,
      name=f'progressive_{num_steps:04d}',
      parent=stages[-1].name,
      recipe=_recipe(config, len(stages), without_dropout(denoise), loss, num_updates),
      num_steps=num_steps,
      num_updates=num_updates,
      batch_size=distill.batch_size,
    )
    stages.append(student)
  return stages


def _recipe(config: Config, index: int, denoise: Denoiser, method: Method, num_updates: int) -> Recipe:
  """What the step of stage `index` needs; stage 0 is `config.train`, the others `config.distill`."""
  section = config.distill if index else config.train
  return Recipe(
    denoise=denoise,
    method=method,
    optimizer=_build('optimizer', Adam, weight_decay=section.weight_decay, **config.optimizer),
    learning_rate=LearningRate(
      section.learning_rate, section.warmup, num_updates if section.decay else 0
    ),
    ema_decay=section.ema_decay,
    seed=int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0] >> 1),
    random_flip=config.dataset.random_flip,
  )


def _make_schedule(config: Config) -> Schedule:
  fields = dict(config.schedule)
  return _build('schedule', _choose('schedule.name', fields.pop('name'), SCHEDULES), **fields)
