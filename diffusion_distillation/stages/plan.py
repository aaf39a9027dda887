"""From a config to the list of stages: base training, then rounds and other students of it. Pure."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusion_distillation.config import Config, check_numbers, choose
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.weightings import WEIGHTINGS
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import Denoising, Progressive
from diffusion_distillation.networks.unet import DTYPES
from diffusion_distillation.stages import building, students
from diffusion_distillation.training.recipe import Stage, without_dropout


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
  _check_measuring(config)
  for name in config.methods:
    choose('methods', name, {'progressive': None, **students.STUDENTS})
  denoise = building.make_denoiser(config, image_shape, num_classes)
  schedule = building.make_schedule(config, image_shape)
  weighting = choose('weighting', config.weighting, WEIGHTINGS)()
  law, train = building.make_law(config, schedule), config.train
  loss = Denoising(schedule, weighting, law, config.time.num_steps)
  rates = {'student': train.learning_rate}
  choose('compute.teacher_dtype', config.compute.teacher_dtype, DTYPES)
  base = Stage(
    name='base',
    parent=None,
    parent_weights='',
    recipe=building.make_recipe(config, 'train', (0,), denoise, loss, rates, train.num_updates),
    num_steps=config.distill.start_steps,
    num_updates=train.num_updates,
    batch_size=train.batch_size,
    schedule=schedule,
    image_shape=image_shape,
    measured_steps=(config.distill.start_steps,),
    teacher_dtype=config.compute.teacher_dtype,
  )
  stages = [base]
  for name in config.methods:
    stages += _rounds(config, base) if name == 'progressive' else [students.STUDENTS[name](config, base)]
  students.check_starts(stages)
  least = min(steps for stage in stages for steps in stage.measured_steps)
  if least > config.evaluation.max_steps:
    raise UserError(
      f'evaluation.max_steps={config.evaluation.max_steps} leaves nothing to measure: no stage has fewer steps '
      f'than {least} (distill.end_steps={config.distill.end_steps})'
    )
  return stages


def _check_measuring(config: Config) -> None:
  evaluation = config.evaluation
  choose('evaluation.grid', evaluation.grid, dict.fromkeys(times.GRIDS))
  if not evaluation.samplers:
    raise UserError('evaluation.samplers=() must name one at least, such as ddim')
  for name in evaluation.samplers:
    building.make_sampler(name, evaluation.clip_x, evaluation.gamma)


def _rounds(config: Config, base: Stage) -> list[Stage]:
  """The rounds of progressive distillation, each the teacher of the next."""
  distill = config.distill
  steps = rounds(distill.start_steps, distill.end_steps, distill.factor)
  if len(distill.factor) > max(1, len(steps)):
    raise UserError(
      f'distill.factor={distill.factor} has more entries than there are rounds, {len(steps)}'
    )
  choose('distill.from_weights', distill.from_weights, {'ema': None, 'last': None})
  weighting = choose('weighting', config.weighting, WEIGHTINGS)()
  found, denoise = [base], without_dropout(base.recipe.denoise)
  for num_steps, factor in steps:
    from_the_end = len(steps) - len(found)
    num_updates = of_round(distill.num_updates, from_the_end)
    rates = {'student': of_round(distill.learning_rate, from_the_end)}
    loss = Progressive(
      num_steps, base.schedule, weighting, factor, times.Uniform(config.time.stratified)
    )
    seeds = (len(found),)
    student = dataclasses.replace(
      base,
      name=f'progressive_{num_steps:04d}',
      parent=found[-1].name,
      parent_weights=distill.from_weights,
      recipe=building.make_recipe(config, 'distill', seeds, denoise, loss, rates, num_updates),
      num_steps=num_steps,
      num_updates=num_updates,
      batch_size=distill.batch_size,
      measured_steps=(num_steps,),
    )
    found.append(student)
  return found[1:]
