"""What an evaluation measures: which stages, with which weights, samplers, step counts and guidance."""

from collections.abc import Iterator

from diffusion_distillation.config import Config
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.stages.stage import Stage


def rows(stages: list[Stage], config: Config) -> Iterator[tuple[int, str, str, int]]:
  """Yields what is measured: (index of the stage in the list, weights, sampler, number of steps).

  The first stage is measured with every sampler at the step counts of all stages, each student with its own sampler at its
  own step counts, and further moving averages of a stage likewise. Rows above `evaluation.max_steps` are left out.
  """
  counts = list(dict.fromkeys(steps for stage in stages for steps in stage.measured_steps))
  found = [(0, 'ema', sampler, steps) for steps in counts for sampler in config.evaluation.samplers]
  for place, stage in enumerate(stages):
    for weights in stage.weights[:-1]:
      if place or weights != 'ema':
        found += [(place, weights, stage.sampler, steps) for steps in stage.measured_steps]
  yield from (row for row in found if row[-1] <= config.evaluation.max_steps)


def guidances(config: Config, place: int) -> tuple[Guidance, ...]:
  """Returns the guidances to measure the stage at `place` with: the config's for the base, the first stage; else only NONE."""
  weights, interval = config.evaluation.guidance, config.evaluation.guidance_interval
  return (NONE,) if place else tuple(make_guidance(weight, interval) for weight in weights)
