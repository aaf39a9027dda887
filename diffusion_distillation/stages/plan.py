"""Plans the stages of a run from its config: base training, then its rounds and other students. All functions are pure."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_distillation.config import Config, check_numbers, choose
from diffusion_distillation.datasets.settings import ENCODED_DTYPES
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, or_base
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS, Denoising, Progressive, Student
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.conditioning import takes_text
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import SPACES, Space
from diffusion_distillation.networks.unet import DTYPES
from diffusion_distillation.stages import parts
from diffusion_distillation.stages.lora import with_adapters
from diffusion_distillation.stages.model import name_in, network_arguments
from diffusion_distillation.stages.own_companions import Companions
from diffusion_distillation.stages.parts import Data
from diffusion_distillation.stages.plan_checks import (
  check_described,
  check_grids,
  check_measuring,
  check_pairs,
  check_starts,
)
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.texts import TextEncoder


@dataclasses.dataclass(frozen=True)
class Origin:
  """An imported model as the first stage of a plan. Its files take precedence over the config.

  Attributes:
    denoise: the network as a denoiser.
    schedule: t to logsnr.
    space: the space of x.
    image_shape: (H, W, C).
    num_steps: number of sampling steps.
    sampler: name of its sampler.
    times: spacing of its steps, a name in `times.GRIDS`; None: as in the evaluation.
    clip_x: whether x is clipped while sampling; None: as in the evaluation.
    cond_dropout: probability with which conditions were dropped in its training.
    text: its text encoder, if it is conditioned on text.
  """

  denoise: Denoiser
  schedule: Schedule
  space: Space
  image_shape: tuple[int, ...]
  num_steps: int
  sampler: str
  times: str | None
  clip_x: bool | None
  cond_dropout: float
  text: TextEncoder | None = None


# The largest factor by which a student may amplify errors in eps at t = 1, where its x is (z - sigma eps) / alpha. With a
# factor of 1000, an error of 0.001 in eps, which training typically leaves, becomes an error of 1 in x, half the range of an
# image. The factor is 157 for DDPM's linear betas, whose models have been distilled, and 22026 for the cosine schedule,
# which is clipped at logsnr = -20.
MAX_GAIN = 1000.0

# Keys of the section `distill` that hold one entry per round.
PER_ROUND = ('factor', 'num_updates', 'learning_rate')


def of_round(values: Sequence[Any], from_the_end: int) -> Any:
  """Returns a round's entry of a tuple whose last entry is the last round's and whose first also serves all earlier rounds."""
  return values[max(0, len(values) - 1 - from_the_end)]


def rounds(start_steps: int, end_steps: int, factor: Sequence[int] = (2,)) -> list[tuple[int, int]]:
  """Returns each round's number of student steps and its factor, from the first round to the last.

  Args:
    start_steps: number of steps of the base model.
    end_steps: number of steps of the last student.
    factor: factor per round, the last round's last; the first entry also serves all earlier rounds.

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


def plan(
  config: Config,
  image_shape: tuple[int, ...],
  num_classes: int,
  origin: Origin | None = None,
  companions: Companions | None = None,
) -> list[Stage]:
  """Returns all stages of a run, in order, without reading, compiling or writing anything.

  Args:
    config: a config with exactly the keys of configs/default.py.
    image_shape: (H, W, C) of the data.
    num_classes: number of classes of the data; 0 if there are no labels.
    origin: the imported base; None if the config describes the base.
    companions: the networks beside the base if the run trains them itself; else None.

  Raises:
    UserError: a value in the config is not valid; the message names the key.
  """
  check_numbers(config)
  check_measuring(config)
  data = Data(image_shape, num_classes, companions)
  for name in config.methods:
    choose('methods', name, _students())
  choose('compute.teacher_dtype', config.compute.teacher_dtype, DTYPES)
  choose('dataset.encoded_dtype', config.dataset.encoded_dtype, dict.fromkeys(ENCODED_DTYPES))
  base = _base(config, data, origin)
  if base.space.own_programs and (config.methods or companions) and config.dataset.random_flip:
    raise UserError(
      'dataset.random_flip=True: the latents of a mirrored image are not its mirrored latents; set it to False'
    )
  section = config.evaluation
  guiding = parts.guiding_of('evaluation', section.guiding_model, section.guidance, base)
  for weight in section.guidance:
    parts.guidance_of('evaluation', weight, base, section.guidance_interval, guiding)
  student, teacher = _student_network(config, base, data), base
  stages = [base]
  for name in config.methods:
    if name == 'progressive':
      stages += [with_adapters(config, stage) for stage in _rounds(config, base, teacher, student)]
      continue
    stages.append(with_adapters(config, _student(config, base, teacher, student, name)))
    if METHODS[name].teaches:
      teacher, student = stages[-1], stages[-1].denoise
  check_starts(stages)
  check_pairs(stages)
  check_grids(config, stages)
  if of := config.evaluation.neighbours_of:
    choose('evaluation.neighbours_of', of, {stage.name: stage for stage in stages})
  least = min(steps for stage in stages for steps in stage.measured_steps)
  if least > config.evaluation.max_steps:
    raise UserError(
      f'evaluation.max_steps={config.evaluation.max_steps} leaves nothing to measure: no stage has fewer steps '
      f'than {least} (distill.end_steps={config.distill.end_steps})'
    )
  return stages


