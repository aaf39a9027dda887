"""Checks of a plan that concern several stages, the evaluation, or whether the config describes the base."""

import dataclasses

from diffusion_distillation.config import Config, choose, keys
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import NETWORKS, conditioning
from diffusion_distillation.stages import parts
from diffusion_distillation.stages.stage import Stage


def check_described(config: Config) -> None:
  """Raises UserError unless the section `model` has all keys of its network, whose other hyper-parameters the program sets."""
  cls = choose('model.name', config.model.name, NETWORKS)
  own = keys(cls.Section)
  all_keys = {name for other in NETWORKS.values() for name in keys(other.Section)}
  needed = [f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING]
  if missing := [name for name in needed if name in all_keys and name not in own]:
    raise parts.only_imported(config.model.name, missing)


def check_measuring(config: Config) -> None:
  """Raises UserError unless the section `evaluation` names a grid, labels and samplers that there are."""
  evaluation = config.evaluation
  choose('evaluation.grid', evaluation.grid, dict.fromkeys(times.GRIDS))
  choose('evaluation.labels', evaluation.labels, dict.fromkeys(conditioning.LABELS))
  if not evaluation.samplers:
    raise UserError('evaluation.samplers=() must name at least one sampler, such as ddim')
  for name in evaluation.samplers:
    parts.make_sampler(name, evaluation.gamma)


def check_grids(config: Config, stages: list[Stage]) -> None:
  """Raises UserError unless the base's schedule supports the grids that the config names, at all numbers of steps."""
  most = config.evaluation.max_steps
  counts = {steps for stage in stages for steps in stage.measured_steps if steps <= most}
  wanted = [('evaluation.grid', config.evaluation.grid, counts)]
  wanted += [
    ('pairs.grid', stage.pairs.grid, {stage.pairs.num_steps}) for stage in stages if stage.pairs
  ]
  for key, name, numbers in wanted:
    for num_steps in sorted(numbers):
      try:
        times.make_grid(name, num_steps, stages[0].schedule)
      except ValueError as error:
        raise UserError(f'{key}={name}: {error}') from error


def check_pairs(stages: list[Stage]) -> None:
  """Raises UserError if two stages need stored pairs of different teachers."""
  with_pairs = [stage for stage in stages if stage.pairs]
  for stage in with_pairs:
    if stage.parent != (first := with_pairs[0]).parent:
      raise UserError(
        f'{first.name} and {stage.name} need stored pairs of different teachers, {first.parent} and {stage.parent}, but a '
        'workdir only has one set of pairs; list both on the same side of `guided` in methods, or use two workdirs'
      )


def check_starts(stages: list[Stage]) -> None:
  """Raises UserError unless every student starts from an earlier stage with the same network."""
  before: dict[str, Stage] = {}
  for stage in stages:
    if stage.start is not None:
      start = choose(f'{stage.name}.start', stage.start, before)
      if start.denoise != stage.denoise:
        raise UserError(f'{stage.name}.start={stage.start}: that stage has another network')
    before[stage.name] = stage
