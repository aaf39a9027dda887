"""Students that go to few steps at once: knowledge and consistency distillation, DMD and DMD2. Pure."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_distillation.config import Config, choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.weightings import WEIGHTINGS
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import DMD, Consistency, Gan, Knowledge, Method
from diffusion_distillation.methods.distances import L2
from diffusion_distillation.stages import building
from diffusion_distillation.training.recipe import Pairs, Stage, without_dropout

# Without noise of their own: a stored image is a function of its noise.
DETERMINISTIC = {
  name: samplers.SAMPLERS[name] for name in ('ddim', 'euler', 'heun', 'rk4', 'dpm_solver_2m')
}
SOLVERS = {name: samplers.SAMPLERS[name] for name in ('ddim', 'euler', 'heun', 'rk4')}


def _stage(
  config: Config,
  base: Stage,
  name: str,
  method: Method,
  fake_rates: Mapping[str, float] | None = None,
  **fields: Any,
) -> Stage:
  """A stage of the base's student, trained as the section of its name says.

  Args:
    config: of the run.
    base: its teacher.
    name: of the stage and its section.
    method: its loss.
    fake_rates: learning rates of the networks beside the student.
    **fields: further ones of the stage.
  """
  section = config[name]
  rates = {**(fake_rates or {}), 'student': section.learning_rate}
  denoise = without_dropout(base.recipe.denoise)
  args = (denoise, method, rates, section.num_updates)
  return dataclasses.replace(
    base,
    name=name,
    parent=base.name,
    parent_weights='ema',
    start=section.start,
    recipe=building.make_recipe(config, name, tuple(name.encode()), *args),
    num_updates=section.num_updates,
    batch_size=section.batch_size,
    distance_weights=section.distance_weights,
    **{'num_steps': 1, 'measured_steps': (1,), **fields},
  )


def _pairs(config: Config) -> Pairs:
  section = config.pairs
  choose('pairs.sampler', section.sampler, DETERMINISTIC)
  choose('pairs.grid', section.grid, dict.fromkeys(times.GRIDS))
  return Pairs(
    count=section.num_pairs,
    sampler=building.make_sampler(section.sampler, config.evaluation.clip_x),
    num_steps=section.num_steps,
    grid=section.grid,
    seed=building.make_seed(config, *b'pairs'),
    batch_size=section.batch_size,
  )


def knowledge(config: Config, base: Stage) -> Stage:
  """One step, by regression on stored pairs."""
  method = Knowledge(base.schedule, building.make_distance(config, 'knowledge'))
  return _stage(config, base, 'knowledge', method, pairs=_pairs(config))


def consistency(config: Config, base: Stage) -> Stage:
  """One step or several, by agreement along the teacher's path."""
  section = config.consistency
  if section.start_intervals > section.end_intervals:
    raise UserError(
      f'consistency.start_intervals={section.start_intervals} must not be more than '
      f'consistency.end_intervals={section.end_intervals}'
    )
  choose('consistency.solver', section.solver, SOLVERS)
  choose('consistency.target', section.target, {'ema': None, 'last': None})
  method = Consistency(
    num_updates=section.num_updates,
    start_intervals=section.start_intervals,
    end_intervals=section.end_intervals,
    schedule=base.schedule,
    weighting=choose('consistency.weighting', section.weighting, WEIGHTINGS)(),
    distance=building.make_distance(config, 'consistency'),
    solver=building.make_sampler(section.solver, clip_x=False),
    law=times.Uniform(config.time.stratified),
    follows_average=section.target == 'ema',
  )
  measured = tuple(section.sample_steps)
  if not measured:
    raise UserError('consistency.sample_steps=() must hold a number at least')
  return _stage(
    config, base, 'consistency', method, sampler='multistep_consistency', measured_steps=measured
  )


def matching(config: Config, base: Stage, name: str) -> Stage:
  """DMD or DMD2, as the section `name` says."""
  section = config[name]
  network = base.recipe.denoise.network
  width = network.ch * network.ch_mult[-1]
  gan = None
  if bool(section.gan_generator) != bool(section.gan_fake):
    raise UserError(f'{name}.gan_generator and {name}.gan_fake: both are zero, or neither')
  if section.gan_fake:
    if width % 8:
      raise UserError(
        f'{name}.gan_fake needs innermost channels that divide by 8; the model has {width}'
      )
    gan = Gan(width, section.gan_generator, section.gan_fake)
  distance = building.make_distance(config, name)
  method = building.build(
    name,
    DMD,
    schedule=base.schedule,
    weighting=choose('weighting', config.weighting, WEIGHTINGS)(),
    law=building.make_law(config, base.schedule),
    distance=distance if section.regression else L2(),
    clip_x=config.evaluation.clip_x,
    gan=gan,
    **{
      key: section[key]
      for key in ('first_t', 'last_t', 'regression', 'fake_updates', 'num_steps', 'simulated')
    },
  )
  if section.num_updates % section.fake_updates:
    raise UserError(
      f'{name}.num_updates={section.num_updates} must be a multiple of {name}.fake_updates='
      f'{section.fake_updates}: the generator is updated once in as many'
    )
  fields: dict[str, Any] = {'num_steps': section.num_steps, 'measured_steps': (section.num_steps,)}
  if section.regression:
    fields['pairs'] = _pairs(config)
  if section.num_steps > 1:
    fields['sampler'] = 'multistep_consistency'
  rates = dict.fromkeys(('fake_score', 'head'), section.fake_learning_rate)
  return _stage(config, base, name, method, rates, **fields)


STUDENTS: dict[str, Callable[[Config, Stage], Stage]] = {
  'knowledge': knowledge,
  'consistency': consistency,
  'dmd': lambda config, base: matching(config, base, 'dmd'),
  'dmd2': lambda config, base: matching(config, base, 'dmd2'),
}


def check_starts(stages: list[Stage]) -> None:
  """Raises UserError unless every stage's student starts from a stage before it."""
  before: dict[str, None] = {}
  for stage in stages:
    if stage.start is not None:
      choose(f'{stage.name}.start', stage.start, before)
    before[stage.name] = None
