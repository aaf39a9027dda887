"""From a config to the list of stages: base training, then one round after the other. Pure."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import numpy as np

from diffusion_distillation import samplers, times
from diffusion_distillation.configuration import Config, check_numbers, choose
from diffusion_distillation.diffusion import OUTPUTS, output_channels
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS, Denoising, Method, Progressive
from diffusion_distillation.optimizers import DECAYS, Adam, LearningRate
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
    ema_decay: of each moving average; 0 follows the parameters.
    seed: of all noise in this stage.
    random_flip: whether images are mirrored at random.
    dequantize: whether pixels are spread evenly over what rounds to them.
    label_dropout: probability that an example's class is not told.
    micro_batches: parts that a batch is cut into, whose gradients are added up.
  """

  denoise: Denoiser = flax.struct.field(pytree_node=False)
  method: Method
  optimizer: Adam = flax.struct.field(pytree_node=False)
  learning_rate: LearningRate
  ema_decay: tuple[Any, ...]
  seed: int | Any
  random_flip: bool = flax.struct.field(pytree_node=False, default=False)
  dequantize: bool = flax.struct.field(pytree_node=False, default=False)
  label_dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  micro_batches: int = flax.struct.field(pytree_node=False, default=1)

  def create_state(self, student_params: Params) -> TrainState:
    """The state before the first update of a student that starts from `student_params`."""
    networks = self.method.init(student_params)
    return TrainState.create(networks, self.optimizer.transform(), len(self.ema_decay))