def _students() -> dict[str, type]:
  """Returns the methods that may follow the base."""
  return {
    name: cls for name, cls in METHODS.items() if name == 'progressive' or issubclass(cls, Student)
  }


def _base(config: Config, data: Data, origin: Origin | None) -> Stage:
  """Returns the first stage, the base, from which all others are distilled."""
  train = config.train
  if origin is None:
    check_described(config)
    schedule = parts.make_schedule(config, data.image_shape)
    denoise = parts.make_denoiser(config, config.model, data, schedule)
    beside, num_steps = data.companions, config.distill.start_steps
    space = parts.make_space(config.model) if beside is None else beside.space
    sampling = ('ddim', None, None, config.dataset.label_dropout, beside and beside.text)
    origin = Origin(denoise, schedule, space, data.image_shape, num_steps, *sampling)
  else:
    origin = dataclasses.replace(origin, denoise=parts.as_computed(config, origin.denoise))
  loss = Denoising(
    schedule=origin.schedule,
    weighting=choose('weighting', config.weighting, WEIGHTINGS)(),
    law=parts.make_law(config, origin.schedule),
    num_steps=config.time.num_steps,
  )
  rates = {'student': train.learning_rate}
  networks = (origin.denoise, origin.denoise)
  args = (networks, loss, rates, train.num_updates, origin.space, origin.image_shape)
  recipe = parts.make_recipe(config, 'train', (0,), *args)
  return Stage(
    name='base',
    parent=None,
    parent_weights='',
    recipe=dataclasses.replace(recipe, cond_dropout=origin.cond_dropout),
    num_steps=origin.num_steps,
    num_updates=train.num_updates,
    schedule=origin.schedule,
    image_shape=origin.image_shape,
    sampler=origin.sampler,
    times=origin.times,
    clip_x=origin.clip_x,
    text=origin.text,
    measured_steps=(origin.num_steps,),
    teacher_dtype=config.compute.teacher_dtype,
  )


def _student_network(config: Config, base: Stage, data: Data) -> Denoiser:
  """Returns the students' network: the base's without dropout, with the changes of the section `student`."""
  otherwise = {key: value for key, value in config.student.items() if value is not None}
  if not otherwise:
    return base.denoise
  if takes_text(base.denoise.conditioning):
    raise UserError(
      f'student.{next(iter(otherwise))}: a student of a model that draws what a text says has the network of its teacher; leave '
      'out all keys of the section student'
    )
  name = otherwise.get('space', name_in(SPACES, base.space))
  if choose('student.space', name, SPACES) is not type(base.space):
    raise UserError('student.space: a student must use the space of its teacher')
  own = {
    'name': name_in(NETWORKS, base.denoise.network),
    'output': base.denoise.output,
    'conditional': bool(base.denoise.conditioning),
    **network_arguments(base.denoise.network),
  }
  data = dataclasses.replace(data, image_shape=base.image_shape)
  network = parts.make_denoiser(config, {**config.model, **own, **otherwise}, data, base.schedule)
  if network.conditioning != base.denoise.conditioning:
    raise UserError('student.conditional: a student must have the conditioning of its teacher')
  return network.without_dropout()


