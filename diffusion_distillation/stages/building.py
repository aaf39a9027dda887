"""From the sections of a config to the parts of a stage. Pure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distillation.config import Config, choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.process import OUTPUTS, output_channels
from diffusion_distillation.diffusion.schedules import SCHEDULES, Schedule
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import Method
from diffusion_distillation.methods.distances import DISTANCES, Distance
from diffusion_distillation.networks.unet import Denoiser, UNet
from diffusion_distillation.training.optimizers import DECAYS, Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe

LAWS = {'uniform': times.Uniform, 'lognormal': times.LogNormal}


def build(key: str, cls: type, **fields: Any) -> Any:
  """`cls` of these fields; a UserError, naming the config's `key`, in place of what it raises."""
  try:
    return cls(**fields)
  except (TypeError, ValueError) as error:
    raise UserError(f'config.{key}: {error}') from error


def make_sampler(name: str, clip_x: bool, gamma: float = 0.0) -> samplers.Sampler:
  """A sampler by name; `gamma` is of use to ancestral sampling only.

  Raises:
    UserError: there is none of that name, or gamma is not in [0, 1].
  """
  cls = choose('evaluation.samplers', name, samplers.SAMPLERS)
  fields = {'gamma': gamma} if cls is samplers.Ancestral else {}
  return build('evaluation', cls, clip_x=clip_x, **fields)


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
  computed = {key: config.compute[key] for key in ('dtype', 'remat')}
  network = build('model', UNet, out_ch=out_ch, num_classes=num_classes, **fields, **computed)
  try:
    network.check(image_shape)
  except ValueError as error:
    raise UserError(f'config.model: {error}') from error
  return Denoiser(network, output)


def make_recipe(
  config: Config,
  section: str,
  seeds: tuple[int, ...],
  denoise: Denoiser,
  method: Method,
  rates: Mapping[str, float],
  num_updates: int,
) -> Recipe:
  """What the step of a stage needs.

  Args:
    config: of the run.
    section: of the config that the stage's training is in.
    seeds: what tells the stage's noise from that of others with the same `config.seed`.
    denoise: the network in training.
    method: its loss.
    rates: the highest learning rate, by network.
    num_updates: of the stage.
  """
  of = config[section]
  choose(f'{section}.decay', of.decay, DECAYS)
  adam = dict(config.optimizer) | ({'clip_norm': of.clip_norm} if 'clip_norm' in of else {})
  return Recipe(
    denoise=denoise,
    method=method,
    optimizer=build('optimizer', Adam, weight_decay=of.weight_decay, **adam),
    learning_rate={
      name: LearningRate(rate, num_updates, of.warmup, of.decay) for name, rate in rates.items()
    },
    ema_decay=tuple(of.ema_decay),
    seed=make_seed(config, *seeds),
    random_flip=config.dataset.random_flip,
    dequantize=config.dataset.dequantize,
    label_dropout=config.dataset.label_dropout,
    micro_batches=of.micro_batches,
  )


def make_seed(config: Config, *numbers: int) -> int:
  """A seed of its own for what `numbers` stand for, below 2^31."""
  return int(np.random.SeedSequence([config.seed, *numbers]).generate_state(1)[0] >> 1)


def make_law(config: Config, schedule: Schedule) -> times.Law:
  """The law of t in base training."""
  section, uniform = config.time, times.Uniform(config.time.stratified)
  if choose('time.law', section.law, LAWS) is times.Uniform:
    return uniform
  if section.num_steps:
    raise UserError('time.law=lognormal is of continuous time: set time.num_steps=0')
  return times.LogNormal(schedule, section.log_mean, section.log_std, uniform)


def make_distance(config: Config, section: str) -> Distance:
  """The distance between images that `section` names."""
  distance: Distance = choose(f'{section}.distance', config[section].distance, DISTANCES)()
  return distance


def make_schedule(config: Config, image_shape: tuple[int, ...]) -> Schedule:
  """The schedule by name, from those keys of its section that it knows."""
  cls = choose('schedule.name', config.schedule.name, SCHEDULES)
  given: Mapping[str, Any] = {**config.schedule, 'image_size': image_shape[0]}
  return build('schedule', cls, **{f.name: given[f.name] for f in dataclasses.fields(cls)})