@dataclasses.dataclass(frozen=True)
class Stage:
  """One directory of the workdir: what is trained there, from whom, for how long.

  Attributes:
    name: of the stage and its directory.
    parent: the stage that teaches it, and that it starts from, or None.
    parent_weights: which of the parent's weights: 'ema' or 'last'.
    recipe: what the compiled step needs.
    num_steps: sampling steps that its model is made for.
    num_updates: updates until it is finished.
    batch_size: examples an update, over all devices.
    schedule: t to logsnr.
    image_shape: (H, W, C).
  """

  name: str
  parent: str | None
  parent_weights: str
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
  def weights(self) -> tuple[str, ...]:
    """Names of the weights it keeps: 'ema', then 'ema_0.99' and so on for further averages, and 'last'."""
    return ('ema', *(f'ema_{decay}' for decay in self.recipe.ema_decay[1:]), 'last')

  @property
  def denoise(self) -> Denoiser:
    """The stage's model as it is sampled from: without dropout."""
    return without_dropout(self.recipe.denoise)

  def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the step is given of a batch: `image`, and `label` if the network is told, else None."""
    told = self.denoise.network.num_classes
    return {'image': batch['image'], 'label': batch['label'] if told else None}


def without_dropout(denoise: Denoiser) -> Denoiser:
  """The same denoiser over a network that has no dropout; equal to every other of its shape."""
  return dataclasses.replace(denoise, network=dataclasses.replace(denoise.network, dropout=0.0))


def _build(key: str, cls: type, **fields: Any) -> Any:
  try:
    return cls(**fields)
  except (TypeError, ValueError) as error:
    raise UserError(f'config.{key}: {error}') from error


def of_round(values: Sequence[Any], from_the_end: int) -> Any:
  """A round's entry of a tuple that ends with the last round's; its first serves all rounds before."""
  return values[max(0, len(values) - 1 - from_the_end)]


def rounds(start_steps: int, end_steps: int, factor: Sequence[int] = (2,)) -> list[tuple[int, int]]:
  """The students' step counts, from the first round to the last, each with its round's factor.

  Args:
    start_steps: the base model's.
    end_steps: the last student's.
    factor: of each round, the last round's last; the first one also for all rounds before.

  Raises:
    UserError: these factors do not lead from start_steps to end_steps.
  """
  found: list[tuple[int, int]] = []
  steps = end_steps
  while steps < start_steps:
    found.append((steps, of_round(factor, len(found))))
    steps *= found[-1][1]
  if steps != start_steps:
    raise UserError(
      f'distill.start_steps={start_steps} does not come down to distill.end_steps={end_steps} by '
      f'distill.factor={tuple(factor)}; the next start that does is {steps}'
    )
  return found[::-1]


def make_sampler(name: str, clip_x: bool, gamma: float = 0.0) -> samplers.Sampler:
  """A sampler by name; `gamma` is of use to ancestral sampling only.

  Raises:
    UserError: there is none of that name, or gamma is not in [0, 1].
  """
  cls = choose('evaluation.samplers', name, samplers.SAMPLERS)
  fields = {'gamma': gamma} if cls is samplers.Ancestral else {}
  return _build('evaluation', cls, clip_x=clip_x, **fields)


def make_denoiser(config: Config, image_shape: tuple[int, ...], num_classes: int) -> Denoiser:
  """The network of the config for images (H, W, C), as a denoiser."""
  fields = dict(config.model)
  output = fields.pop('output')
  choose('model.output', output, OUTPUTS)
  if not fields.pop('conditional'):
    num_classes = 0
    if config.dataset.label_dropout:
      raise UserError('dataset.label_dropout needs model.conditional=True: there are no labels to drop')
  elif not num_classes:
    raise UserError(f'model.conditional=True, but dataset {config.dataset.name!r} has no labels')
  out_ch = output_channels(output, image_shape[-1])
  network = _build('model', UNet, out_ch=out_ch, num_classes=num_classes, **fields)
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
  check_numbers(config)
  distill = config.distill
  steps = rounds(distill.start_steps, distill.end_steps, distill.factor)
  if len(distill.factor) > max(1, len(steps)):
    raise UserError(
      f'distill.factor={distill.factor} has more entries than there are rounds, {len(steps)}'
    )
  choose('distill.from_weights', distill.from_weights, {'ema': None, 'last': None})
  if distill.end_steps > config.evaluation.max_steps:
    raise UserError(
      f'evaluation.max_steps={config.evaluation.max_steps} leaves nothing to measure: '
      f'the last stage has distill.end_steps={distill.end_steps}'
    )
  if not config.evaluation.samplers:
    raise UserError('evaluation.samplers=() must name one at least, such as ddim')
  for name in config.evaluation.samplers:
    make_sampler(name, config.evaluation.clip_x, config.evaluation.gamma)
  denoise = make_denoiser(config, image_shape, num_classes)
  schedule = _make_schedule(config, image_shape)
  weighting = choose('weighting', config.weighting, WEIGHTINGS)()
  law = times.Uniform(config.time.stratified)

  train = config.train
  loss = Denoising(schedule, weighting, law, config.time.num_steps)
  base = Stage(
    name='base',
    parent=None,
    parent_weights='',
    recipe=_recipe(config, 0, denoise, loss, train.learning_rate, train.num_updates),
    num_steps=distill.start_steps,
    num_updates=train.num_updates,
    batch_size=train.batch_size,
    schedule=schedule,
    image_shape=image_shape,
  )
  stages, student_denoise = [base], without_dropout(denoise)
  for num_steps, factor in steps:
    from_the_end = len(steps) - len(stages)
    num_updates = of_round(distill.num_updates, from_the_end)
    rate = of_round(distill.learning_rate, from_the_end)
    round_loss = Progressive(num_steps, schedule, weighting, factor, law)
    student = dataclasses.replace(
      base,
      name=f'progressive_{num_steps:04d}',
      parent=stages[-1].name,
      parent_weights=distill.from_weights,
      recipe=_recipe(config, len(stages), student_denoise, round_loss, rate, num_updates),
      num_steps=num_steps,
      num_updates=num_updates,
      batch_size=distill.batch_size,
    )
    stages.append(student)
  return stages


def _recipe(
  config: Config, index: int, denoise: Denoiser, method: Method, rate: float, num_updates: int
) -> Recipe:
  """What the step of stage `index` needs; stage 0 is `config.train`, the others `config.distill`."""
  name = 'distill' if index else 'train'
  section = config[name]
  choose(f'{name}.decay', section.decay, DECAYS)
  return Recipe(
    denoise=denoise,
    method=method,
    optimizer=_build('optimizer', Adam, weight_decay=section.weight_decay, **config.optimizer),
    learning_rate=LearningRate(rate, num_updates, section.warmup, section.decay),
    ema_decay=tuple(section.ema_decay),
    seed=int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0] >> 1),
    random_flip=config.dataset.random_flip,
    dequantize=config.dataset.dequantize,
    label_dropout=config.dataset.label_dropout,
    micro_batches=section.micro_batches,
  )


def _make_schedule(config: Config, image_shape: tuple[int, ...]) -> Schedule:
  """The schedule by name, from those keys of its section that it knows."""
  cls = choose('schedule.name', config.schedule.name, SCHEDULES)
  given: Mapping[str, Any] = {**config.schedule, 'image_size': image_shape[0]}
  return _build('schedule', cls, **{f.name: given[f.name] for f in dataclasses.fields(cls)})