def _student(config: Config, base: Stage, teacher: Stage, student: Denoiser, name: str) -> Stage:
  """Returns the stage of a student of `teacher`, trained by the method `name` with its section of the config."""
  section, cls = config[name], METHODS[name]
  parts.taught_guidance(name, section.get('guidance', 0.0), teacher)
  method = cls.from_config(name, section, parts.make_context(config, teacher))
  student = cls.network(name, section, student)
  sampling, rates = cls.sampling(section), cls.learning_rates(section)
  networks = (student, teacher.denoise)
  args = (networks, method, rates, section.num_updates, base.space, base.image_shape)
  if 'pairs' in method.needs and section.get('guidance', config.pairs.guidance) != config.pairs.guidance:
    raise UserError(
      f'{name}.guidance={section.guidance:g} and pairs.guidance={config.pairs.guidance:g} must be the same: the '
      f"regression's pairs must come from the teacher that {name} matches; or set {name}.regression=0"
    )
  return dataclasses.replace(
    base,
    name=name,
    parent=teacher.name,
    parent_weights='ema',
    teacher=teacher.denoise,
    start=_start(base, student, section.get('start', base.name)),
    recipe=parts.make_recipe(config, name, tuple(name.encode()), *args),
    num_steps=sampling.num_steps or base.num_steps,
    num_updates=section.num_updates,
    pairs=parts.make_pairs(config, teacher) if 'pairs' in method.needs else None,
    distance_weights=section.distance_weights if 'distance_weights' in section else '',
    sampler=sampling.sampler,
    times=None,
    clip_x=None,
    measured_steps=tuple(steps or base.num_steps for steps in sampling.measured_steps),
  )


def check_output(stage: Stage) -> None:
  """Raises UserError if an untrained stage predicts eps and its schedule leaves too little signal at t = 1.

  The rounds of progressive distillation are not checked: under the weighting `snr` their loss weights errors in eps
  independently of alpha, samplers of several steps clip x at t = 1, and the paper's table of outputs includes such bases.
  """
  if stage.denoise.output != 'eps' or not issubclass(METHODS[stage.method], Student):
    return
  gain = float(jnp.exp(0.5 * jax.nn.softplus(-stage.schedule(jnp.ones(())))))  # 1 / alpha
  if gain > MAX_GAIN:
    raise UserError(
      f'{stage.name}: a student that predicts eps turns an error in it into one in x that is {gain:,.0f} times as large at t = 1 '
      f'(1 / alpha; at most {MAX_GAIN:,.0f}); set student.output (or model.output) to v or x, or choose a schedule that '
      'leaves more signal at t = 1, such as schedule.logsnr_min=-13'
    )


def _start(base: Stage, student: Denoiser, start: str) -> str | None:
  """Returns the stage that a student starts from; None if that is the base, but the networks differ.

  Such a student starts from its teacher if it can (see `Stage.starts_anew`), or else from new parameters.
  """
  return None if start == base.name and student != base.denoise else start


def _rounds(config: Config, base: Stage, first: Stage, student: Denoiser) -> list[Stage]:
  """Returns the rounds of progressive distillation, beginning with the teacher `first`; each student teaches the next."""
  distill = config.distill
  steps = rounds(distill.start_steps, distill.end_steps, distill.factor)
  if len(distill.factor) > max(1, len(steps)):
    raise UserError(
      f'distill.factor={distill.factor} has more entries than there are rounds, {len(steps)}'
    )
  choose('distill.from_weights', distill.from_weights, {'ema': None, 'last': None})
  weightings = or_base(choose('weighting', config.weighting, WEIGHTINGS)())
  weighting = choose('distill.weighting', distill.weighting, weightings)()
  uniform = times.Uniform(config.time.stratified)
  guidance = parts.taught_guidance('distill', distill.guidance, first).weight
  found = [first]
  for num_steps, factor in steps:
    teacher, from_the_end = found[-1], len(steps) - len(found)
    num_updates = of_round(distill.num_updates, from_the_end)
    rates = {'student': of_round(distill.learning_rate, from_the_end)}
    by = 0.0 if teacher.parent else guidance
    loss = Progressive(num_steps, base.schedule, weighting, factor, uniform, by)
    networks = (student, teacher.denoise)
    args = (networks, loss, rates, num_updates, base.space, base.image_shape)
    found.append(
      dataclasses.replace(
        base,
        name=f'progressive_{num_steps:04d}',
        parent=teacher.name,
        parent_weights=distill.from_weights,
        teacher=teacher.denoise,
        recipe=parts.make_recipe(config, 'distill', (len(found),), *args),
        num_steps=num_steps,
        num_updates=num_updates,
        sampler='ddim',
        times=None,
        clip_x=None,
        measured_steps=(num_steps,),
      )
    )
  return found[1:]
