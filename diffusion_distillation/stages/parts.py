"""Builds the parts of a stage from the sections of a config. All functions are pure."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import FrozenDict

from diffusion_distillation.config import Config, build, choose, keys
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.discrete import BETAS
from diffusion_distillation.diffusion.guidance import Guidance, make_guidance
from diffusion_distillation.diffusion.process import OUTPUTS, output_channels
from diffusion_distillation.diffusion.schedules import SCHEDULES, Schedule
from diffusion_distillation.diffusion.weightings import WEIGHTINGS
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import Context, Method
from diffusion_distillation.methods.distances import Decoded, Weighted
from diffusion_distillation.networks import NETWORKS, conditioning
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import GuidingModel, check
from diffusion_distillation.networks.spaces import SPACES, Space
from diffusion_distillation.stages import guiding_models
from diffusion_distillation.stages.own_companions import Companions
from diffusion_distillation.stages.stage import Pairs, Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training.optimizers import DECAYS, Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe

LAWS = {'uniform': times.Uniform, 'lognormal': times.LogNormal}
# Samplers that add no noise, so that a stored image is a function of its initial noise.
DETERMINISTIC = {
  name: samplers.SAMPLERS[name] for name in ('ddim', 'euler', 'heun', 'rk4', 'edm_heun', 'dpm_solver_2m')
}


@dataclasses.dataclass(frozen=True)
class Data:
  """The properties of the data that a plan depends on.

  Attributes:
    image_shape: (H, W, C).
    num_classes: number of classes; 0 if there are no labels.
    companions: the networks beside the base that the run trains itself, for a model of texts; else None.
  """

  image_shape: tuple[int, ...]
  num_classes: int
  companions: Companions | None = None


def make_sampler(name: str, gamma: float = 0.0) -> samplers.Sampler:
  """Returns a sampler by name; `gamma` only applies to ancestral sampling.

  Raises:
    UserError: no sampler has this name, or gamma is not in [0, 1].
  """
  cls = choose('evaluation.samplers', name, samplers.SAMPLERS)
  known = {field.name for field in dataclasses.fields(cls)}
  found: samplers.Sampler = build('evaluation', cls, **({'gamma': gamma} if 'gamma' in known else {}))
  return found


def make_space(section: Mapping[str, Any]) -> Space:
  """Returns the space that a network works on."""
  cls = choose('model.space', section['space'], SPACES)
  if any(field.default is dataclasses.MISSING for field in dataclasses.fields(cls)):
    raise UserError(
      f'model.space={section["space"]} is only for imported models (--mode=import), whose files give its autoencoder, and for '
      'runs that train one: set autoencoder.num_updates and text_encoder.num_updates'
    )
  space: Space = cls()
  return space


def make_denoiser(
  config: Config,
  section: Mapping[str, Any],
  data: Data,
  schedule: Schedule,
) -> Denoiser:
  """Returns the network that `section` describes, as a denoiser of x for this data.

  The network receives the keys of the section that match its fields, and likewise `out_ch`, `num_classes`, `schedule`,
  `dtype`, `remat` and `attention`.

  Raises:
    UserError: the network does not fit the section or the data.
  """
  output = section['output']
  choose('model.output', output, OUTPUTS)
  cls = choose('model.name', section['name'], NETWORKS)
  for network_cls in NETWORKS.values():  # also check keys that only other networks have
    for name, declared in keys(network_cls.Section).items():
      if declared.choices and name in section:
        value = section[name]
        for entry in value if isinstance(value, tuple) else (value,):
          choose(f'model.{name}', entry, dict.fromkeys(declared.choices))
  num_classes = data.num_classes if section['conditional'] else 0
  beside = data.companions
  sharding.check_attention(config.compute.attention, config.compute.dtype)
  space = make_space(section) if beside is None else beside.space
  shape = space.shape(data.image_shape)
  given = {
    **section,
    **{key: config.compute[key] for key in ('dtype', 'remat', 'attention')},
    'out_ch': output_channels(output, shape[-1]),
    'num_classes': num_classes,
    'schedule': schedule,
    **_of_text(section, beside),
  }
  fields = [f.name for f in dataclasses.fields(cls) if f.name in given and f.name != 'name']
  needed = [f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING]
  if missing := [name for name in needed if name not in given]:
    raise only_imported(section['name'], missing)
  if not section['conditional'] and config.dataset.label_dropout and beside is None:
    raise UserError('dataset.label_dropout needs model.conditional=True: there are no labels to drop')
  if section['conditional'] and not num_classes:
    one = ': all its images are in one folder' if config.dataset.name == 'folder' else ''
    raise UserError(
      f'model.conditional=True needs two classes or more, but dataset {config.dataset.name!r} has no labels{one}; '
      'put each class in a folder of its own, or set model.conditional=False'
    )
  network = build('model', cls, **{name: given[name] for name in fields})
  try:
    network.check(shape)
  except ValueError as error:
    raise UserError(f'config.model: {error}') from error
  return Denoiser(network, output)


def only_imported(name: str, missing: Sequence[str]) -> UserError:
  """Returns the error that a config does not describe a network, because these hyper-parameters are missing."""
  of_text = any(field.name == 'text_length' for field in dataclasses.fields(NETWORKS[name]))
  trained = '; or set autoencoder.num_updates and text_encoder.num_updates' if of_text else ''
  return UserError(
    f'model.name={name} is only for imported models (--mode=import), whose files give its {", ".join(missing)}{trained}'
  )


def _of_text(section: Mapping[str, Any], beside: Companions | None) -> dict[str, int]:
  """Returns the hyper-parameters of a network that follow from the text encoder beside it.

  Raises:
    UserError: the section does not describe a network of latents and texts.
  """
  if beside is None:
    return {}
  wanted = {'name': 'unet2d_condition', 'space': 'latents', 'conditional': False}
  for name, value in wanted.items():
    if section[name] != value:
      raise UserError(
        f'model.{name}={section[name]}: with autoencoder.num_updates above 0, set model.{name}={value}'
      )
  encoder = beside.text.network
  return {
    'cross_attention_dim': encoder.hidden_size,
    'text_length': encoder.max_position_embeddings,
  }


def as_computed(config: Config, denoise: Denoiser) -> Denoiser:
  """Returns an imported network with the activation dtype, `remat` and `attention` of the section `compute`."""
  sharding.check_attention(config.compute.attention, config.compute.dtype)
  network = denoise.network
  own = {key: config.compute[key] for key in ('dtype', 'remat', 'attention') if hasattr(network, key)}
  return dataclasses.replace(denoise, network=dataclasses.replace(network, **own))


def make_context(config: Config, base: Stage) -> Context:
  """Returns the context that the methods whose teacher is `base` are built from."""
  return Context(
    schedule=base.schedule,
    weighting=choose('weighting', config.weighting, WEIGHTINGS)(),
    law=make_law(config, base.schedule),
    uniform=times.Uniform(config.time.stratified),
    clip=base.space.clip,
    teacher=base.denoise,
    shape=base.recipe.shape[1:],
    cond_dropout=base.recipe.cond_dropout,
  )


def guidance_of(
  section: str,
  weight: float,
  base: Stage,
  interval: Sequence[float] = (),
  guiding: GuidingModel | None = None,
) -> Guidance:
  """Returns the guidance of the base that a section of the config asks for, by a guiding model if there is one.

  Raises:
    UserError: the base cannot be guided because of how it is trained, or the interval is not valid.
  """
  try:
    found = make_guidance(weight, interval)
  except ValueError as error:
    raise UserError(f'{section}.guidance_interval={tuple(interval)}: {error}') from error
  by_model = guiding is not None
  check(
    f'{section}.guidance',
    found,
    base.denoise.conditioning,
    base.recipe.cond_dropout,
    by_model=by_model,
  )
  return found


def guiding_of(section: str, path: str, weights: Sequence[float], base: Stage) -> GuidingModel | None:
  """Returns the guiding model of a section of the config, `section.guiding_model`; None if `path` is empty.

  Raises:
    UserError: all weights of guidance are 0, or the model cannot be read or does not fit the base.
  """
  if not path:
    return None
  if not any(weights):
    raise UserError(f'{section}.guiding_model={path} only applies to {section}.guidance above 0')
  return guiding_models.read(
    f'{section}.guiding_model', path, base.denoise.conditioning, base.space, base.image_shape
  )


def taught_guidance(
  section: str, weight: float, teacher: Stage, guiding: GuidingModel | None = None
) -> Guidance:
  """Returns the guidance of a teacher, as `guidance_of` does.

  Raises:
    UserError: also if the teacher takes the weight as an input: its students are trained with all of its weights.
  """
  if weight and conditioning.weights(teacher.denoise.conditioning):
    raise UserError(
      f'{section}.guidance={weight:g}: the teacher, {teacher.name}, takes the weight as an input, and its students are '
      f'trained with all of its weights; set {section}.guidance=0'
    )
  return guidance_of(section, weight, teacher, guiding=guiding)


def make_recipe(
  config: Config,
  section: str,
  seeds: tuple[int, ...],
  networks: tuple[Denoiser, Denoiser],
  method: Method,
  rates: Mapping[str, float],
  num_updates: int,
  space: Space,
  image_shape: tuple[int, ...],
) -> Recipe:
  """Returns the recipe of a stage's training step.

  Args:
    config: the config of the run.
    section: name of the config section that configures the stage's training.
    seeds: numbers that make the stage's noise differ from other stages with the same `config.seed`.
    networks: the student and the teacher.
    method: the method, which defines the loss.
    rates: the peak learning rate of each network.
    num_updates: number of updates of the stage.
    space: the space of x.
    image_shape: (H, W, C).
  """
  of = config[section]
  choose(f'{section}.decay', of.decay, DECAYS)
  target_decay = of.get('target_decay', 0.0)  # 0: the student; the first average always exists
  adam = dict(config.optimizer) | ({'clip_norm': of.clip_norm} if 'clip_norm' in of else {})
  if 'joint_clip' in of and of.joint_clip:
    adam['clipped_together'] = tuple(name for name in method.trained if name != 'student')
  return Recipe(
    networks=FrozenDict(_seeing_images(method.networks(*networks), space)),
    method=method,
    optimizer=build('optimizer', Adam, weight_decay=of.weight_decay, **adam),
    learning_rate={
      name: LearningRate(rate, num_updates, of.warmup, of.decay) for name, rate in rates.items()
    },
    ema_decay=tuple(of.ema_decay),
    seed=make_seed(config, *seeds),
    space=space,
    shape=(of.batch_size, *space.shape(image_shape)),
    random_flip=config.dataset.random_flip,
    dequantize=config.dataset.dequantize,
    cond_dropout=config.dataset.label_dropout,
    ema_ramp=of.ema_ramp,
    micro_batches=of.micro_batches,
    target_decay=None if target_decay in (0.0, of.ema_decay[0]) else target_decay,
  )


def _seeing_images(networks: dict[str, Any], space: Space) -> dict[str, Any]:
  """Returns the networks of a loss; a distance between images decodes x first, if x is not an image itself."""
  weighted = networks.get('distance')
  if weighted is None or not weighted.distance.of_images or space.decoder is None:
    return networks
  return {**networks, 'distance': Weighted(Decoded(weighted.distance, space.decoder))}


def make_pairs(config: Config, teacher: Stage) -> Pairs:
  """Returns the description of the teacher's stored pairs."""
  section = config.pairs
  choose('pairs.grid', section.grid, dict.fromkeys(times.GRIDS))
  choose('pairs.labels', section.labels, dict.fromkeys(conditioning.LABELS))
  guiding = guiding_of('pairs', section.guiding_model, [section.guidance], teacher)
  return Pairs(
    count=section.num_pairs,
    sampler=choose('pairs.sampler', section.sampler, DETERMINISTIC)(),
    clip_x=section.clip_x,
    num_steps=section.num_steps,
    grid=section.grid,
    seed=make_seed(config, *b'pairs'),
    batch_size=section.batch_size,
    labels=section.labels,
    guidance=taught_guidance('pairs', section.guidance, teacher, guiding),
    guiding=guiding,
  )


def make_seed(config: Config, *numbers: int) -> int:
  """Returns a seed below 2^31 that is derived from `config.seed` and `numbers`."""
  return int(np.random.SeedSequence([config.seed, *numbers]).generate_state(1)[0] >> 1)


def make_law(config: Config, schedule: Schedule) -> times.Law:
  """Returns the distribution of t in base training."""
  section, uniform = config.time, times.Uniform(config.time.stratified)
  if choose('time.law', section.law, LAWS) is times.Uniform:
    return uniform
  if section.num_steps:
    raise UserError('time.law=lognormal needs continuous time: set time.num_steps=0')
  return times.LogNormal(schedule, section.log_mean, section.log_std, uniform)


def make_schedule(config: Config, image_shape: tuple[int, ...]) -> Schedule:
  """Returns the schedule that the config names, built from the keys of the section that match its fields."""
  cls = choose('schedule.name', config.schedule.name, SCHEDULES)
  choose('schedule.betas', config.schedule.betas, BETAS)
  given: Mapping[str, Any] = {**config.schedule, 'image_size': image_shape[0]}
  fields = [field.name for field in dataclasses.fields(cls) if field.name in given]
  schedule: Schedule = build('schedule', cls, **{name: given[name] for name in fields})
  return schedule
